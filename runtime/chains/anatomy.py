"""How a model calls its modules: seen once, while it computes a few tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from ...attention_backends import LayerAttention
from ..model.forward import Forward
from ..model.probes.attention_probe import AttentionProbe, refusing

_NUM_TOKENS = 7  # as no other size of a tensor is likely to be

Axes = tuple[int | None, ...]
"""Of each value that goes in or comes out: which axis counts the tokens; None for what has none."""


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Attributes:
        args, kwargs: what it was called with the first time.
        in_axes, out_axes: of all that goes in and comes out, containers taken apart; None if the
            module cannot be called for some tokens at a time.
        is_behind: nothing that attends came after it.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    in_axes: Axes | None
    out_axes: Axes | None
    is_behind: bool = False

    @property
    def takes_rows(self) -> bool:
        """Whether any tokens may be computed apart from the others."""
        return self.in_axes is not None and self.out_axes is not None


@dataclass
class _Noted:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    in_axes: Axes | None
    time: int
    out_axes: Axes | None = None
    has_returned: bool = False


@dataclass
class _Probe(AttentionProbe):
    """Notes, too, inside of which modules attention is called."""

    notes: "_Notes" = field(kw_only=True)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        self.notes.attends()
        return super().attend(layer, query, key, value, wanted)


class _Notes:
    """What hooks see, in order."""

    def __init__(self) -> None:
        self.calls: dict[str, _Noted] = {}
        self.attending: set[str] = set()
        self.last_attending = ""
        self.last_attended = -1
        self._inside: list[str] = []
        self._time = 0

    def attends(self) -> None:
        self.attending.update(self._inside)
        self.last_attending, self.last_attended = self._inside[-1], self._time

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside.append(name)
        self._time += 1
        axes = _axes((args, kwargs))
        noted = self.calls.setdefault(name, _Noted(args, kwargs, axes, self._time))
        if noted.in_axes != axes:
            noted.in_axes = None

    def leave(self, name: str, out: Any) -> None:
        self._inside.pop()
        noted, axes = self.calls[name], _axes(out)
        if noted.has_returned and noted.out_axes != axes:
            noted.in_axes = None
        noted.out_axes, noted.has_returned = axes, True


class Anatomy:
    """What is known of a model's modules from one run.

    Args:
        model: prepared to attend through vkv, packed or not.

    Attributes:
        calls: by name of each module that was called, the model itself aside, in their order.
        attending: those of them in which attention is called.

    Raises UnsupportedModel if the model cannot run a flat batch.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        notes = _run(model)
        self.attending = frozenset(notes.attending)
        self._last_attending = notes.last_attending
        self.calls = {
            name: Call(n.args, n.kwargs, n.in_axes, n.out_axes, n.time > notes.last_attended)
            for name, n in notes.calls.items()
        }

    def can_stand_alone(self, name: str) -> bool:
        """Whether a module may be called for some tokens with weights of its own."""
        call = self.calls.get(name)
        return call is not None and call.takes_rows and name not in self.attending

    def is_behind(self, name: str) -> bool:
        """Whether no keys or values depend on a module, as far as is known."""
        return name in self.calls and self.calls[name].is_behind

    def feeds_forward_last(self) -> bool:
        """Whether all matrices of the last layer that attends come behind its attention, but for
        those of what attends."""
        name = self._last_attending
        while name:
            parent, _, _ = name.rpartition(".")
            holder = self._model.get_submodule(parent)
            if isinstance(holder, nn.ModuleList):
                return True
            for child, module in holder.named_children():
                full = f"{parent}.{child}" if parent else child
                counts = full in self.calls and full not in self.attending
                if counts and not _is_norm(module) and not self.is_behind(full):
                    return False
            name = parent
        return False


def _run(model: PreTrainedModel) -> _Notes:
    notes = _Notes()
    hooks = list(_hooks(model, notes))
    try:
        vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        positions = torch.arange(_NUM_TOKENS, device=model.device).unsqueeze(0)
        with refusing(model):
            Forward(model)((positions + 1) % vocab_size, positions, _Probe(notes=notes))
    finally:
        for hook in hooks:
            hook.remove()
    return notes


def _hooks(model: nn.Module, notes: _Notes) -> Iterator[Any]:
    for name, module in model.named_modules():
        if name:
            yield module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: notes.enter(name, args, kwargs),
                with_kwargs=True,
            )
            yield module.register_forward_hook(lambda _, __, out, name=name: notes.leave(name, out))


def _axes(values: Any) -> Axes | None:
    """None if some tensor has no axis that counts tokens, or none has one."""
    found: list[int | None] = []
    for value in tree_flatten(values)[0]:
        if not isinstance(value, torch.Tensor):
            found.append(None)
        elif value.shape[:2] == (1, _NUM_TOKENS):
            found.append(1)
        elif value.shape[:1] == (_NUM_TOKENS,):
            found.append(0)
        elif value.dim():
            return None
        else:
            found.append(None)
    return tuple(found) if any(axis is not None for axis in found) else None


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.dim() <= 1 for parameter in parameters)
