"""GPTQ: rounding column by column, each error made up for by the columns still to come."""

import torch

from ...vmem.errors import QuantError
from ..weight import Int4Weight
from .rounding import Grid, Rounding, as_weight

_BLOCK = 128  # columns whose errors reach the rest of the matrix in one product


class Hessian:
    """The second moment of a linear layer's inputs, gathered batch by batch in float32.

    The squared error of the layer's outputs, averaged over the tokens seen, is
    `trace(D @ matrix @ D.T)` for an error D of the weight.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(in_features, in_features, device=device)
        self.num_tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in `inputs` [..., in_features]."""
        rows = inputs.detach().flatten(0, -2).to(self.matrix)
        total = self.num_tokens + rows.shape[0]
        self.matrix.mul_(self.num_tokens / total).addmm_(rows.T, rows, alpha=1 / total)
        self.num_tokens = total

    def diagonal(self) -> torch.Tensor:
        """The mean square of every input feature, [in_features]."""
        return self.matrix.diagonal()

    def output_error(self, weight: torch.Tensor, other: torch.Tensor) -> float:
        """How far the layer's outputs move from `weight` to `other`, relative to their size."""
        wrong = _energy((weight - other).to(self.matrix), self.matrix)
        whole = _energy(weight.to(self.matrix), self.matrix)
        return float((wrong / whole.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).sqrt())


def gptq(
    weight: torch.Tensor, hessian: Hessian, rounding: Rounding, *, damping: float = 0.01
) -> Int4Weight:
    """Quantise `weight` [N, K] so that the layer's outputs, not its weights, stay put.

    Args:
        damping: added to the Hessian's diagonal, as a share of its mean.

    Raises QuantError if the inputs gathered are not finite.
    Source: GPTQ, arXiv:2210.17323, algorithm 1; clipping of groups: MARLIN, arXiv:2408.11743.
    """
    rest = weight.detach().to(torch.float32).clone()
    unused = hessian.diagonal() == 0
    rest[:, unused] = 0  # nothing ever arrives there, so any value will do
    factor = _inverse_factor(hessian.matrix, unused, damping)
    importance = hessian.diagonal()

    num_columns = rest.shape[1]
    group = rounding.columns_per_group(num_columns)
    block = max(1, _BLOCK // group) * group if group <= _BLOCK else _BLOCK  # no group straddles
    codes = torch.empty_like(rest)
    grids: list[Grid] = []
    for start in range(0, num_columns, block):
        end = min(start + block, num_columns)
        errors = torch.empty_like(rest[:, start:end])
        for column in range(start, end):
            if column % group == 0:
                span = slice(column, column + group)
                grids.append(rounding.fit(rest[:, None, span], importance[None, span]))
            value = rest[:, column]
            code = grids[-1].codes(value[:, None, None])
            codes[:, column] = code.flatten()
            error = (value - grids[-1].values(code).flatten()) / factor[column, column]
            rest[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    scales, zeros = (
        torch.cat([getattr(g, name) for g in grids], 1) for name in ("scales", "zeros")
    )
    return as_weight(codes, Grid(scales=scales, zeros=zeros), rounding)


def _inverse_factor(matrix: torch.Tensor, unused: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    if not torch.isfinite(matrix).all():
        raise QuantError(
            "the inputs of this layer are not all finite on the calibration text; check the "
            "model, or load it in float32"
        )
    damped = matrix.clone()
    diagonal = damped.diagonal()  # a view
    diagonal[unused] = 1
    diagonal += damping * diagonal.mean()
    while True:
        lower, failure = torch.linalg.cholesky_ex(damped)
        if not failure:
            break
        diagonal += damping * diagonal.mean()  # few tokens leave it singular to float32
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _energy(weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return ((weight @ matrix) * weight).sum()
