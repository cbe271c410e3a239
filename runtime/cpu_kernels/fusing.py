"""Small operations of a model in one pass each, on a CPU: norms, rotary embedding, gated layers.

PyTorch computes a norm in six passes, a rotary embedding in ten, a gate in two, each a call from
Python. vkv's kernels (`kernels`) take one. The model's code stays as it is: modules whose
results are the kernels' are exchanged, and `apply_rotary_pos_emb` is bound to the kernel in the
attention layers of this one model. What a module computes is not guessed from its name alone: it
is run on random numbers and compared.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...quant import Expert, Int4Linear
from ...vmem.errors import InvalidOperation
from . import kernels as native_kernels
from .kernels import Gate

_ROTARY = "apply_rotary_pos_emb"
_NUM_TEST_ROWS = 3
_LARGE = 1e4  # of inputs: some layers clamp such
_SMALL = 1e-3  # beside which a norm's epsilon counts
_ACTIVATIONS: dict[Gate, Callable[[torch.Tensor], torch.Tensor]] = {
    Gate.SILU: functional.silu,
    Gate.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value

_OF_ANY_MODULE = frozenset(vars(nn.Module()))

Undo = Callable[[], None]


class FusedNorm(nn.Module):
    """A root-mean-square norm in one pass; its weight stays the model's parameter."""

    def __init__(self, norm: nn.Module, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = eps
        self._offset = offset
        self.lay_out()

    def lay_out(self) -> None:
        """Take the numbers that are in the parameter now, wherever they lie."""
        weight: Any = self.weight
        self._compute = native_kernels.RmsNorm(weight, self.variance_epsilon, self._offset)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._compute(hidden_states)


def fuse_norms(model: nn.Module) -> list[Undo]:
    """Exchange all root-mean-square norms of the model; returns how to undo each."""
    undo: list[Undo] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (fused := _fused_norm(child)) is not None:
                undo.append(exchange(parent, name, fused))
    return undo


def fuse_rotary(model: nn.Module) -> list[Undo]:
    """Bind the rotary embedding of the model's attention layers to the kernel."""
    undo: list[Undo] = []
    kernels: dict[object, FunctionType] = {}
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        if "forward" in vars(module) or not isinstance(forward, FunctionType):
            continue
        if forward is not type(module).forward or _ROTARY not in forward.__code__.co_names:
            continue
        original = forward.__globals__.get(_ROTARY)
        if original is None or not _rotates_halves(original):
            continue
        if original not in kernels:
            names = forward.__globals__ | {_ROTARY: _rotary_kernel(original)}
            kernels[original] = FunctionType(
                forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
            )
            kernels[original].__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(kernels[original], module)
        undo.append(lambda module=module: delattr(module, "forward"))
    return undo


def fuse_expert_gates(model: nn.Module, dtype: torch.dtype) -> list[Undo]:
    """Have the gates of experts in 4 bits computed by the kernel; returns how to undo each."""
    undo: list[Undo] = []
    gates: dict[object, Gate | None] = {}  # by activation
    for module in model.modules():
        if not isinstance(module, Expert):
            continue
        old = module.activation
        if old not in gates:
            gates[old] = gate_between(old, dtype)
        if (gate := gates[old]) is not None:
            module.activation = partial(native_kernels.gated, gate=gate)
            undo.append(lambda module=module, old=old: setattr(module, "activation", old))
    return undo


def gate_of(module: nn.Module, dtype: torch.dtype) -> Gate | None:
    """The gate of a layer that computes down_proj(act_fn(gate_proj(x)) * up_proj(x)), else None.

    Its linears may be dense or in 4 bits; `dtype` is that of their inputs.
    """
    children = dict(module.named_children())
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or has_hooks(module):
        return None
    gate_proj, up_proj = children["gate_proj"], children["up_proj"]
    if not isinstance(gate_proj, nn.Linear | Int4Linear) or type(up_proj) is not type(gate_proj):
        return None
    if type(gate_proj) not in (nn.Linear, Int4Linear) or not native_kernels.available(dtype):
        return None
    x = _also_large(gate_proj.in_features, like=torch.empty(0, dtype=dtype))
    wide = 3 * _also_large(64, like=torch.empty(0))  # float32 tells activations apart
    for gate, activation in _ACTIVATIONS.items():
        if not _close(children["act_fn"](wide), activation(wide), parts=2):
            continue
        expected = children["down_proj"](activation(gate_proj(x)) * up_proj(x))
        same = _takes_one_tensor(module) and _close(module(x), expected, parts=2)
        return gate if same else None
    return None


def gates_alike(module: nn.Module) -> tuple[object, ...] | None:
    """Equal for layers that compute the same of their weights: one's `gate_of` is the other's.

    Their classes, sizes and settings are the same. None for one that has anything of its own.
    """
    children = dict(module.named_children())
    linears = [children.pop(name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    own = [module, *(part for child in children.values() for part in child.modules())]
    if any(list(_tensors(part)) or has_hooks(part) for part in own):
        return None
    said = [
        (type(part), *((k, _known(v)) for k, v in vars(part).items() if k not in _OF_ANY_MODULE))
        for part in own
    ]
    shapes = [
        (type(linear), linear.in_features, linear.out_features, linear.bias is None)
        for linear in linears
        if isinstance(linear, nn.Linear | Int4Linear)
    ]
    return (*said, *shapes) if len(shapes) == len(linears) else None


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Those of a module itself."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _known(value: object) -> object:
    """What tells a setting from others: itself, or which object it is."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain else id(value)


def gate_between(
    activation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> Gate | None:
    """The gate that gives the results of an activation over gate and up, if there is one."""
    if not native_kernels.available(dtype):
        return None
    wide = 3 * _also_large(128, like=torch.empty(0))  # float32 tells activations apart
    found = activation(wide)
    for gate in _ACTIVATIONS:
        if _close(found, native_kernels.gated(wide, gate), parts=2):
            return gate
    return None


def exchange(parent: nn.Module, name: str, new: nn.Module) -> Undo:
    """Put `new` in a child's place; returns what puts the child back."""
    old = getattr(parent, name)
    setattr(parent, name, new)
    return lambda: setattr(parent, name, old)


def _fused_norm(norm: nn.Module) -> FusedNorm | None:
    weight, eps = getattr(norm, "weight", None), _epsilon(norm)
    if not type(norm).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor):
        return None
    if weight.dim() != 1 or eps is None or not _takes_one_tensor(norm) or has_hooks(norm):
        return None
    if len(list(norm.parameters())) != 1 or not native_kernels.available(weight.dtype):
        return None
    x = _random(_NUM_TEST_ROWS, len(weight), like=weight)
    x = torch.cat([x, _SMALL * x])
    expected = norm(x)
    if not isinstance(expected, torch.Tensor):
        return None
    if (expected.dtype, expected.shape) != (x.dtype, x.shape):
        return None
    # The nearer one: beside a large weight, one more is little.
    found = [FusedNorm(norm, eps, offset) for offset in (0.0, 1.0)]
    shares = [(_share_off(one(x), expected), one) for one in found]
    share, best = min(shares, key=lambda pair: float(pair[0].mean()))
    return best if bool((share <= _TOLERANCE[x.dtype]).all()) else None


def _epsilon(norm: nn.Module) -> float | None:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else None


def _rotary_kernel(original: FunctionType) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`original` for [1, heads, tokens, dim] in one pass; other shapes still go to `original`."""

    def rotate_both(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *args: int,
        **kwargs: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if args or kwargs or not _fits(q, cos) or not _fits(k, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        cosine, sine = cos[0].contiguous(), sin[0].contiguous()
        rotated = (native_kernels.rotate(x[0].transpose(0, 1), cosine, sine) for x in (q, k))
        q_rotated, k_rotated = (x.transpose(0, 1).unsqueeze(0) for x in rotated)
        return q_rotated, k_rotated

    return rotate_both


def _fits(states: torch.Tensor, angles: torch.Tensor) -> bool:
    return (
        angles.dim() == 3
        and states.shape[0] == 1
        and angles.shape == (1, states.shape[2], states.shape[3])
        and angles.dtype == states.dtype
        and states.stride(3) == 1
    )


def _rotates_halves(function: Callable[..., object]) -> bool:
    """Whether `function(q, k, cos, sin)` is the usual embedding: the halves of a head rotated."""
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    like = torch.empty(0)
    q, k = _random(1, 3, 2, 8, like=like), _random(1, 1, 2, 8, like=like)
    cos, sin = _random(1, 2, 8, like=like), _random(1, 2, 8, like=like)
    try:
        found = function(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    expected = _rotary_kernel(function)(q, k, cos, sin)  # type: ignore[arg-type]
    return (
        isinstance(found, tuple)
        and len(found) == 2
        and all(_close(a, b) for a, b in zip(found, expected, strict=True))
    )


def _takes_one_tensor(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def refuse_loading(
    module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Weights that were laid out have no parameters for others to be loaded into."""
    children = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    own = [n for n in state_dict if n.startswith(prefix) and not n.startswith(children)]
    if own:
        raise InvalidOperation(
            f"{own[0]} cannot be loaded, for the weights there were laid out for a CPU's kernels; "
            "load them before vkv.LLM takes the model, or make it with pack_weights=False"
        )


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _random(*shape: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.dtype)


def _also_large(dim: int, *, like: torch.Tensor) -> torch.Tensor:
    """Random rows, and the same again far larger: some layers clamp what is large."""
    x = _random(_NUM_TEST_ROWS, dim, like=like)
    return torch.cat([x, _LARGE * x])


def _close(found: object, expected: torch.Tensor, *, parts: int = 1) -> bool:
    """Whether one tensor is the other, but for the rounding of its dtype; each part of its rows."""
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    pairs = zip(found.float().chunk(parts), expected.float().chunk(parts), strict=True)
    tolerance = _TOLERANCE[expected.dtype]
    return all(bool((a - b).abs().max() <= tolerance * b.abs().max()) for a, b in pairs)


def _share_off(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The difference of each element, as a share of it."""
    wanted = expected.detach().float()
    tiny = torch.finfo(torch.float32).tiny
    return (found.float() - wanted).abs() / wanted.abs().clamp(min=tiny)
