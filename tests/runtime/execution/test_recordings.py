"""Recorded decode steps: padding, sizes and buffers, with recordings that are run again."""

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from lora import save_adapter
from rerun import Rerun, record_by_rerun
from vkv import LLM, SamplingParams
from vkv.runtime.engine.build import why_not_recorded
from vkv.runtime.execution import recordings
from vkv.runtime.execution.recordings import DecodeRecordings
from vkv.runtime.request.request import Batch
from vkv.vmem.errors import InvalidConfig


def _open(model_type: str, backend: str, *, recorded: bool = True, **options: Any) -> LLM:
    options = zoo.with_defaults(
        {"attention": backend, "record_decodes": recorded, "max_seqs": 7, **options}
    )
    llm = LLM(zoo.tiny_model(model_type), device="cpu", **options)
    if recorded:
        record_by_rerun(llm)
    return llm


def _graphs(llm: LLM) -> DecodeRecordings:
    graphs = llm.engine.runner.recordings
    assert graphs is not None
    return graphs


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gpt_oss", "gpt2"])
def test_replayed_steps_give_the_tokens_of_generate(
    flash_standin: str,
    model_type: str,
) -> None:
    with _open(model_type, flash_standin, max_batch_tokens=24) as llm:
        zoo.check_generate(
            llm, model_type, [5, 40, 1, 17, 16, 9, 30, 22, 3], [30, 9, 17, 1, 40, 12, 3, 25, 33]
        )
        assert _graphs(llm).num_replays > 20
        assert {size for size, _ in _graphs(llm)._recordings} >= {1, 2, 4, 7}


def test_recordings_are_made_once_and_their_tensors_stay(flash_standin: str) -> None:
    with _open("llama", flash_standin) as llm:
        zoo.check_generate(llm, "llama", [5, 9, 12], [20, 20, 20])
        recordings = dict(_graphs(llm)._recordings)
        where = {key: r.inputs._buffer.data_ptr() for key, r in recordings.items()}
        zoo.check_generate(llm, "llama", [7, 3, 18], [20, 20, 20])
        assert _graphs(llm)._recordings == recordings
        assert where == {key: r.inputs._buffer.data_ptr() for key, r in recordings.items()}
        assert llm.stats().num_recordings == len(recordings) == 1
        assert llm.stats().num_replays == _graphs(llm).num_replays == 2 * 19


def test_longer_contexts_have_recordings_of_their_own(
    flash_standin: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vkv.runtime.execution.recordings._SHORTEST", 16)
    with _open("gpt_oss", flash_standin) as llm:  # whose window is 13: below, at and above a bound
        zoo.check_generate(llm, "gpt_oss", [3, 10, 60], [40, 30, 20])
        assert {length for _, length in _graphs(llm)._recordings} == {64, 256}
        zoo.check_generate(llm, "gpt_oss", [4], [30])
        assert {length for _, length in _graphs(llm)._recordings} == {16, 64, 256}


def test_padding_writes_where_nobody_reads_or_what_its_request_writes(
    flash_standin: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int, int]] = []  # where padding wrote, rows mapped, the request's token
    run = DecodeRecordings.run

    def spy(self: DecodeRecordings, batch: Batch, last_tokens: Any = None) -> Any:
        padding = batch.padding or recordings._repeated(batch)[0]
        (own,) = (item.start for item in batch.items if item.request.slot is padding.slot)
        seen.append((padding.write_at, padding.slot.num_tokens, own))
        return run(self, batch, last_tokens)

    monkeypatch.setattr(DecodeRecordings, "run", spy)
    # All at the same length, and nothing mapped ahead: at the end of a row no slot has another.
    with _open("llama", flash_standin, look_ahead_tokens=0, max_parked=0) as llm:
        zoo.check_generate(llm, "llama", [10, 10, 10], [40, 40, 40])
        assert {write_at - own for write_at, _, own in seen} == {0, 1}
        assert all(write_at < backed for write_at, backed, _ in seen)


def test_preemption_and_sampling_go_on_as_without_recordings(flash_standin: str) -> None:
    prompts = zoo.random_prompts([20, 31, 12, 25, 8, 17])
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=i, max_tokens=60, ignore_eos=True)
        for i in range(len(prompts))
    ]
    outputs = []
    for recorded in (True, False):
        with _open("llama", flash_standin, recorded=recorded, kv_memory=20 * 4096) as llm:
            outs = llm.generate(prompts, params)
            assert llm.stats().num_preemptions
            assert bool(llm.stats().num_replays) is recorded
            llm.engine.cache.check_invariants()
            zoo.assert_idle(llm)
        outputs.append([out.outputs[0].token_ids for out in outs])
    assert outputs[0] == outputs[1]


