"""The engine on a GPU: same tokens, same logits, recorded steps, memory that comes and goes."""

import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from vkv import LLM, MemoryLimit, SamplingParams
from vkv.runtime.execution.model_runner import ModelRunner

pytestmark = pytest.mark.gpu

_LENGTHS = [5, 40, 1, 17, 90, 9, 30, 22]
_COUNTS = [30, 9, 17, 1, 20, 40, 12, 3]
_SHAPES = ["llama", "qwen3", "gemma2", "gpt_oss"]
_NEAR_BYTES = 32 << 20  # `nvidia-smi` counts in MiB, and all of the card where it names no process


@contextmanager
def _open(
    model_type: str, dtype: torch.dtype, changes: dict[str, Any] | None = None, **options: Any
) -> Iterator[LLM]:
    model = zoo.tiny_model(model_type, dtype=dtype, **(changes or {}))
    defaults = {"max_seqs": 6, "max_len": 256, "kv_memory": "256MiB", "max_batch_tokens": 48}
    with LLM(model, device="cuda", **{**defaults, **options}) as llm:
        yield llm
        llm.engine.cache.check_invariants()


def _generate(llm: LLM) -> list[list[int]]:
    prompts = zoo.random_prompts(_LENGTHS)
    outs = llm.generate(prompts, [zoo.greedy(count) for count in _COUNTS])
    zoo.assert_idle(llm)
    return [list(out.outputs[0].token_ids) for out in outs]


def _free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _smi_bytes() -> int:
    """What this process has on the card; all that is used there if its number is not known there.

    In a container, `nvidia-smi` lists processes by numbers that they do not see, or none.
    """
    query = [
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
        "--format=csv,noheader,nounits",
    ]
    listed = _smi("--query-compute-apps=pid,used_memory", *query)
    for line in listed.splitlines():
        pid, _, used = line.partition(",")
        if pid.strip() == str(os.getpid()) and used.strip().isdecimal():
            return int(used) << 20
    return int(_smi("--query-gpu=memory.used", *query)) << 20


def _smi(*arguments: str) -> str:
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("model_type", _SHAPES)
def test_tokens_are_those_of_generate_in_fp32(model_type: str) -> None:
    reference = zoo.tiny_model(model_type).cuda()
    with _open(model_type, torch.float32) as llm:
        assert llm.attention_backend == "sdpa"
        outputs = _generate(llm)
    for prompt, count, got in zip(zoo.random_prompts(_LENGTHS), _COUNTS, outputs, strict=True):
        expected = zoo.generate_alone(reference, prompt, count)
        assert got == expected, zoo.explain_difference(reference, prompt, got, expected)


@pytest.mark.parametrize("model_type", _SHAPES)
def test_logits_are_those_of_a_plain_forward_in_bf16(model_type: str) -> None:
    """Each output token's score, within what bfloat16 moves it by between two batch shapes.

    Which of several experts a token goes to may turn on a rounding, so here it goes to all.
    """
    changes = {"num_experts_per_tok": 4} if model_type == "gpt_oss" else {}
    reference = zoo.tiny_model(model_type, dtype=torch.bfloat16, **changes).cuda()
    exact = zoo.tiny_model(model_type, **changes).cuda()
    prompts = zoo.random_prompts(_LENGTHS)
    with _open(model_type, torch.bfloat16, changes) as llm:
        params = [zoo.greedy(count, logprobs=1) for count in _COUNTS]
        outs = llm.generate(prompts, params)
    zoo.check_scores(prompts, outs, reference, exact)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_oss"])
