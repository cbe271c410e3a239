"""`kv_memory="auto"` on a GPU: a step is run to see what it takes, and what is left is for KV."""

import pytest
import torch
import zoo
from vkv import LLM
from vkv.runtime.memory_profile import memory_for_kv, profile_step

_GIB = 1 << 30


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_oss", "deepseek_v3", "lfm2"])
def test_a_step_of_any_size_runs_without_keys_and_values(model_type: str) -> None:
    model = zoo.tiny_model(model_type)
    with LLM(model, device="cpu", **zoo.with_defaults({"max_seqs": 3, "max_parked": 2})) as llm:
        loaded = llm._loaded
        state_bytes = profile_step(loaded, 3 * loaded.max_positions // 2, 8)
        assert llm.stats().physical_bytes == 0
        llm.generate([1, 2, 3], zoo.greedy(4))
        assert state_bytes * 5 == llm.stats().state_bytes
        assert bool(state_bytes) == loaded.keeps_state


def test_the_largest_step_and_some_headroom_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []

    def profile(loaded: object, num_tokens: int, num_seqs: int) -> int:
        ran.append((num_tokens, num_seqs))
        return 1 << 20

    monkeypatch.setattr("vkv.runtime.memory_profile.profile_step", profile)
    # What is free is asked for when the step's own memory has been taken.
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: ((60 - 5 * len(ran)) * _GIB, 80 * _GIB)
    )
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        found = memory_for_kv(llm._loaded, max_batch_tokens=2048, max_seqs=8, num_slots=16)
    assert ran == [(2048, 8)]
    assert found == 55 * _GIB - int(0.04 * 80 * _GIB) - (16 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 8 * _GIB))
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        assert memory_for_kv(llm._loaded, max_batch_tokens=1, max_seqs=1, num_slots=1) == 0
