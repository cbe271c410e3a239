"""Which rows of a step are computed by which copy of a block.

Rows of the model alone and of any of its relatives go through it together. At a module where all
of a step's models agree it is called once, for all rows; elsewhere once for each group of rows that
agree, whosever they are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...vmem.errors import UnsupportedModel
from .anatomy import Call

Modules: TypeAlias = Mapping[str, Callable[..., Any]]
"""By name of a module of the model, what a relative computes in its place."""
Run = tuple[Modules, int]
"""A relative's modules, none for the model itself, and how many rows in turn are its."""
Rows: TypeAlias = slice | torch.Tensor
_MOST_TAKEN = 4  # inputs of which parts are remembered: queries, keys and values share one


@dataclass(frozen=True)
class Group:
    """Rows that one copy of a module computes; None for the model's own."""

    compute: Callable[..., Any] | None
    rows: Rows
    num_rows: int


class ChainStep:
    """The rows of one step.

    Args:
        runs: whose the rows are, in their order.
        kept: the same of those whose logits are wanted; None if all are. The output layer may be
            given these alone.
        device: where rows are.
    """

    def __init__(
        self, runs: Sequence[Run], kept: Sequence[Run] | None, device: torch.device
    ) -> None:
        self._runs = _Runs(runs, device)
        self._kept = self._runs if kept is None else _Runs(kept, device)
        self._taken: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]] = {}

    def call(
        self,
        name: str,
        call: Call,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What the module `name` of the model, `own`, and those in its place make of all rows."""
        assert call.in_axes is not None, "it takes rows"
        assert call.out_axes is not None, "it takes rows"
        leaves, layout = tree_flatten((args, kwargs))
        groups = self._groups(name, _num_rows(name, leaves, call.in_axes))
        if not groups:  # nobody's logits are wanted
            return own(*args, **kwargs)
        if len(groups) == 1:
            return (groups[0].compute or own)(*args, **kwargs)
        outs = []
        for group in groups:
            part = [
                value if axis is None else self._take(value, axis, group.rows)
                for value, axis in zip(leaves, call.in_axes, strict=True)
            ]
            some_args, some_kwargs = tree_unflatten(part, layout)
            outs.append((group.compute or own)(*some_args, **some_kwargs))
        return _join(outs, groups, call.out_axes)

    def prepare(self, names: Iterable[str]) -> None:
        """Find the groups at these modules now; a recording must not see how."""
        for name in names:
            self._runs.groups(name)
            self._kept.groups(name)

    def _groups(self, name: str, num_rows: int) -> Sequence[Group]:
        for runs in (self._runs, self._kept):
            if num_rows == runs.num_rows:
                return runs.groups(name)
        raise UnsupportedModel(
            f"{name} is called for {num_rows} rows in a step of {self._runs.num_rows} tokens, so "
            "that it cannot be told whose they are; serve each model by itself"
        )

    def _take(self, value: torch.Tensor, axis: int, rows: Rows) -> torch.Tensor:
        """Some rows: the same tensor each time, for those who tell inputs by identity."""
        if id(value) not in self._taken:
            if len(self._taken) == _MOST_TAKEN:
                del self._taken[next(iter(self._taken))]
            self._taken[id(value)] = value, {}
        _, parts = self._taken[id(value)]
        if id(rows) not in parts:
            if isinstance(rows, slice):
                parts[id(rows)] = value[:, rows] if axis else value[rows]
            else:
                parts[id(rows)] = value.index_select(axis, rows)
        return parts[id(rows)]

    def forget(self) -> None:
        """Hold on to no tensor of the step."""
        self._taken.clear()


class _Runs:
    """Stretches of rows, and their groups at each module."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        self.num_rows = sum(count for _, count in runs)
        self._runs = [run for run in runs if run[1]]
        self._device = device
        self._by_name: dict[str, Sequence[Group]] = {}
        self._by_owners: dict[tuple[int, ...], list[Rows]] = {}  # where the same rows agree

    def groups(self, name: str) -> Sequence[Group]:
        found = self._by_name.get(name)
        if found is None:
            found = self._by_name[name] = self._group(name)
        return found

    def _group(self, name: str) -> Sequence[Group]:
        copies = [modules.get(name) for modules, _ in self._runs]
        numbers: dict[Callable[..., Any] | None, int] = {}
        owners = tuple(numbers.setdefault(copy, len(numbers)) for copy in copies)
        if owners not in self._by_owners:
            self._by_owners[owners] = self._rows(owners, len(numbers))
        sizes = [0] * len(numbers)
        for owner, (_, count) in zip(owners, self._runs, strict=True):
            sizes[owner] += count
        return [
            Group(copy, rows, size)
            for copy, rows, size in zip(numbers, self._by_owners[owners], sizes, strict=True)
        ]

    def _rows(self, owners: Sequence[int], num_owners: int) -> list[Rows]:
        """Each owner's rows: a stretch where they follow one another, else one by one."""
        rows: list[list[int]] = [[] for _ in range(num_owners)]
        row = 0
        for owner, (_, count) in zip(owners, self._runs, strict=True):
            rows[owner].extend(range(row, row + count))
            row += count
        return [
            slice(some[0], some[-1] + 1)
            if some[-1] - some[0] == len(some) - 1
            else torch.tensor(some, device=self._device)
            for some in rows
        ]


def _num_rows(name: str, leaves: Sequence[Any], axes: Sequence[int | None]) -> int:
    if len(leaves) != len(axes):
        raise UnsupportedModel(f"{name} is called another way than when it was first seen")
    return next(
        value.shape[axis] for value, axis in zip(leaves, axes, strict=True) if axis is not None
    )


def _join(outs: Sequence[Any], groups: Sequence[Group], axes: Sequence[int | None]) -> Any:
    """What groups came to, in the order of the rows."""
    leaves, layouts = zip(*map(tree_flatten, outs), strict=True)
    joined = [
        parts[0] if axis is None else _joined(parts, groups, axis)
        for axis, parts in zip(axes, zip(*leaves, strict=True), strict=True)
    ]
    return tree_unflatten(joined, layouts[0])


def _joined(parts: Sequence[torch.Tensor], groups: Sequence[Group], axis: int) -> torch.Tensor:
    if all(isinstance(group.rows, slice) for group in groups):
        return torch.cat(list(parts), dim=axis)  # they are numbered as they come
    shape = list(parts[0].shape)
    shape[axis] = sum(group.num_rows for group in groups)
    whole = parts[0].new_empty(shape)
    for part, group in zip(parts, groups, strict=True):
        if isinstance(group.rows, slice):
            whole.narrow(axis, group.rows.start, group.num_rows).copy_(part)
        else:
            whole.index_copy_(axis, group.rows, part)
    return whole


_current: ContextVar[ChainStep | None] = ContextVar("vkv_chain_step", default=None)


def current_step() -> ChainStep | None:
    """That of the step which this thread computes; None where all rows are the model's own."""
    return _current.get()


@contextmanager
def chaining(step: ChainStep | None) -> Iterator[None]:
    """Have modules that are called meanwhile computed by those whom rows belong to."""
    if step is None:
        yield
        return
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)
        step.forget()