class _Refusing:
    pads = True
    refusal_level = logging.WARNING

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    def forget(self) -> None:
        pass


def test_a_model_that_cannot_be_recorded_runs_without(
    flash_standin: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with _open("llama", flash_standin) as llm:
        graphs = _graphs(llm)
        graphs.recorder = _Refusing()
        with caplog.at_level(logging.WARNING):
            zoo.check_generate(llm, "llama", [5, 12], [10, 10])
        assert "not permitted" in (graphs.refused or "")
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert llm.stats().num_recordings == llm.stats().num_replays == 0


def test_scores_of_prompts_and_single_token_prompts(flash_standin: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1)
    tables = []
    for recorded in (True, False):
        with _open("llama", flash_standin, recorded=recorded) as llm:
            outs = llm.generate([[3], [3, 4, 5]], params)
        tables.append([(out.prompt_logprobs, out.outputs[0].logprobs) for out in outs])
    assert repr(tables[0])[:40] == repr(tables[1])[:40]
    for with_graphs, without in zip(*tables, strict=True):
        assert with_graphs[0] is not None
        assert [set(table) for table in with_graphs[1]] == [set(table) for table in without[1]]


def test_asking_for_what_cannot_be_recorded_is_refused() -> None:
    for model_type, options, why in (
        ("llama", {"attention": "sdpa"}, "'sdpa' cannot be recorded"),
        ("llama", {"kv": "paged"}, "paged cache"),
        ("lfm2", {}, "state"),
    ):
        with pytest.raises(InvalidConfig, match=why):
            LLM(
                zoo.tiny_model(model_type),
                device="cpu",
                record_decodes=True,
                **zoo.with_defaults(options),
            )
    with pytest.raises(InvalidConfig, match="record_decodes is"):
        LLM(zoo.tiny_model("llama"), device="cpu", record_decodes=1.5)


def test_nothing_is_recorded_against_the_users_wish() -> None:
    with LLM(
        zoo.tiny_model("llama"), device="cpu", record_decodes=False, **zoo.with_defaults({})
    ) as llm:
        assert llm.engine.runner.recordings is None
        why = why_not_recorded(llm.loaded, llm.config, llm.engine.runner.backend)
        assert why == "record_decodes is False"


# -- how CUDA is asked to record, without CUDA -----------------------------------------------------


class _Card:
    """Stands for what `CudaRecorder` asks of PyTorch, and writes it down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails_at_end = False

        class Graph:
            capture_begin = self._noted("begin")
            replay = self._noted("replay")

            @staticmethod
            def capture_end() -> None:
                self.calls.append("end")
                if self.fails_at_end:
                    raise RuntimeError("operation failed due to a previous error during capture")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "device": lambda index: nullcontext(),
            "Stream": lambda: stream,
            "stream": lambda one: nullcontext(),
            "current_stream": lambda: stream,
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: (0, 1),
            "CUDAGraph": Graph,
            "synchronize": self._noted("synchronize"),
            "empty_cache": self._noted("empty"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, self._noted(name), raising=False)

    def _noted(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append(name)

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        recorder = recordings.CudaRecorder(torch.device("cpu"), nullcontext)
        return recorder.record(lambda: (self.calls.append("run"), run())[1])


def test_a_recording_waits_for_nothing_and_empties_no_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = _Card(monkeypatch)
    replay = card.record(lambda: torch.ones(2))
    assert replay().tolist() == [1, 1]
    assert card.calls == ["run", "run", "begin", "run", "end", "replay"]


@pytest.mark.parametrize(
    "look",
    [
        lambda: torch.arange(4) if torch.ones(3).sum() > 2 else torch.arange(3),
        lambda: torch.full((3,), torch.ones(1).item()),
        lambda: torch.ones(4).nonzero(),
        lambda: torch.ones(4)[torch.ones(4) > 0],
    ],
    ids=["branch", "item", "nonzero", "mask"],
)
def test_a_model_that_looks_at_numbers_is_refused_before_a_capture_begins(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[], torch.Tensor]
) -> None:
    """A capture that it breaks would stay under way in PyTorch's allocator."""
    card = _Card(monkeypatch)
    with pytest.raises(recordings.Unrecordable, match="waits for the device"):
        card.record(look)
    assert card.calls == ["run", "run"]


def test_a_capture_that_fails_is_ended_with_the_allocator_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = _Card(monkeypatch)
    card.fails_at_end = True
    with pytest.raises(RuntimeError, match="during capture"):
        card.record(lambda: torch.ones(2))
    assert card.calls[-3:] == ["end", "_cuda_endAllocateToPool", "_cuda_releasePool"]


def test_where_memory_is_short_caches_are_emptied_and_it_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = _Card(monkeypatch)
    shortages = [False, True, False, False]

    def run() -> torch.Tensor:
        if shortages.pop():
            raise torch.OutOfMemoryError("no")
        return torch.ones(2)

    card.record(run)
    once = ["begin", "run", "end"]
    assert card.calls == ["run", "run", *once, "synchronize", "empty", *once]


def test_no_context_is_recorded_in_less_than_half_the_parts_that_it_wants() -> None:
    for max_len in (100, 1024, 3000, 4096, 5000, 131_072):
        lengths = recordings._lengths(max_len)
        assert lengths[-1] == max_len
        assert all(b <= 2 * a for a, b in pairwise(lengths) if a >= 4096)
        assert lengths == sorted({*lengths})
    assert recordings._lengths(131_072) == [1024, 4096, *(4096 << i for i in range(1, 6))]


# -- adapters -------------------------------------------------------------------------------------


def test_padded_recordings_serve_any_adapters(flash_standin: str, tmp_path: Path) -> None:
    """Rows of padding are nobody's, whoever had them the last time."""
    model = zoo.tiny_model("llama")
    for number in range(2):
        save_adapter(tmp_path / f"{number}", model, seed=number)
    prompts = zoo.random_prompts([5, 9, 12, 7, 20])
    names = [None, "a", "b", "a", None]
    tokens = []
    for recorded in (False, True):
        with _open("llama", flash_standin, recorded=recorded) as llm:
            for number, name in enumerate("ab"):
                llm.load_adapter(name, tmp_path / f"{number}")
            for count in (5, 3):
                outs = llm.generate(prompts[:count], zoo.greedy(14), adapter=names[:count])
                tokens.append([out.outputs[0].token_ids for out in outs])
            if recorded:
                assert {size for size, _ in _graphs(llm)._with_adapters} >= {4, 7}
    assert tokens[:2] == tokens[2:]


def test_padding_writes_nothing_of_the_model_alone_for_who_has_an_adapter(
    flash_standin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no slot has a place for padding, it would repeat a request, and without its adapter."""
    save_adapter(tmp_path / "a", zoo.tiny_model("llama"), seed=1)
    prompts = zoo.random_prompts([10, 10, 10])
    without_place: list[bool] = []  # of each step, whether it was replayed
    run = DecodeRecordings.run

    def spy(self: DecodeRecordings, batch: Batch, last_tokens: Any = None) -> Any:
        logits = run(self, batch, last_tokens)
        if batch.padding is None:
            without_place.append(logits is not None)
        return logits

    monkeypatch.setattr(DecodeRecordings, "run", spy)
    options = {"look_ahead_tokens": 0, "max_parked": 0}
    tokens = []
    for recorded in (False, True):
        with _open("llama", flash_standin, recorded=recorded, **options) as llm:
            llm.load_adapter("a", tmp_path / "a")
            outs = llm.generate(prompts, zoo.greedy(60), adapter="a")
            tokens.append([out.outputs[0].token_ids for out in outs])
    assert tokens[0] == tokens[1]
    assert without_place
    assert not any(without_place)


class _PooledRerun(Rerun):
    """Recordings share a pool, as PyTorch's allocator has it: once the last that uses it is gone,
    none can be made under its name (`TORCH_INTERNAL_ASSERT(it->second->use_count > 0)`)."""

    def __init__(self) -> None:
        self._users: weakref.WeakSet[Any] | None = None

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if self._users is None:
            self._users = weakref.WeakSet()
        elif not self._users:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")

        def replay() -> torch.Tensor:
            return run()

        self._users.add(replay)
        return replay

    def forget(self) -> None:
        self._users = None


def test_steps_are_recorded_again_after_the_last_recording_went(
    flash_standin: str, tmp_path: Path
) -> None:
    """Adapters that act on further modules make those of before useless, and here there are no
    others."""
    model = zoo.tiny_model("llama")
    save_adapter(tmp_path / "a", model, endings=("q_proj",))
    save_adapter(tmp_path / "b", model, endings=("up_proj",))
    with _open("llama", flash_standin) as llm:
        graphs = _graphs(llm)
        graphs.recorder = _PooledRerun()
        for name in "ab":
            llm.load_adapter(name, tmp_path / name)
            llm.generate([[1, 2, 3]], zoo.greedy(8), adapter=name)
            assert graphs.refused is None
            assert graphs._with_adapters
            assert not graphs._recordings