def test_a_replay_computes_what_the_kernels_compute_one_by_one(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    both = ModelRunner._compute

    def run(
        self: ModelRunner, batch: Any, ends: Any, rows: Any, last_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        replays = self.recordings.num_replays if self.recordings else 0
        logits = both(self, batch, ends, rows, last_tokens)
        if self.recordings and self.recordings.num_replays > replays:
            logits = logits.clone()  # and below, the same keys and values are written again
            eager = self._run(batch.items, ends, rows, last_tokens)
            scale = eager.abs().max().item()
            torch.testing.assert_close(logits, eager, atol=0.03 * scale, rtol=0)
            compared.append(len(batch))
        return logits

    monkeypatch.setattr(ModelRunner, "_compute", run)
    with _open(model_type, torch.bfloat16) as llm:
        assert llm.attention_backend == "torch_flash"
        _generate(llm)
        graphs = llm.engine.runner.recordings
        assert graphs is not None
        assert graphs.refused is None
        assert llm.stats().num_recordings >= 3
    assert set(compared) >= {1, 2, 5, 6}  # with padding and without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_waits_for_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ModelRunner.logits

    def strict(self: ModelRunner, *args: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ModelRunner, "logits", strict)
    with _open("llama", dtype, record_decodes=False) as llm:
        _generate(llm)


@pytest.mark.parametrize(("overlap", "num_waits"), [(False, 1), (True, 0)])
def test_a_greedy_step_waits_for_its_tokens_alone(overlap: bool, num_waits: int) -> None:
    """And with overlap for an event, in which PyTorch sees no synchronisation."""
    with _open("llama", torch.bfloat16, overlap=overlap) as llm:
        _generate(llm)  # recordings exist
        zoo.add(llm.engine, "0", [1, 2, 3], zoo.greedy(30))
        for _ in range(3):
            llm.engine.step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                llm.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        while llm.engine.has_work:
            llm.engine.step()
    waits = [one for one in caught if "synchronizing" in str(one.message)]
    assert len(waits) == num_waits


@pytest.mark.parametrize("record_decodes", [False, None])
def test_overlap_changes_no_token(record_decodes: bool | None) -> None:
    outputs = []
    for overlap in (False, True):
        options = {
            "overlap": overlap,
            "record_decodes": record_decodes,
            "max_seqs": 8,
        }  # so none waits
        with _open("llama", torch.bfloat16, **options) as llm:
            outputs.append(_generate(llm))
    assert outputs[0] == outputs[1]


def test_a_steady_load_makes_next_to_no_driver_calls() -> None:
    with _open("llama", torch.bfloat16, max_parked=6) as llm:
        for seed in (0, 1):
            llm.generate(zoo.random_prompts([40] * 6, seed=seed), zoo.greedy(60))
        before = llm.stats()
        llm.generate(zoo.random_prompts([40] * 6, seed=2), zoo.greedy(60))
        after = llm.stats()
    steps = after.num_steps - before.num_steps
    changed = ("map", "unmap", "set_access", "create", "release")
    calls = sum(after.driver_calls.get(k, 0) - before.driver_calls.get(k, 0) for k in changed)
    assert steps >= 60
    assert calls <= steps


def test_seeds_give_the_tokens_of_the_cpu() -> None:
    params = SamplingParams(temperature=0.9, top_p=0.8, seed=3, max_tokens=30, ignore_eos=True)
    prompts = zoo.random_prompts([12, 30])
    tokens = []
    for device in ("cpu", "cuda"):
        with LLM(zoo.tiny_model("llama"), device=device, max_len=256, kv_memory="64MiB") as llm:
            outs = llm.generate(prompts, params)
            tokens.append([out.outputs[0].token_ids for out in outs])
    assert tokens[0] == tokens[1]


def test_memory_is_taken_with_use_and_goes_back() -> None:
    with _open("llama", torch.bfloat16, kv_memory="auto", max_len=512, max_seqs=64) as llm:
        assert llm.stats().physical_bytes == 0
        limit = llm.stats().pages_limit * llm.stats().page_bytes
        assert 0 < limit < torch.cuda.mem_get_info()[0]
        _generate(llm)
        full = _free_bytes()
        held = llm.stats().physical_bytes
        assert held > 0
        assert llm.trim() == held
        returned = _free_bytes() - full  # and the driver's tables of pages, if it gives any back
        assert held <= returned <= held + _NEAR_BYTES


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs nvidia-smi")
def test_nvidia_smi_agrees_that_memory_comes_and_goes() -> None:
    """Pages of 16 MiB, one for each request at least; a request that runs keeps the rest there."""
    options = {"page_bytes": 16 << 20, "kv_memory": "1GiB", "max_seqs": 40, "idle_trim_s": 0.1}
    with _open("llama", torch.bfloat16, **options) as llm:
        for _ in range(2):  # at first recordings and workspaces are made, which stay
            _wait_for_return(llm)
            free, used = _free_bytes(), _smi_bytes()
            running = llm.stream([1, 2, 3], zoo.greedy(200))
            next(running)
            llm.generate(zoo.random_prompts([9] * 36), zoo.greedy(9))
            taken, shown = free - _free_bytes(), _smi_bytes() - used
            held = llm.stats().physical_bytes
            list(running)
        assert held >= 36 * (16 << 20)
        assert held <= taken <= held + _NEAR_BYTES
        assert abs(shown - taken) <= _NEAR_BYTES
        _wait_for_return(llm)
        assert abs(free - _free_bytes()) <= _NEAR_BYTES
        assert abs(_smi_bytes() - used) <= _NEAR_BYTES


def _wait_for_return(llm: LLM) -> None:
    deadline = time.monotonic() + 20  # a failure, not a measure of speed
    while llm.stats().physical_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sleep_gives_memory_and_weights_back_and_wakes_the_same() -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096}
    model = zoo.tiny_model("llama", dtype=torch.bfloat16, **sizes)
    with LLM(model, device="cuda", max_len=256, kv_memory="256MiB", max_seqs=6) as llm:
        expected = _generate(llm)
        recorded = llm.stats().num_recordings
        held, free = llm.stats().physical_bytes, _free_bytes()
        assert llm.sleep() == held
        assert _free_bytes() - free >= held
        llm.wake()
        assert _generate(llm) == expected
        assert llm.stats().num_recordings == recorded > 0
        free, weight_bytes = _free_bytes(), llm.loaded.weight_bytes
        assert llm.sleep(weights=True) >= weight_bytes > 20 << 20
        assert _free_bytes() - free >= 0.9 * weight_bytes
        assert llm.stats().num_recordings == 0
        llm.wake()
        assert _generate(llm) == expected
        assert llm.stats().num_recordings > 0


def test_two_engines_share_a_limit_on_the_card() -> None:
    limit = MemoryLimit("24MiB")
    with (
        _open("llama", torch.bfloat16, kv_memory=limit) as one,
        _open("llama", torch.bfloat16, kv_memory=limit) as two,
    ):
        for llm in (one, two, one):
            _generate(llm)
            held = one.stats().physical_bytes + two.stats().physical_bytes
            assert 0 < held <= limit.taken_bytes <= 24 << 20
