"""Experts of a mixture and their routers, by vkv's kernels.

`transformers` keeps the weights of all experts in two tensors, and multiplies the tokens that chose
an expert by whatever product PyTorch has for their number. Laid out as panels, each expert is read
as a linear is, and a token's result depends on no other token.

A router multiplies by a parameter of its own. It stays the module it is: its parameter becomes one
that knows its product.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...quant import empty_apart
from ...quant.experts import FusedExperts, Role, mixed
from . import kernels as native_kernels
from .fusing import Undo, exchange, gate_between, has_hooks, refuse_loading
from .kernels import Gate, PanelLinear
from .shared_inputs import single_homes


class PackedExperts(nn.Module):
    """What an experts module computes, each expert's weights in panels.

    `forward(hidden_states, top_k_index, top_k_weights)`: [tokens, hidden], [tokens, k] twice, to
    [tokens, hidden].
    """

    def __init__(self, fused: FusedExperts, dtype: torch.dtype, panel: int) -> None:
        super().__init__()
        self._fused = [fused]  # in a list: its parameters are no more this module's
        self.num_bytes = sum(parameter.nbytes for parameter in fused.module.parameters())
        first: Role = "gate_up_proj" if fused.gated else "up_proj"
        gate = _gate(fused, dtype)
        self._up = self._lay_out(fused, first, panel, gate)
        self._down = self._lay_out(fused, "down_proj", panel, None)
        self._names = (first, "down_proj")
        self._activation = None if gate is not None else fused.activation()
        self._experts = [partial(self._expert, i) for i in range(fused.num_experts)]
        self.register_load_state_dict_pre_hook(refuse_loading)

    def _lay_out(
        self, fused: FusedExperts, role: Role, panel: int, gate: Gate | None
    ) -> list[PanelLinear]:
        outputs, inputs = fused.weight(role, 0).shape
        words = inputs * fused.weight(role, 0).itemsize // 4
        # One stretch for all: every one of its own would be three mappings of the process.
        shape = fused.num_experts, -(-outputs // panel), words, panel
        stretch = empty_apart(shape, torch.int32)
        return [
            PanelLinear(
                fused.weight(role, i), fused.bias(role, i), gate, panel=panel, out=stretch[i]
            )
            for i in range(fused.num_experts)
        ]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return mixed(self._experts, hidden_states, top_k_index, top_k_weights)

    def _expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        up = self._up[number](rows)
        return self._down[number](up if self._activation is None else self._activation(up))

    def let_go(self) -> None:
        """Drop the weights as they were."""
        for name in self._names:
            delattr(self._fused[0].module, name)

    def unpack(self) -> nn.Module:
        """The experts again, bit for bit."""
        module: Any = self._fused[0].module
        for name, products in zip(self._names, (self._up, self._down), strict=True):
            weight = torch.stack([product.dense() for product in products])
            if module.is_transposed:
                weight = weight.transpose(1, 2).contiguous()
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return module


def pack_experts(model: nn.Module, dtype: torch.dtype) -> Iterator[Undo]:
    """Exchange all experts that panels can hold; yields how to undo each."""
    panel = native_kernels.best_panel(dtype)
    assert panel is not None, "the caller has looked"
    homes = single_homes(model)
    for module in list(model.modules()):
        fused = _packable(module, dtype)
        if fused is not None and id(module) in homes:
            parent, name = homes[id(module)]
            packed = PackedExperts(fused, dtype, panel)
            exchange(parent, name, packed)
            packed.let_go()
            yield partial(_put_back, parent, name, packed)


def _put_back(parent: nn.Module, name: str, packed: PackedExperts) -> None:
    setattr(parent, name, packed.unpack())


def _packable(module: Any, dtype: torch.dtype) -> FusedExperts | None:
    """An experts module of `transformers`' own kind, with nothing of another's; else None."""
    fused = FusedExperts.of(module)
    if fused is None or getattr(module, "_is_expert_parallel", False) or has_hooks(module):
        return None
    for role in ("gate_up_proj" if fused.gated else "up_proj", "down_proj"):
        weight = getattr(module, role, None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 3 or weight.dtype != dtype:
            return None
        if fused.weight(role, 0).shape[1] % 2:
            return None
    return fused


def _gate(fused: FusedExperts, dtype: torch.dtype) -> Gate | None:
    """The kernel's gate, if that is what the experts do between their two products."""
    if not fused.gated or len(fused.weight("gate_proj", 0)) % 32:
        return None
    return gate_between(fused.activation(), dtype)


