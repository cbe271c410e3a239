"""Fused norms, rotary embedding and gated layers: taken where they are the same, and only there."""

import pytest
import torch
import zoo
from quantized import random_weight
from torch import nn
from vkv import LLM
from vkv.quant import Int4Linear
from vkv.runtime.cpu_kernels import kernels as native_kernels
from vkv.runtime.cpu_kernels.fusing import (
    FusedNorm,
    fuse_norms,
    fuse_rotary,
    gate_between,
    gate_of,
    gates_alike,
)
from vkv.runtime.cpu_kernels.kernels import Gate
from vkv.runtime.cpu_kernels.packing import PackedGatedLayer, can_pack
from vkv.runtime.model.loading import load_model

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not native_kernels.available(torch.float32) or not can_pack(torch.float32),
    reason="no C compiler, or no packed kernels",
)


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "norms", "gated", "rotary"),
    [("llama", 5, 2, 2), ("qwen3", 9, 2, 2), ("gemma2", 9, 2, 2), ("cohere2", 0, 2, 0)],
)
def test_what_is_fused(
    architecture: str, norms: int, gated: int, rotary: int, dtype: torch.dtype
) -> None:
    if not can_pack(dtype):
        pytest.skip(f"no packed kernels for {dtype}")
    model = zoo.tiny_model(architecture).to(dtype)
    load_model(model, device=CPU, pack_weights=True)
    found = sum("forward" in vars(module) for module in model.modules())
    assert (count(model, FusedNorm), count(model, PackedGatedLayer), found) == (
        norms,
        gated,
        rotary,
    )


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma2", "phi3", "olmo2", "mixtral", "gpt_neox", "gpt_oss"]
)
def test_tokens_are_those_of_generate(architecture: str) -> None:
    prompts = zoo.random_prompts([5, 17, 3])
    reference = zoo.tiny_model(architecture)
    expected = [zoo.generate_alone(reference, prompt, 12) for prompt in prompts]
    with LLM(zoo.tiny_model(architecture), pack_weights=True) as llm:
        outputs = llm.generate(prompts, zoo.greedy(12))
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def test_other_models_of_the_class_are_left_alone() -> None:
    fused, other = zoo.tiny_model("llama"), zoo.tiny_model("llama")
    load_model(fused, device=CPU, pack_weights=True)
    assert not count(other, FusedNorm)
    assert not any("forward" in vars(module) for module in other.modules())
    prompt = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(other(prompt).logits, zoo.tiny_model("llama")(prompt).logits)


def test_undone() -> None:
    model = zoo.tiny_model("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    for back in reversed(fuse_norms(model) + fuse_rotary(model)):
        back()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())


class OddRMSNorm(nn.Module):
    """A norm by its name, which does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.norm(dim=-1, keepdim=True)


class Feedforward(nn.Module):
    def __init__(self, act_fn: nn.Module, *, swapped: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), act_fn
        self.swapped = swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.swapped:
            gate, up = up, gate
        return self.down_proj(self.act_fn(gate) * up)


@torch.inference_mode()
def test_what_only_looks_alike_is_left() -> None:
    odd = nn.Sequential(OddRMSNorm())
    assert fuse_norms(odd) == []
    assert gate_of(Feedforward(nn.SiLU()), torch.float32) is Gate.SILU
    assert gate_of(Feedforward(nn.GELU(approximate="tanh")), torch.float32) is Gate.GELU_TANH
    assert gate_of(Feedforward(nn.GELU()), torch.float32) is None, (
        "the exact GELU is another function"
    )
    assert gate_of(Feedforward(nn.ReLU()), torch.float32) is None
    assert gate_of(Feedforward(nn.SiLU(), swapped=True), torch.float32) is None


def test_layers_with_the_same_settings_have_the_same_gate() -> None:
    """Whatever their weights are, and no others."""
    kind = gates_alike(Feedforward(nn.SiLU()))
    assert kind is not None
    assert gates_alike(Feedforward(nn.SiLU())) == kind
    others = [Feedforward(nn.GELU()), Feedforward(nn.GELU(approximate="tanh"))]
    others += [Feedforward(nn.SiLU(), swapped=True), Feedforward(nn.SiLU())]
    others[-1]._scale = 2.0  # type: ignore[assignment] - a private setting is one too
    wide = Feedforward(nn.SiLU())
    wide.up_proj = nn.Linear(8, 16, bias=False)
    configured = Feedforward(nn.SiLU())
    configured.config = object()  # type: ignore[assignment]
    patched = Feedforward(nn.SiLU())
    patched.forward = lambda x: x  # type: ignore[method-assign,assignment]
    kinds = [gates_alike(layer) for layer in (*others, wide, configured, patched)]
    assert None not in kinds
    assert len({kind, *kinds}) == 1 + len(kinds)
    learned = Feedforward(nn.PReLU())
    assert gates_alike(learned) is None, "a parameter decides"
    hooked = Feedforward(nn.SiLU())
    hooked.register_forward_hook(lambda *_: None)
    assert gates_alike(hooked) is None


@torch.inference_mode()
def test_a_gate_between_linears_in_4_bits() -> None:
    layer = Feedforward(nn.SiLU())
    layer.gate_proj, layer.up_proj = (  # type: ignore[assignment]
        Int4Linear(random_weight(16, 8, 8, seed=seed)) for seed in (1, 2)
    )
    assert gate_of(layer.bfloat16(), torch.bfloat16) is Gate.SILU
    layer.swapped = True
    assert gate_of(layer, torch.bfloat16) is None


class Clamped(Feedforward):
    """As of models that limit what is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(-10.0, 10.0)
        return self.down_proj(self.act_fn(gate) * up)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_that_clamps_what_is_large_is_left(dtype: torch.dtype) -> None:
    def plain(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    assert gate_of(Feedforward(nn.SiLU()).to(dtype), dtype) is Gate.SILU
    assert gate_of(Clamped(nn.SiLU()).to(dtype), dtype) is None
    assert gate_between(plain, dtype) is Gate.SILU
    assert gate_between(lambda both: plain(both.clamp(max=16.0)), dtype) is None


class OffsetRMSNorm(nn.Module):
    """As Gemma's."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rest", [0.0, 200.0])
def test_one_more_than_the_weight_is_told_from_the_weight(dtype: torch.dtype, rest: float) -> None:
    """Also beside a channel whose weight is a thousand, and where all are large."""
    weight = torch.full((64,), rest)
    weight[3] = 1000.0
    norm = nn.Sequential(OffsetRMSNorm(weight.to(dtype)))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = norm(x)
    assert len(fuse_norms(norm)) == 1
    fused = norm[0]
    assert isinstance(fused, FusedNorm)
    assert fused._offset == 1.0
    torch.testing.assert_close(fused(x), expected, rtol=2**-7, atol=0.0)


class OutsideRMSNorm(OffsetRMSNorm):
    """Whose epsilon is added to the root."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = x.float().square().mean(-1, keepdim=True).sqrt()
        return (x.float() / (root + self.eps) * self.weight.float()).type_as(x)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epsilon_in_another_place_is_seen(dtype: torch.dtype) -> None:
    assert fuse_norms(nn.Sequential(OutsideRMSNorm(torch.ones(64, dtype=dtype)))) == []
