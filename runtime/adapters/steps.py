"""What a step's linears are told: which of its rows are whose.

Rows are put together by adapter once for a step, and all linears of the step go by that. What
computes is a `Products`: for each adapter two products over its own rows, never a weight gathered
for every token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from ...vmem.errors import UnsupportedModel

if TYPE_CHECKING:
    from .sites import Site

Table: TypeAlias = Any
"""An adapter's weights, as the `Products` that made it find them."""
Run = tuple[Table | None, int]
"""A table, or None for no adapter, and how many rows of the step in turn are its."""
Group = tuple[Table | None, list[int]]
"""A table, or None, and all rows of the step that are its."""


@dataclass(frozen=True)
class SiteWeights:
    """What an adapter adds at one site: `scale` times x downᵀ up.

    Attributes:
        down: [rank, in_features].
        up: [rank, out_features], so not as a file has it.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


class Products(Protocol):
    """A way to compute what adapters add.

    Attributes:
        name: for people.
        most_rank: the largest rank that it takes.
        records: whether a recorded step may be replayed for other adapters.
    """

    name: str
    most_rank: int
    records: bool

    def allocate(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for an adapter's weights, which goes back to the system with it."""
        ...

    def table(self, num_sites: int, weights: dict[int, SiteWeights]) -> Table:
        """An adapter's weights by site, as the kernel finds them."""
        ...

    def plan(self, num_rows: int) -> Any:
        """Memory for the rows of a step, which stays where it is."""
        ...

    def fill(self, plan: Any, groups: Sequence[Group]) -> None:
        """Say whose the rows of a plan are."""
        ...

    def add(self, plan: Any, site: "Site", inputs: torch.Tensor, out: torch.Tensor) -> None:
        """Add to `out`, [..., out_features], in place."""
        ...

    def set(self, plan: Any, site: "Site", inputs: torch.Tensor, out: torch.Tensor) -> None:
        """Make `out`, float32 [num_rows, out_features] within longer rows, what there is to add."""
        ...


class AdapterStep:
    """The rows of one step, or of a recorded one each time that it is played.

    Args:
        products: how it is computed.
        num_rows: tokens of the step.
        num_kept: those among them whose logits are wanted; the output layer may be given these
            alone.
        is_recorded: it is played several times, and keeps no memory of its own for that.
    """

    def __init__(
        self,
        products: Products,
        num_rows: int,
        num_kept: int | None = None,
        *,
        is_recorded: bool = False,
    ) -> None:
        self._products = products
        self._num_rows = num_rows
        self._num_kept = num_rows if num_kept is None else num_kept
        self._all = products.plan(num_rows)
        self._kept = self._all if num_kept is None else products.plan(num_kept)
        self._is_recorded = is_recorded
        self._sums: torch.Tensor | None = None  # layers take turns, and the memory is large

    def fill(self, runs: Sequence[Run], kept: Sequence[Run] | None = None) -> None:
        """Say whose the rows are, in their order; and those that are kept, if not all are."""
        self._products.fill(self._all, by_adapter(runs))
        if self._kept is not self._all:
            assert kept is not None, "some logits are kept"
            self._products.fill(self._kept, by_adapter(kept))

    def add(self, site: "Site", inputs: torch.Tensor, out: torch.Tensor) -> None:
        """Add to what a linear computed of `inputs`, in place."""
        self._products.add(self._plan(site, inputs), site, inputs, out)

    def addend(self, sites: Sequence["Site"], inputs: torch.Tensor) -> torch.Tensor:
        """What there is to add to linears over the same inputs: float32 [rows, all outputs].

        It is good until the next call.
        """
        plan = self._plan(sites[0], inputs)
        widths = [site.out_features for site in sites]
        shape = inputs.numel() // inputs.shape[-1], sum(widths)
        whole = self._sums
        if whole is None or whole.shape != shape:
            whole = inputs.new_empty(shape, dtype=torch.float32)
            self._sums = None if self._is_recorded else whole
        for site, part in zip(sites, whole.split(widths, dim=1), strict=True):
            self._products.set(plan, site, inputs, part)
        return whole

    def _plan(self, site: "Site", inputs: torch.Tensor) -> Any:
        num_rows = inputs.numel() // inputs.shape[-1]
        if num_rows == self._num_rows:
            return self._all
        if site.is_head and num_rows == self._num_kept:
            return self._kept
        raise UnsupportedModel(
            f"{site.name} is called for {num_rows} rows in a step of {self._num_rows} tokens, so "
            "that it cannot be told whose they are; merge the adapter into the model"
        )


def by_adapter(runs: Sequence[Run]) -> list[Group]:
    """The rows of each table together, in the order in which the tables come."""
    groups: dict[int, Group] = {}
    row = 0
    for table, count in runs:
        if not count:
            continue
        groups.setdefault(id(table), (table, []))[1].extend(range(row, row + count))
        row += count
    return list(groups.values())


_current: ContextVar[AdapterStep | None] = ContextVar("vkv_adapter_step", default=None)


def current_step() -> AdapterStep | None:
    """That of the step which this thread computes; None where no adapter is in it."""
    return _current.get()


@contextmanager
def adapting(step: AdapterStep | None) -> Iterator[None]:
    """Have linears that are called meanwhile add what the step's adapters say."""
    if step is None:
        yield
        return
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)
