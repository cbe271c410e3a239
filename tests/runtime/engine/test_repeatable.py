"""`repeatable=True`: a request's tokens are its own to the bit, or the model is refused."""

import pytest
import repeatable
import torch
import zoo
from vkv import LLM
from vkv.attention_backends.native import NativeBackend
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
