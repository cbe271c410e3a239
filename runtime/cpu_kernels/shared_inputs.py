"""Which linears of a model read the same input: found by running it, and watching them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn

from ...quant import Expert, Int4Linear, can_concatenate
from .fusing import has_hooks

Linear: TypeAlias = nn.Linear | Int4Linear


@dataclass
class Place:
    """Where a linear hangs in the model, and what it was called with."""

    parent: nn.Module
    name: str
    linear: Linear
    inputs: list[torch.Tensor] = field(default_factory=list)


def single_homes(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """By `id` of each module that hangs in one place only: its parent, and its name there."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            homes.setdefault(id(child), []).append((parent, name))
    return {child: places[0] for child, places in homes.items() if len(places) == 1}


def plain_linears(model: nn.Module, can_lay_out: Callable[[nn.Linear], bool]) -> list[Place]:
    """The linears in 4 bits, and those dense ones that can be laid out.

    Without hooks, in one place only, and of no subclass, which may have ideas of its own. Those of
    experts are left out: a few tokens do not call them all.
    """
    found: list[Place] = []
    for parent, name in single_homes(model).values():
        child = getattr(parent, name)
        if has_hooks(child) or isinstance(parent, Expert):  # which lays out its own
            continue
        if type(child) is Int4Linear or (type(child) is nn.Linear and can_lay_out(child)):
            found.append(Place(parent, name, child))
    return found


def group_by_input(places: list[Place], run: Callable[[], object]) -> list[list[Place]]:
    """Groups of siblings that `run` calls once each, one after the other, on the same tensor.

    A linear that it calls several times is a group of its own, and one that it never calls in none.
    """
    calls: list[Place] = []

    def note(place: Place) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            place.inputs.append(inputs[0])
            calls.append(place)

        return hook

    hooks = [place.linear.register_forward_pre_hook(note(place)) for place in places]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[Place]] = []
    for place in calls:
        if len(place.inputs) > 1:  # several times a forward: packed, and on its own
            if not any(place in group for group in groups):
                groups.append([place])
            continue
        last = groups[-1] if groups else []
        if last and len(last[0].inputs) == 1 and _are_siblings(last[0], place):
            last.append(place)
        else:
            groups.append([place])
    for place in calls:
        place.inputs.clear()
    return groups


def _are_siblings(first: Place, other: Place) -> bool:
    """Whether one product can compute both: of one parent and input, and weights that join."""
    if first.parent is not other.parent or first.inputs[0] is not other.inputs[0]:
        return False
    one, two = first.linear, other.linear
    if isinstance(one, Int4Linear) and isinstance(two, Int4Linear):
        both_whole = not one.is_settled and not two.is_settled
        same_kernel = one.pinned == two.pinned
        return both_whole and same_kernel and can_concatenate(one.outline, two.outline)
    return isinstance(one, nn.Linear) and isinstance(two, nn.Linear)
