"""Decode steps recorded on a CPU: what is kept, what is refused, what replays come to."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from vkv import LLM
from vkv.attention_backends.native import NativeBackend
from vkv.runtime.cpu_kernels.kernels import RmsNorm
from vkv.runtime.execution.recordings import DecodeRecordings, Unrecordable
from vkv.runtime.execution.tape import TapeRecorder

pytestmark = pytest.mark.skipif(
    NativeBackend.unavailable_reason() is not None, reason="no C compiler, no built kernels"
)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.inference_mode():
        yield


def _open(model_type: str, **options: Any) -> LLM:
    options = zoo.with_defaults({"max_seqs": 7, **options})
    return LLM(zoo.tiny_model(model_type), device="cpu", pack_weights=True, **options)


def _graphs(llm: LLM) -> DecodeRecordings:
    graphs = llm.engine.runner.recordings
    assert graphs is not None
    return graphs


# -- in the engine -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "phi3"])
def test_replayed_steps_give_the_tokens_of_generate(model_type: str) -> None:
    with _open(model_type, max_batch_tokens=24) as llm:
        zoo.check_generate(
            llm, model_type, [5, 40, 1, 17, 16, 9, 30, 22, 3], [30, 9, 17, 1, 40, 12, 3, 25, 33]
        )
        graphs = _graphs(llm)
        assert graphs.refused is None
        assert graphs.num_replays > 20
        assert {size for size, _ in graphs._recordings} >= {1, 3, 5, 6}  # none is padded


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_models_that_look_at_their_numbers_run_without(model_type: str) -> None:
    with _open(model_type) as llm:
        zoo.check_generate(llm, model_type, [5, 12], [10, 10])
        assert "depends on what tensors hold" in (_graphs(llm).refused or "")
        assert llm.stats().num_replays == 0


def test_a_step_is_one_call_but_for_what_no_kernel_does() -> None:
    with _open("llama") as llm:
        zoo.check_generate(llm, "llama", [5, 12], [10, 10])
        (recording,) = (r for (size, _), r in _graphs(llm)._recordings.items() if size == 2)
        parts = recording.replay._parts  # type: ignore[attr-defined]
        layers = llm.loaded.model.config.num_hidden_layers
        runs = [len(part._calls) for part in parts if hasattr(part, "_calls")]
        assert sum(runs) >= 7 * layers  # norms, rotary, stores, attention, residuals
        assert len(parts) < 16 * layers


def test_contexts_that_outgrow_the_workspace() -> None:
    with _open("llama", max_len=512, page_bytes=1 << 16) as llm:
        zoo.check_generate(llm, "llama", [3], [400])
        assert llm.stats().num_replays == 399


def test_the_number_of_threads_may_change() -> None:
    before = torch.get_num_threads()
    try:
        with _open("llama") as llm:
            for threads in (1, 3, 2):
                torch.set_num_threads(threads)
                zoo.check_generate(llm, "llama", [5, 9], [12, 12])
    finally:
        torch.set_num_threads(before)


def test_closing_gives_the_pool_back() -> None:
    with _open("llama") as llm:
        zoo.check_generate(llm, "llama", [5, 9], [12, 12])
        recorder = _graphs(llm).recorder
        assert recorder._pool._stretches  # type: ignore[attr-defined]
    assert not recorder._pool._stretches  # type: ignore[attr-defined]


# -- on its own ----------------------------------------------------------------------------------


def _replays(run: Callable[[], torch.Tensor], inputs: torch.Tensor) -> None:
    """Record with some numbers, replay with others."""
    replay = TapeRecorder().record(run)
    assert torch.equal(replay(), run())
    for seed in range(3):
        inputs.copy_(torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed)))
        expected = run().clone()
        assert torch.equal(replay(), expected)


def test_operations_of_pytorch_are_made_again() -> None:
    x = torch.randn(6, 8)
    weight = torch.randn(8, 8)

    def run() -> torch.Tensor:
        y = x.view(3, 2, 8).transpose(0, 1).reshape(6, 8) @ weight
        left, right = y.split(4, dim=-1)
        y = torch.cat((right, left.cos()), dim=-1)
        y.mul_(2).add_(x)
        top, _ = y.topk(3)
        filled = torch.empty(6, 3)
        filled.copy_(top)
        filled[:2] = 7.0
        return (filled[:, None] + y.new_zeros(6, 2, 3)).flatten(1)

    _replays(run, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_operations_keep_their_order(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64, dtype=dtype)
    norm = RmsNorm(torch.randn(64).to(dtype), 1e-5, 0.0)

    def run() -> torch.Tensor:
        y = x
        for _ in range(4):
            y = y + norm(y)  # a kernel's
            y = norm(y * 3)  # PyTorch's, then a kernel's
        return y

    _replays(run, x)


def test_memory_is_used_again_within_a_step_and_by_the_next_recording() -> None:
    recorder = TapeRecorder()
    inputs = {rows: torch.randn(rows, 4096) for rows in (8, 6, 5)}
    norm = RmsNorm(torch.ones(4096), 1e-5, 0.0)

    def run(rows: int) -> torch.Tensor:
        y = inputs[rows]
        for _ in range(20):
            y = norm(y)
        return y

    replays = {}
    for rows in inputs:
        replays[rows] = recorder.record(lambda rows=rows: run(rows))
        assert torch.equal(replays[rows](), run(rows))
    held = sum(s.nbytes for group in recorder._pool._stretches.values() for s in group)
    assert held <= 3 * inputs[8].nbytes
    for rows, replay in replays.items():
        inputs[rows].neg_()
        assert torch.equal(replay(), run(rows))


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (lambda x: x[x > 0], "depends on what tensors hold"),
        (lambda x: x * x.sum().item(), "depends on what tensors hold"),
        (lambda x: x if x.sum() > 0 else -x, "not a tensor"),
        (lambda x: torch.cat([p * 2 for p in x.split(x[0].int().tolist())]), "tolist"),
        (lambda x: x + float(x.numpy().sum()), "numpy"),
        (lambda x: x.repeat_interleave(x[0].int(), dim=0), "depends on what tensors hold"),
        (lambda x: x + torch.rand_like(x), "random"),
        (lambda x: x, "no result"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    look: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    x = torch.ones(4, 4)
    with pytest.raises(Unrecordable, match=why):
        TapeRecorder().record(lambda: look(x))
    assert torch.equal(RmsNorm(torch.ones(4), 1e-5, 0.0)(x), x / (1 + 1e-5) ** 0.5)  # unwatched


def test_numbers_that_python_kept_are_found_out() -> None:
    x, factor = torch.ones(4, 4), [1.0]
    replay = TapeRecorder().record(lambda: x * factor[0])
    replay()
    factor[0] = 2.0
    with pytest.raises(Unrecordable, match="other logits"):
        replay()


def test_kernels_of_other_threads_are_not_recorded() -> None:
    x = torch.randn(2, 64)
    norm, other = (RmsNorm(torch.full((64,), f), 1e-5, 0.0) for f in (1.0, 2.0))

    def elsewhere() -> None:
        for _ in range(5):
            other(torch.ones(2, 64))

    def run() -> torch.Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return norm(x)

    replay = TapeRecorder().record(run)
    assert [len(part._calls) for part in replay._parts] == [1]  # type: ignore[attr-defined]
    for _ in range(2):
        assert torch.equal(replay(), norm(x))


def test_two_threads_record_at_once() -> None:
    meeting = threading.Barrier(2, timeout=30)
    came_to: dict[int, bool] = {}

    def record(factor: int) -> None:
        with torch.inference_mode():
            x = torch.randn(2, 64)
            norm = RmsNorm(torch.full((64,), float(factor)), 1e-5, 0.0)

            def run() -> torch.Tensor:
                meeting.wait()  # both are within a recording
                return norm(norm(x))

            replay = TapeRecorder().record(run)
            parts = [len(part._calls) for part in replay._parts]  # type: ignore[attr-defined]
            replay()
            x.neg_()
            came_to[factor] = parts == [2] and torch.equal(replay(), norm(norm(x)))

    threads = [threading.Thread(target=record, args=(factor,)) for factor in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came_to == {1: True, 2: True}


def test_a_tensor_that_the_model_keeps_is_not_overwritten() -> None:
    x, kept = torch.ones(4, 4), []

    def run() -> torch.Tensor:
        kept.append(x * 3)
        return kept[-1] + 1

    with pytest.raises(Unrecordable, match="kept"):
        TapeRecorder().record(run)


def test_a_model_with_hooks_runs_them_every_step() -> None:
    model, calls = zoo.tiny_model("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        assert llm.engine.runner.recordings is None
        calls.clear()
        llm.generate([[3, 4, 5]], zoo.greedy(6))
    assert len(calls) == 6
