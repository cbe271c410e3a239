"""`kv_memory="auto"` on a GPU: a step is run to see what it takes, and what is left is for KV."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from quantized import quantize_folder
from torch._subclasses.fake_tensor import FakeTensor
from vkv import LLM
from vkv.allocator import parse_bytes
from vkv.runtime.engine.memory.memory_profile import memory_for_kv, profile_step
from vkv.vmem import janitor, linux

_GIB = 1 << 30


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_oss", "deepseek_v3", "lfm2"])
def test_a_step_of_any_size_runs_without_keys_and_values(model_type: str) -> None:
    model = zoo.tiny_model(model_type)
    with LLM(model, device="cpu", **zoo.with_defaults({"max_seqs": 3, "max_parked": 2})) as llm:
        loaded = llm.loaded
        state_bytes = profile_step(loaded, 3 * loaded.max_positions // 2, 8)
        assert llm.stats().physical_bytes == 0
        llm.generate([1, 2, 3], zoo.greedy(4))
        assert state_bytes * 5 == llm.stats().state_bytes
        assert bool(state_bytes) == loaded.keeps_state


@pytest.mark.parametrize("model_type", zoo.HYBRIDS)
def test_the_profile_of_a_hybrid_has_all_that_a_step_has(model_type: str) -> None:
    """The longest chunk with few rows of logits, and the states of all decodes."""
    shapes: list[tuple[int, ...]] = []
    states: list[int] = []

    def note(_: object, __: object, named: dict[str, Any], output: Any) -> None:
        shapes.append(tuple(output.logits.shape))
        states.append(sum(t.nbytes for t in named["past_key_values"].states().values()))

    with LLM(zoo.tiny_model(model_type), device="cpu", **zoo.with_defaults({})) as llm:
        loaded = llm.loaded
        loaded.model.register_forward_hook(note, with_kwargs=True)
        state_bytes = profile_step(loaded, 40, 6)
    assert shapes == [(1, 6, zoo.VOCAB_SIZE), (6, 1, zoo.VOCAB_SIZE)]
    assert states == [state_bytes, 6 * state_bytes]


def test_the_largest_step_and_some_headroom_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []

    def profile(loaded: object, num_tokens: int, num_seqs: int) -> int:
        ran.append((num_tokens, num_seqs))
        return 1 << 20

    monkeypatch.setattr("vkv.runtime.engine.memory.memory_profile.profile_step", profile)
    # What is free is asked for when the step's own memory has been taken.
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: ((60 - 5 * len(ran)) * _GIB, 80 * _GIB)
    )
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        found = memory_for_kv(llm.loaded, max_batch_tokens=2048, max_seqs=8, num_slots=16)
    assert ran == [(2048, 8)]
    assert found == 55 * _GIB - int(0.04 * 80 * _GIB) - (16 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 8 * _GIB))
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        assert memory_for_kv(llm.loaded, max_batch_tokens=1, max_seqs=1, num_slots=1) == 0


def _tensor_bytes() -> int:
    """Bytes of all tensors that are held anywhere in this process, shared memory counted once."""
    gc.collect()
    assert janitor.drain()  # of what other tests have dropped
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    tensors = [one for one in tensors if not isinstance(one, FakeTensor)]  # which have none
    storages = [one.untyped_storage() for one in tensors if one.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_what_4_bit_weights_save_is_for_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that holds the tensors of this process, and nothing else."""
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: (8 * _GIB - _tensor_bytes(), 8 * _GIB)
    )
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = zoo.tiny_model("llama", dtype=torch.bfloat16, **sizes)
    model.save_pretrained(tmp_path / "source")
    linear_bytes = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    limits, weights = [], []
    for folder in quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=128):
        with LLM(folder, device="cpu", pack_weights=False, kv_memory="1MiB") as llm:
            limits.append(memory_for_kv(llm.loaded, max_batch_tokens=64, max_seqs=4, num_slots=4))
            weights.append(llm.loaded.weight_bytes)
        del llm
    gained, saved = limits[0] - limits[1], weights[1] - weights[0]
    assert saved > 0.4 * linear_bytes  # most of it, where one kernel takes all batches
    assert gained == pytest.approx(saved, rel=0.02), "no copy of the weights is left behind"


@pytest.mark.parametrize("kv_memory", ["64MiB", "200GiB", "100TB"])
def test_a_generous_limit_makes_no_larger_pages(
    kv_memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(zoo.tiny_model("llama"), device="cpu", max_len=256, kv_memory=kv_memory) as llm:
        llm.generate([1, 2, 3], zoo.greedy(4))
        stats = llm.stats()
        cache = llm.engine.cache
        most = cache.num_slots * cache.num_pages(256)
    assert stats.page_bytes == 16 << 10
    assert stats.physical_bytes < 1 << 20
    assert stats.pages_limit == most
    warned = [r for r in caplog.records if "kv_memory" in r.getMessage()]
    assert bool(warned) == (parse_bytes(kv_memory) > linux.available_bytes())