class RowWeight(nn.Parameter):
    """A weight [out, in] that `functional.linear` multiplies by vkv's kernel.

    So is its float32 form, if that is asked for as a router's often is. To all else it is a
    parameter.
    """

    bias: torch.Tensor | None
    product: PanelLinear
    num_bytes: int  # beside the parameter itself
    widens: bool
    wider: "RowWeight | None"

    @classmethod
    def of(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, *, widens: bool = False
    ) -> "RowWeight | None":
        """None where there is no kernel for it; `widens` if its float32 form is multiplied by."""
        if native_kernels.best_panel(weight.dtype) is None or weight.shape[1] % 2:
            return None
        row_weight = cls(weight.detach(), requires_grad=False)
        row_weight.bias = bias
        row_weight.widens = widens and weight.dtype != torch.float32
        row_weight.lay_out()
        return row_weight

    def lay_out(self) -> None:
        """Take the numbers that are in the parameter now."""
        panel = native_kernels.best_panel(self.dtype)
        assert panel is not None, "looked at by `of`"
        weight = self.detach().as_subclass(torch.Tensor)
        self.product = PanelLinear(weight, self.bias, panel=panel)
        self.num_bytes = weight.nbytes
        self.wider = None
        if self.widens:
            bias = None if self.bias is None else self.bias.float()
            self.wider = RowWeight.of(weight.float(), bias)
            self.num_bytes += weight.numel() * 8  # as it is and laid out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and len(args) > 1 and isinstance(args[1], RowWeight):
            inputs, weight = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if inputs.dtype == weight.dtype and bias is weight.bias:
                return weight.product(inputs)
        if _widens(func, args, kwargs) and args[0].wider is not None:
            return args[0].wider
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _widens(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a weight, the first argument, is asked for in float32."""
    if func is torch.Tensor.float:
        return isinstance(args[0], RowWeight) and not kwargs
    if func in (torch.Tensor.type, torch.Tensor.to) and isinstance(args[0], RowWeight):
        return [*args[1:], *kwargs.values()] == [torch.float32]
    return False


class Multiplied(TorchFunctionMode):
    """Notes the parameters that `functional.linear` multiplies by, as they are or in float32.

    Attributes:
        weights: each parameter's `id`.
        widened: those among them whose float32 form it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[int] = set()
        self.widened: set[int] = set()
        self._from: dict[int, tuple[torch.Tensor, int]] = {}  # float32 forms, kept alive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) > 1:
            if id(args[1]) in self._from:
                self.widened.add(self._from[id(args[1])][1])
            self.weights.add(self._from.get(id(args[1]), (None, id(args[1])))[1])
        elif func in _WIDENS and isinstance(args[0], nn.Parameter):
            self._from[id(result)] = result, id(args[0])
        return result


_WIDENS = (torch.Tensor.float, torch.Tensor.type, torch.Tensor.to)


def pack_row_weights(model: nn.Module, multiplied: Multiplied) -> list[Undo]:
    """Give parameters that the model multiplies by their product; returns how to undo each."""
    undo: list[Undo] = []
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in multiplied.weights or weight.dim() != 2 or has_hooks(module):
                continue
            if isinstance(module, nn.Embedding):  # tied to an output layer, which is packed
                continue
            bias = getattr(module, "bias", None)
            fits = isinstance(bias, torch.Tensor) and bias.shape == weight.shape[:1]
            widens = id(weight) in multiplied.widened
            row_weight = RowWeight.of(weight, bias if fits else None, widens=widens)
            if row_weight is not None:
                setattr(module, name, row_weight)
                undo.append(
                    lambda module=module, name=name, weight=weight: setattr(module, name, weight)
                )
    return undo
