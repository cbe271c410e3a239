"""One cache of `transformers`' generate, filled and decoded over in this process; see `cache.py`.

Answers with one line of JSON: seconds of each decoded token, seconds of a prefill where one was
asked for, and how far resident memory rose above that of the loaded and warm model.
"""

import gc
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from vkv.bench.models.shapes import kv_geometry


class Clock(StoppingCriteria):
    """Notes when each token was there, and stops nothing."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)  # type: ignore[return-value]


def make_cache(kind: str, model: PreTrainedModel, max_len: int) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=max_len)
    from vkv import VirtualCache

    return VirtualCache(model.config, max_len=max_len)


@torch.no_grad()
def fill(cache: Cache, model: PreTrainedModel, states: torch.Tensor) -> None:
    """Give every layer `states`, [batch, heads, tokens, dim], through `update` as the model does.

    The same ones for all: what is made for each layer would itself be memory, and be measured.
    """
    for layer in range(model.config.num_hidden_layers):
        cache.update(states, states, layer)


def decode(cache: Cache, model: PreTrainedModel, ids: torch.Tensor, steps: int) -> list[float]:
    """Seconds up to the first token, and of each token after it."""
    clock = Clock()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        pad_token_id=0,
        disable_compile=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    times = [start, *clock.times_s]
    return [after - before for before, after in itertools.pairwise(times)]


def memory(field: str) -> int:
    """VmRSS (resident now) or VmHWM (the most so far) of this process, in bytes."""
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields[field].split()[0]) * 1024


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"]).eval()
    if options["kind"] == "virtual-vkv":
        from vkv import ATTENTION

        model.set_attn_implementation(ATTENTION)
    kind, batch, context = options["kind"], options["batch"], options["context"]
    steps, max_len = options["steps"], context + options["steps"] + 1
    ids = torch.randint(model.config.vocab_size, (batch, context + 1))
    decode(make_cache(kind, model, 32), model, ids[:, :16], 8)  # warm, and all weights resident
    shape = batch, context, *kv_geometry(model.config)
    states = torch.randn(shape, dtype=model.dtype).transpose(1, 2)  # as a projection leaves them
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    cache = make_cache(kind, model, max_len)
    fill(cache, model, states)
    filled = memory("VmRSS") - before
    answer: dict[str, Any] = {"token_s": decode(cache, model, ids, steps)[1:]}
    answer |= {"peak_bytes": memory("VmHWM") - before, "filled_bytes": filled}
    if options["prefill"]:
        del cache
        fresh = make_cache(kind, model, max_len)
        answer["prefill_s"] = decode(fresh, model, ids[:, :context], 0)[0]
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
