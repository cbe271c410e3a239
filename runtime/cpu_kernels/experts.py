"""Experts of a mixture and their routers, by vkv's kernels.

`transformers` keeps the weights of all experts in two tensors, and multiplies the tokens that chose
an expert by whatever product PyTorch has for their number. Laid out as panels, each expert is read
as a linear is, and a token's result depends on no other token.

A router multiplies by a parameter of its own. It stays the module it is: its parameter becomes one
that knows its product.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...quant import empty_apart
from . import kernels as native_kernels
from .fusing import ACTIVATIONS, Undo, close, exchange, has_hooks, refuse_loading
from .kernels import Gate, PanelLinear
from .shared_inputs import single_homes


class PackedExperts(nn.Module):
    """What an experts module computes, each expert's weights in panels.

    `forward(hidden_states, top_k_index, top_k_weights)`: [tokens, hidden], [tokens, k] twice, to
    [tokens, hidden]. A token's experts are added in the order of its own choice.
    """

    def __init__(self, experts: Any, panel: int) -> None:
        super().__init__()
        self._experts = [experts]  # in a list: its parameters are no more this module's
        self.num_experts: int = experts.num_experts
        self._gate = _gate(experts)
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        self._up = self._lay_out(experts, first, panel, self._gate)
        self._down = self._lay_out(experts, "down_proj", panel, None)
        self._names = (first, "down_proj")
        self.num_bytes = sum(parameter.nbytes for parameter in experts.parameters())
        self.register_load_state_dict_pre_hook(refuse_loading)

    def _lay_out(self, experts: Any, name: str, panel: int, gate: Gate | None) -> list[PanelLinear]:
        weights = getattr(experts, name).detach()  # [experts, out, in], or transposed
        if experts.is_transposed:
            weights = weights.transpose(1, 2)
        bias = getattr(experts, f"{name}_bias", None) if experts.has_bias else None
        panels, words = -(-weights.shape[1] // panel), weights.shape[2] * weights.itemsize // 4
        # One stretch for all: every one of its own would be three mappings of the process.
        stretch = empty_apart((len(weights), panels, words, panel), torch.int32)
        return [
            PanelLinear(
                weight.contiguous(),
                None if bias is None else bias[i].detach(),
                gate,
                panel=panel,
                out=stretch[i],
            )
            for i, weight in enumerate(weights)
        ]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        num_tokens, num_chosen = top_k_index.shape
        chosen = top_k_index.flatten()  # [tokens * k], token by token
        order = chosen.sort(stable=True).indices
        counts = chosen.bincount(minlength=self.num_experts).tolist()
        rows = hidden_states[order // num_chosen]
        results: list[torch.Tensor] = []
        start = 0
        for expert, count in enumerate(counts[: self.num_experts]):
            if count:
                results.append(self._expert(expert, rows[start : start + count]))
                start += count
        results.append(torch.zeros_like(rows[start:]))  # an index behind the last is no expert
        outs = torch.cat(results)[order.sort().indices]  # token by token again
        weighted = outs.view(num_tokens, num_chosen, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        up = self._up[expert](rows)
        if self._gate is None:
            module = self._experts[0]
            up = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        return self._down[expert](up)

    def unpack(self) -> nn.Module:
        """The experts again, bit for bit."""
        module = self._experts[0]
        for name, products in zip(self._names, (self._up, self._down), strict=True):
            weight = torch.stack([product.dense() for product in products])
            if module.is_transposed:
                weight = weight.transpose(1, 2).contiguous()
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return module


def pack_experts(model: nn.Module, dtype: torch.dtype) -> list[Undo]:
    """Exchange all experts that panels can hold; returns how to undo each."""
    undo: list[Undo] = []
    panel = native_kernels.best_panel(dtype)
    assert panel is not None, "the caller has looked"
    homes = single_homes(model)
    for module in list(model.modules()):
        if id(module) in homes and _can_pack(module, dtype):
            parent, name = homes[id(module)]
            packed = PackedExperts(module, panel)
            exchange(parent, name, packed)
            for weight in packed._names:
                delattr(module, weight)
            undo.append(
                lambda parent=parent, name=name, packed=packed: setattr(
                    parent, name, packed.unpack()
                )
            )
    return undo


def _can_pack(module: Any, dtype: torch.dtype) -> bool:
    """Whether it is an experts module of `transformers`' own kind, with nothing of another's."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return False
    if module.has_post_expert_norm or module._is_expert_parallel or has_hooks(module):
        return False
    first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    last = getattr(module, "down_proj", None)
    for weight in (first, last):
        if not isinstance(weight, nn.Parameter) or weight.dim() != 3 or weight.dtype != dtype:
            return False
        if weight.shape[1 if module.is_transposed else 2] % 2:
            return False
    return True


def _gate(experts: Any) -> Gate | None:
    """The kernel's gate, if that is what the experts do between their two products."""
    from transformers.integrations import moe  # late: `vkv info` does without

    if not experts.has_gate or not experts.is_concatenated:
        return None
    if type(experts)._apply_gate is not moe._default_apply_gate:
        return None
    outputs = experts.gate_up_proj.shape[2 if experts.is_transposed else 1]
    if outputs // 2 % 32:
        return None
    x = torch.linspace(-9, 9, 64)
    for gate, activation in ACTIVATIONS.items():
        if close(experts.act_fn(x), activation(x)):
            return gate
    return None


class RowWeight(nn.Parameter):
    """A weight [out, in] that `functional.linear` multiplies by vkv's kernel.

    Its float32 form, which many a router asks for, is one as well. To all else it is a parameter.
    """

    bias: torch.Tensor | None
    product: PanelLinear
    num_bytes: int  # beside the parameter itself
    wider: "RowWeight | None"

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> "RowWeight | None":
        """None where there is no kernel for it."""
        if native_kernels.best_panel(weight.dtype) is None or weight.shape[1] % 2:
            return None
        row_weight = cls(weight.detach(), requires_grad=False)
        row_weight.bias = bias
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
        if weight.dtype != torch.float32:
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
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[int] = set()
        self._from: dict[int, tuple[torch.Tensor, int]] = {}  # float32 forms, kept alive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) > 1:
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
            row_weight = RowWeight.of(weight, bias if fits else None)
            if row_weight is not None:
                setattr(module, name, row_weight)
                undo.append(
                    lambda module=module, name=name, weight=weight: setattr(module, name, weight)
                )
    return undo
