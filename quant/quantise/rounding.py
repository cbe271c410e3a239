"""Rounding to 4 bits: grids for groups of columns, and the search for where to clip them."""

from dataclasses import dataclass

import torch

from ..weight import SYMMETRIC_ZERO, Int4Weight

_CODES = 15
_CLIP_RATIOS = tuple(1 - step / 40 for step in range(21))  # from the whole range down to half


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that the columns of a group may take: `(code - zero) * scale`.

    Attributes:
        scales: float32 [N, G], already rounded to what the checkpoint stores.
        zeros: float32 [N, G], whole numbers from 0 to 15; 8 throughout if symmetric.
    """

    scales: torch.Tensor
    zeros: torch.Tensor

    def codes(self, groups: torch.Tensor) -> torch.Tensor:
        """The nearest codes, still float32, of `groups` [N, G, columns]."""
        steps = torch.round(groups / self.scales.unsqueeze(-1))
        return (steps + self.zeros.unsqueeze(-1)).clamp_(0, _CODES)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What `codes` [N, G, columns] stand for."""
        return (codes - self.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How grids are laid.

    Attributes:
        group_size: columns that share a scale; -1 for all of a row.
        symmetric: the zero point is 8 everywhere; otherwise each group has its own.
        clip: search, for every group, how much of its range to give up for a finer step.
        scale_dtype: what the checkpoint stores scales in.
    """

    group_size: int = 128
    symmetric: bool = True
    clip: bool = True
    scale_dtype: torch.dtype = torch.float16

    def columns_per_group(self, in_features: int) -> int:
        """The group size, with -1 resolved."""
        return in_features if self.group_size == -1 else self.group_size

    def fit(self, groups: torch.Tensor, importance: torch.Tensor | None = None) -> Grid:
        """A grid for every group.

        Args:
            groups: float32 [N, G, columns].
            importance: float32 [G, columns], how much the square of an error weighs in each
                column: the diagonal of the Hessian. None weighs all alike.

        Source: MARLIN, arXiv:2408.11743, section 4 (clipping thresholds searched by group).
        """
        low = groups.amin(-1).clamp(max=0)
        high = groups.amax(-1).clamp(min=0)
        best = self._grid(low, high)
        if not self.clip:
            return best
        least = _error(groups, best, importance)
        for ratio in _CLIP_RATIOS[1:]:
            grid = self._grid(low * ratio, high * ratio)
            error = _error(groups, grid, importance)
            better = error < least
            least = torch.where(better, error, least)
            best = Grid(
                scales=torch.where(better, grid.scales, best.scales),
                zeros=torch.where(better, grid.zeros, best.zeros),
            )
        return best

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        if self.symmetric:
            span = torch.maximum(high / (_CODES - SYMMETRIC_ZERO), low / -SYMMETRIC_ZERO)
        else:
            span = (high - low) / _CODES
        info = torch.finfo(self.scale_dtype)
        # A group of zeros, or of values too small to store a scale for, still needs one to divide
        # by; the smallest normal number is in reach of every kernel.
        stored = span.clamp(info.smallest_normal, info.max).to(self.scale_dtype)
        scales = stored.to(torch.float32)
        if self.symmetric:
            return Grid(scales=scales, zeros=torch.full_like(scales, SYMMETRIC_ZERO))
        return Grid(scales=scales, zeros=torch.round(-low / scales).clamp_(0, _CODES))


def round_to_nearest(
    weight: torch.Tensor, rounding: Rounding, importance: torch.Tensor | None = None
) -> Int4Weight:
    """Every element of `weight` [N, K] to the nearest value of its group's grid.

    `importance` is float32 [K], as in `Rounding.fit`. K must divide into groups.
    """
    columns = rounding.columns_per_group(weight.shape[1])
    groups = weight.detach().to(torch.float32).unflatten(1, (-1, columns))
    weighed = None if importance is None else importance.unflatten(0, (-1, columns))
    grid = rounding.fit(groups, weighed)
    return as_weight(grid.codes(groups).flatten(1), grid, rounding)


def as_weight(codes: torch.Tensor, grid: Grid, rounding: Rounding) -> Int4Weight:
    """Codes [N, K], whole numbers in floating point, with their grid."""
    return Int4Weight.from_codes(
        codes.to(torch.uint8),
        grid.scales.to(rounding.scale_dtype),
        None if rounding.symmetric else grid.zeros.to(torch.uint8),
    )


def _error(groups: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> torch.Tensor:
    """The squared error of every group, [N, G]."""
    squares = (grid.values(grid.codes(groups)) - groups).square_()
    return (squares if importance is None else squares * importance).sum(-1)
