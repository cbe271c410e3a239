"""`repeatable=True`: a request's tokens are its own to the bit, or the model is refused."""

import ctypes

import pytest
import repeatable
import torch
import zoo
from vkv import LLM
from vkv.attention_backends import native
from vkv.attention_backends.native import NativeBackend
from vkv.quant.kernels import native as int4_native
from vkv.runtime.cpu_kernels import kernels as native_kernels
from vkv.vmem.errors import InvalidConfig

pytestmark = pytest.mark.skipif(
    NativeBackend.unavailable_reason() is not None, reason="no C compiler, no built kernels"
)


@pytest.mark.parametrize("in_4_bits", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("name", repeatable.MODELS)
def test_the_same_tokens_whatever_else_runs(name: str, in_4_bits: bool) -> None:
    """Alone and in batches, chunks, threads, after prefixes and preemption: bfloat16."""
    repeatable.check(name, torch.bfloat16, in_4_bits=in_4_bits, count=12)


def test_floats_too() -> None:
    repeatable.check("llama", torch.float32, in_4_bits=False, count=12)


@pytest.mark.parametrize(
    ("model_type", "options", "why"),
    [
        ("gpt2", {}, "c_attn computes aten.addmm"),
        ("llama", {"attention": "sdpa"}, "backend 'sdpa' sums in an order"),
        ("llama", {"kv": "paged", "attention": "paged_sdpa"}, "backend 'paged_sdpa' sums"),
        ("qwen3_next", {}, "recurrent state"),
        ("llama", {"pack_weights": False}, "leave pack_weights None"),
    ],
)
def test_where_it_does_not_hold_it_is_refused(
    model_type: str, options: dict[str, str | bool], why: str
) -> None:
    with pytest.raises(InvalidConfig, match=why):
        LLM(zoo.tiny_model(model_type), repeatable=True, max_len=64, **options)  # type: ignore[arg-type]


def test_floats_in_4_bits_are_refused() -> None:
    model = repeatable.build("llama", torch.float32, in_4_bits=True)
    with pytest.raises(InvalidConfig, match=r"computes aten\.linear"):
        LLM(model, repeatable=True, max_len=64)


def test_the_kernels_of_narrower_processors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in int4_native.instruction_sets():
        pytest.skip("this processor lacks AVX2")
    library = native.library()
    library.vkv_limit_instruction_set.argtypes = [ctypes.c_char_p]
    monkeypatch.setattr(native_kernels, "best_panel", lambda dtype: 16)
    monkeypatch.setattr(int4_native, "instruction_sets", lambda: ("avx2",))
    library.vkv_limit_instruction_set(b"avx2")
    try:
        for in_4_bits in (False, True):
            repeatable.check("mistral", torch.bfloat16, in_4_bits=in_4_bits, count=12)
    finally:
        library.vkv_limit_instruction_set(b"avx512_bf16")
