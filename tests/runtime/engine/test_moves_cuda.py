"""What joined the engine after its kernels, on a GPU: moves, adapters, guesses, and refusals.

All but the refusals run on a CPU elsewhere, in the same words (`test_swapping.py`,
`test_migration.py`, `tests/runtime/adapters`, `test_speculation.py`).
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import migrating
import moved
import pytest
import torch
import zoo
from lora import save_adapter
from served import Served
from transformers import PreTrainedModel
from vkv import LLM
from vkv.allocator.transfer import Copier
from vkv.runtime.engine.migration.carriers import CopyCarrier
from vkv.vmem.errors import InvalidConfig, RequestTooLarge

pytestmark = pytest.mark.gpu

_LENGTHS = [30, 5, 44, 18, 9, 27, 33, 61]
_PAGES: dict[str, Any] = {"page_bytes": 2 << 20, "kv_memory": "256MiB"}
# Sixteen tokens a page: less than a page is not fetched. A hybrid's tokens come back in any case.
_WIDE = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 256}


@contextmanager
def _open(model: PreTrainedModel, **options: Any) -> Iterator[LLM]:
    given = {"max_seqs": 8, "max_len": 256, "kv_memory": "256MiB", **options}
    with LLM(model, device="cuda", **given) as llm:
        yield llm
        llm.engine.cache.check_invariants()


def _tokens(llm: LLM, count: int = 30, **options: Any) -> list[tuple[int, ...]]:
    outs = llm.generate(zoo.random_prompts(_LENGTHS), zoo.greedy(count), **options)
    return [out.outputs[0].token_ids for out in outs]


# -- keys and values that move -------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False], ids=["beside steps", "at once"])
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_swaps_to_host_memory_change_no_token(name: str, asynchronous: bool) -> None:
    model = zoo.tiny_model(name, **(_WIDE if name == "llama" else {}))
    specs = moved.specs(zoo.random_prompts(_LENGTHS))
    options = {"device": "cuda", "max_seqs": 16, **_PAGES}
    undisturbed = moved.run(model, specs, **options)
    outcome = moved.run(
        model, specs, num_moves=40, swap_memory="256MiB", asynchronous=asynchronous, **options
    )
    assert outcome.num_forced >= 40
    assert outcome.swap is not None
    assert outcome.swap.fetched.num_moves >= 5
    assert outcome.tokens == undisturbed.tokens


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside steps"])
def test_sequences_move_between_engines_while_they_run(beside: bool) -> None:
    model, specs = zoo.tiny_model("llama"), migrating.specs(migrating.prompts())
    options = {"device": "cuda", **_PAGES}
    copier = Copier(torch.device("cuda", 0)) if beside else None
    draw = random.Random(0)
    with migrating.rig(model, 2, carrier=CopyCarrier(copier), **options) as rig:
        rig.add(specs)
        while rig.unfinished:
            rig.move_some(draw, 0.25)
            rig.turn()
        rig.finish()
        assert rig.migrations.arbiter.counts.moved >= 20
        assert rig.migrations.arbiter.counts.lost == 0
    migrating.assert_equal(rig.streams, migrating.undisturbed(model, specs, **options))


# -- adapters and guesses, recorded --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_in_one_batch_recorded_and_not(dtype: torch.dtype, tmp_path: Path) -> None:
    """Triton's kernels: the same tokens by recordings, and in float32 those of each alone."""
    model = zoo.tiny_model("llama", dtype=dtype, hidden_size=64, head_dim=16)
    for number in range(3):
        save_adapter(tmp_path / f"{number}", model, seed=number, rank=(8, 16, 5)[number])
    names = [None, "0", "1", "2", "0", "1", None, "2"]
    found = []
    for record_decodes in (False, None):
        with _open(model, record_decodes=record_decodes) as llm:
            assert llm.engine.runner.adapters is not None
            assert llm.engine.runner.adapters.products.name == "triton"
            for name in "012":
                llm.load_adapter(name, tmp_path / name)
            found.append(_tokens(llm, adapter=names))
            if dtype == torch.float32:
                prompts = zoo.random_prompts(_LENGTHS)
                alone = [
                    llm.generate(prompt, zoo.greedy(30), adapter=name)[0].outputs[0].token_ids
                    for prompt, name in zip(prompts, names, strict=True)
                ]
                assert found[-1] == alone
            elif record_decodes is None:
                graphs = llm.engine.runner.recordings
                assert graphs is not None
                assert graphs.refused is None
                assert graphs._with_adapters
    if dtype == torch.float32:
        assert found[0] == found[1]


def test_guesses_that_are_verified_beside_recorded_decodes() -> None:
    model = zoo.tiny_model("llama")
    prompts = [[7, 8, 9, 10] * 9, *zoo.random_prompts([20, 31])]
    found = []
    for options in ({}, {"speculative": "ngram"}):
        with _open(model, **options) as llm:
            outs = llm.generate(prompts, zoo.greedy(60))
            found.append([out.outputs[0].token_ids for out in outs])
    assert found[0] == found[1]


# -- what is refused -----------------------------------------------------------------------------


def test_what_no_kernel_of_a_gpu_promises_is_refused_by_name() -> None:
    model = zoo.tiny_model("llama", dtype=torch.bfloat16, **_WIDE)
    with pytest.raises(InvalidConfig, match="repeatable is True"), _open(model, repeatable=True):
        pass
    with _open(model, kv_memory="4MiB", swap_memory="64MiB") as llm:  # of 64 tokens
        assert llm.engine.admission.why_not_longer is not None
        with pytest.raises(RequestTooLarge):
            llm.generate([[1] * 200], zoo.greedy(2), on_error="raise")


class _Looks(torch.nn.Module):
    """A rotary embedding that reads its positions on the host, as dynamic ones do."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        assert int(position_ids.max()) >= 0
        return self.inner(hidden, position_ids)


def test_a_model_that_reads_numbers_runs_unrecorded_and_memory_goes_back_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = zoo.tiny_model("llama", dtype=torch.bfloat16)
    model.model.rotary_emb = _Looks(model.model.rotary_emb)
    with caplog.at_level(logging.WARNING), _open(model) as llm:
        _tokens(llm)
        graphs = llm.engine.runner.recordings
        assert graphs is not None
        assert graphs.refused is not None
        assert "waits for the device" in graphs.refused
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    del block
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()  # nothing, while the allocator believes in a capture
    assert torch.cuda.memory_reserved() <= before - (1 << 30)


# -- a server ------------------------------------------------------------------------------------


def test_a_server_starts_and_answers(tmp_path: Path) -> None:
    zoo.save_checkpoint(tmp_path / "model")
    options = ("--device", "cuda", "--kv-memory", "64MiB", "--max-model-len", "256")
    with Served(str(tmp_path / "model"), *options, log=tmp_path / "log") as served:
        body = {"model": "model", "prompt": "abc", "max_tokens": 8, "temperature": 0}
        name = served.client.get("/v1/models").json()["data"][0]["id"]
        answer = served.client.post("/v1/completions", json={**body, "model": name})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 1
