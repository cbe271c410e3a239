"""`transformers`' own generate, over its dynamic or static cache, or its continuous batching."""

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from protocol import Clock, Generate, System, expect, looked_up_bytes, serve
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

_PAGE_TOKENS = 64  # of a page of continuous batching


class _Told(StoppingCriteria):
    """Tells a clock of each step of a batch, and stops nothing."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        self.clock.step(range(len(input_ids)))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def load(options: dict[str, Any], closing: ExitStack) -> System:
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"])
    model = model.to(options["device"]).eval()
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    read_bytes = weight_bytes - looked_up_bytes(model)
    if options["cache"] == "continuous":
        room = options["total_tokens"], options["max_seqs"]
        return System(_continuous(model, *room, closing), weight_bytes, read_bytes)
    generate = _padded(
        model, options["cache"], options["batch"], compiled=options.get("compile", False)
    )
    return System(generate, weight_bytes, read_bytes)


def _padded(model: PreTrainedModel, cache: str, batch: int, *, compiled: bool) -> Generate:
    """Batches of at most `batch` in order of arrival, padded left, as long as the longest.

    Compiled, decodes are (`torch.compile`); their graph is made anew for other shapes, which
    the measurement ahead of those that count is for.
    """
    how: dict[str, Any] = {"disable_compile": True}
    if compiled:
        how = {"compile_config": CompileConfig()}
        how["compile_config"]._compile_all_devices = True  # by default it leaves CPUs out

    @torch.inference_mode()
    def generate(
        prompts: Sequence[Sequence[int]], output_lens: Sequence[int], clock: Clock
    ) -> list[list[int]]:
        outputs: list[list[int]] = []
        for start in range(0, len(prompts), batch):
            clock.group()
            some = prompts[start : start + batch]
            longest, steps = max(map(len, some)), max(output_lens[start : start + batch])
            ids = torch.zeros(len(some), longest, dtype=torch.long, device=model.device)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(some):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=steps,
                min_new_tokens=steps,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([_Told(clock)]),
                **({"cache_implementation": cache, **how} if cache == "static" else {}),
            )
            expect(out.shape[1], longest + steps)
            outputs += out[:, longest:].tolist()
        return outputs

    return generate


def _continuous(
    model: PreTrainedModel, total_tokens: int, max_seqs: int, closing: ExitStack
) -> Generate:
    """One manager for all calls, since stopping it takes seconds, with the memory that it needs.

    By default its cache would take more than half of what is free.
    """
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(
        page_size=_PAGE_TOKENS,
        num_blocks=math.ceil(total_tokens / _PAGE_TOKENS) + max_seqs,
        allow_block_sharing=False,  # the same prompts come again
    )

    manager = closing.enter_context(
        model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=room
        )
    )
    names = map(str, itertools.count())

    def generate(
        prompts: Sequence[Sequence[int]], output_lens: Sequence[int], clock: Clock
    ) -> list[list[int]]:
        asked = [next(names) for _ in prompts]
        for name, prompt, length in zip(asked, prompts, output_lens, strict=True):
            manager.add_request(list(prompt), name, max_new_tokens=length, streaming=True)
        left, outputs = len(prompts), {name: [] for name in asked}
        seen: dict[str, int] = {}
        while left:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching stopped by itself")
                continue
            count = len(result.generated_tokens)
            clock.step([result.request_id] * (count - seen.get(result.request_id, 0)))
            seen[result.request_id] = count
            if result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
                left -= 1
        expect(sum(map(len, outputs.values())), sum(output_lens))
        return list(outputs.values())

    return generate


if __name__ == "__main__":
    with ExitStack() as at_the_end:
        serve(partial(load, closing=at_the_end))
