"""Mixtures of experts with linears of their own for each expert.

`transformers` keeps the weights of all experts of a layer in one tensor for each role, and
checkpoints in 4 bits have linears for each. `FusedExperts` looks at such a module expert by expert;
`Experts` takes its place, with linears of any kind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

import torch
from torch import nn

from .linear import Int4Linear
from .weight import Int4Weight, can_concatenate, concatenate

Role = Literal["gate_proj", "up_proj", "gate_up_proj", "down_proj"]
ROLES: tuple[Role, ...] = get_args(Role)


class FusedExperts:
    """The experts of a layer as `transformers` keeps them, looked at one by one.

    Attributes:
        module: of a class made by `use_experts_implementation`.
        roles: the linears that an expert has, if it is taken apart; gate and up stay one where
            their outputs alternate.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.gated = bool(module.has_gate)
        self.interleaved = self.gated and not getattr(module, "is_concatenated", True)
        self.has_bias = bool(module.has_bias)
        self.num_experts = cast(torch.Tensor, module.down_proj).shape[0]
        up: tuple[Role, ...] = ("up_proj",)
        if self.gated:
            up = ("gate_up_proj",) if self.interleaved else ("gate_proj", "up_proj")
        self.roles: tuple[Role, ...] = (*up, "down_proj")

    @classmethod
    def of(cls, module: nn.Module | None) -> "FusedExperts | None":
        """What a module keeps, or None if it is of another kind."""
        down = getattr(module, "down_proj", None)
        known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))
        if module is None or not known or getattr(module, "has_post_expert_norm", False):
            return None
        return cls(module) if isinstance(down, nn.Parameter) and down.dim() == 3 else None

    def has(self, role: Role) -> bool:
        """Whether an expert can have a linear of that role."""
        return self.gated or role in ("up_proj", "down_proj")

    def tensor_names(self) -> tuple[str, ...]:
        """The names of the module's tensors, weights and biases."""
        return tuple(name for name, _ in self.module.named_parameters(recurse=False))

    def weight(self, role: Role, expert: int) -> torch.Tensor:
        """One expert's weight, [out_features, in_features], a view."""
        stacked = getattr(self.module, self._stored_in(role))[expert]
        return self._part(role, stacked.T if self.module.is_transposed else stacked)

    def bias(self, role: Role, expert: int) -> torch.Tensor | None:
        """One expert's bias, [out_features], a view; None if there is none."""
        if not self.has_bias:
            return None
        return self._part(role, getattr(self.module, f"{self._stored_in(role)}_bias")[expert])

    def linear(self, role: Role, expert: int) -> nn.Linear:
        """A linear whose weight and bias are views of the module's."""
        weight, bias = self.weight(role, expert), self.bias(role, expert)
        linear = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def activation(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What stands between the first product, [n, out], and the second, [n, in]."""
        return cast(
            Callable[[torch.Tensor], torch.Tensor],
            self.module._apply_gate if self.gated else self.module.act_fn,
        )

    def release(self) -> None:
        """Let go of the weights."""
        self._released = {
            name: getattr(self.module, name).to("meta") for name in self.tensor_names()
        }
        for name in self._released:
            self.module.register_parameter(name, None)

    def restore(self, linears: Mapping[tuple[int, Role], nn.Linear]) -> nn.Module:
        """The module with weights again, after `release`: those of dense linears by expert."""
        dtype = next(iter(linears.values())).weight.dtype
        for name, outline in self._released.items():
            weight = torch.empty(outline.shape, dtype=dtype)
            self.module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for (expert, role), linear in linears.items():
            self.weight(role, expert).copy_(linear.weight)
            bias = self.bias(role, expert)
            if bias is not None:
                bias.copy_(linear.bias)
        return self.module

    def _stored_in(self, role: Role) -> str:
        if role == "down_proj" or not self.gated:
            return role
        return "gate_up_proj"

    def _part(self, role: Role, rows: torch.Tensor) -> torch.Tensor:
        """Of the rows of gate and up, those of one of them."""
        if not self.gated or role in ("gate_up_proj", "down_proj"):
            return rows
        half, second = len(rows) // 2, role == "up_proj"
        if self.interleaved:
            return rows[int(second) :: 2]
        return rows[half:] if second else rows[:half]


class Expert(nn.Module):
    """One expert: [n, hidden] to [n, hidden].

    Args:
        linears: by role: gate and up, or both in one, or up alone; and down.
        activation: what stands between them.
        interleaved: gate's and up's outputs alternate where the activation reads them.
    """

    def __init__(
        self,
        linears: Mapping[Role, nn.Module],
        activation: Callable[[torch.Tensor], torch.Tensor],
        *,
        interleaved: bool,
    ) -> None:
        super().__init__()
        self.down_proj: nn.Module
        for role, linear in linears.items():
            self.add_module(role, linear)
        self.activation = activation
        self.interleaved = interleaved
        self._first = tuple(role for role in ROLES if role in linears and role != "down_proj")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        outs = [getattr(self, role)(rows) for role in self._first]
        if len(outs) == 1:
            return self.down_proj(self.activation(outs[0]))
        whole = torch.stack(outs, -1).flatten(-2) if self.interleaved else torch.cat(outs, -1)
        return self.down_proj(self.activation(whole))

    def join(self) -> None:
        """Make one product of gate and up, if both are in 4 bits and their weights can be one."""
        gate, up = (getattr(self, role, None) for role in ("gate_proj", "up_proj"))
        if not isinstance(gate, Int4Linear) or not isinstance(up, Int4Linear):
            return
        first, second = gate.weight_int4, up.weight_int4
        if not can_concatenate(first, second):
            return
        weight = concatenate([first, second])
        biases = [one.bias for one in (gate, up) if one.bias is not None]
        if len(biases) == 1:
            return
        bias = torch.cat(biases) if biases else None
        if self.interleaved:
            order = torch.arange(weight.out_features).view(2, -1).T.flatten()
            weight = _reordered(weight, order.to(weight.packed.device))
            bias = None if bias is None else bias[order.to(bias.device)]
        del self.gate_proj, self.up_proj
        self.gate_up_proj = Int4Linear(weight, bias)
        self._first = ("gate_up_proj",)


class Experts(nn.Module):
    """All experts of a layer, called as the module of `transformers` is that they stand for.

    A token's result follows from its own row, experts and weights (`mixed`).
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.num_experts = len(experts)
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def __getitem__(self, number: int) -> Expert:
        return cast(Expert, getattr(self, str(number)))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens, hidden] of the same; index and weights are [num_tokens, k].

        An index past the last expert stands for none.
        """
        experts = [self[number] for number in range(self.num_experts)]
        return mixed(experts, hidden_states, top_k_index, top_k_weights)


def mixed(
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it, [num_tokens, hidden].

    Rows are computed expert by expert, and a token's results added in the order of its own choice.
    Shapes are as of `Experts.forward`; each expert takes [n, hidden] to [n, hidden].
    """
    num_tokens, num_chosen = top_k_index.shape
    chosen = top_k_index.flatten()  # [num_tokens * k], token by token
    order = chosen.sort(stable=True).indices
    counts = chosen.bincount(minlength=len(experts)).tolist()
    rows = hidden_states[order // num_chosen]
    results: list[torch.Tensor] = []
    start = 0
    for expert, count in zip(experts, counts, strict=False):
        if count:
            results.append(expert(rows[start : start + count]))
        start += count
    results.append(rows.new_zeros(len(rows) - start, rows.shape[1]))  # of no expert
    outs = torch.cat(results)[order.sort().indices]  # token by token again
    weighted = outs.view(num_tokens, num_chosen, -1) * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def taken_apart(fused: FusedExperts) -> Experts:
    """The same experts over linears that share the module's memory."""
    activation = fused.activation()
    return Experts(
        [
            Expert(
                {role: fused.linear(role, number) for role in fused.roles},
                activation,
                interleaved=fused.interleaved,
            )
            for number in range(fused.num_experts)
        ]
    )


def _reordered(weight: Int4Weight, order: torch.Tensor) -> Int4Weight:
    """The same rows in another order."""
    return replace(
        weight,
        packed=weight.packed[order],
        scales=weight.scales[order],
        zeros=None if weight.zeros is None else weight.zeros[order],
    )
