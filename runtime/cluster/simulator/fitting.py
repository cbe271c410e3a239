"""Costs of steps from steps that were measured, by least squares without negative costs."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from ....vmem.errors import InvalidConfig
from .costs import DecodeCost, PromptCost, StepCost, StepWork

_ROUNDS = 8  # of weighting
_FEW = 5  # steps, below which nothing is said of how others slow them
_FEATURES = ("prompt step", "prompt token", "pair", "decode step", "request", "context token")


class StepRecord(msgspec.Struct, frozen=True):
    """A step that was measured: a line of JSON in a file of them."""

    work: StepWork
    time_s: float


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        num_steps: that it was fitted to.
        mean_error, p95_error: of a step's time, as shares of it.
        total_error: of all steps' time together, with its sign: above 0 it says too much.
    """

    cost: StepCost
    num_steps: int
    mean_error: float
    p95_error: float
    total_error: float


def read_steps(path: Path) -> list[StepRecord]:
    """The steps of a file, one a line. Raises InvalidConfig, with the line if one is wrong."""
    decoder = msgspec.json.Decoder(StepRecord)
    found: list[StepRecord] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidConfig(f"cannot read the steps of {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise InvalidConfig(
                f"{path}, line {number} is no step: {error}; a step is such as "
                f"{msgspec.json.encode(StepRecord(StepWork(1, 1, 0, 0), 0.01)).decode()}"
            ) from error
    return found


def write_steps(path: Path, steps: Sequence[StepRecord]) -> None:
    """Write a file that `read_steps` reads."""
    path.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in steps))


def fit_step_cost(steps: Sequence[StepRecord]) -> Fit:
    """The costs that explain `steps` best, by squared errors, each a share of what they say of it.

    Found by weighting again and again. Shares of what was measured would favour steps that
    happened to be short, and say too little of all together.

    Raises InvalidConfig where there are fewer steps than costs, or a time that is not positive.
    """
    if len(steps) < len(_FEATURES) or min(step.time_s for step in steps) <= 0:
        raise InvalidConfig(
            f"{len(steps)} steps cannot be fitted: use {len(_FEATURES)} or more, with prompts and "
            "decodes of several sizes among them, and times above 0"
        )
    times = np.array([step.time_s for step in steps])
    features = np.array([_features(step.work) for step in steps])
    said, found = np.full(len(times), times.mean()), np.zeros(len(_FEATURES))
    for _ in range(_ROUNDS):
        found = non_negative_least_squares(features / said[:, None], times / said)
        said = np.maximum(features @ found, 1e-3 * times.mean())
    errors = np.abs(said / times - 1)
    prompt_step, token, pair, decode_step, request, context = map(float, found)
    return Fit(
        cost=StepCost(
            prompt=PromptCost(step_s=prompt_step, token_s=token, pair_s=pair),
            decode=(DecodeCost(step_s=decode_step, request_s=request, context_s=context),),
        ),
        num_steps=len(steps),
        mean_error=float(errors.mean()),
        p95_error=float(np.percentile(errors, 95)),
        total_error=float(said.sum() / times.sum() - 1),
    )


def fit_beside(
    steps: Sequence[StepRecord], beside: Sequence[float]
) -> tuple[Fit, tuple[float, ...]]:
    """The costs of steps, and how many times as long they take where others compute beside them.

    Found in turns: costs of times without the others' part, and that part of what is left. More
    that compute never make a step shorter.

    Args:
        beside: of each step, how many instances computed during it in the mean, its own included.

    Returns the fit, whose errors are those of both together, and the factors as of
    `ClusterConfig.slowdown`. Raises InvalidConfig as `fit_step_cost` does.
    """
    counts = np.maximum(1, np.rint(beside)).astype(int)
    times = np.array([step.time_s for step in steps])
    factors = np.ones(counts.max(initial=1) + 1)  # by count
    fit = fit_step_cost(steps)
    for _ in range(_ROUNDS):
        alone = [
            StepRecord(step.work, step.time_s / float(factors[count]))
            for step, count in zip(steps, counts, strict=True)
        ]
        fit = fit_step_cost(alone)
        said = np.array([fit.cost.step_s(step.work) for step in steps])
        for count in range(1, len(factors)):
            there = counts == count
            if there.sum() >= _FEW:
                factors[count] = times[there].sum() / said[there].sum()
            elif count > 1:
                factors[count] = factors[count - 1]
        factors[0] = 0.0  # of none
        factors = np.maximum.accumulate(factors / factors[1])
    said = np.array([fit.cost.step_s(step.work) for step in steps]) * factors[counts]
    errors = np.abs(said / times - 1)
    fit = msgspec.structs.replace(
        fit,
        mean_error=float(errors.mean()),
        p95_error=float(np.percentile(errors, 95)),
        total_error=float(said.sum() / times.sum() - 1),
    )
    return fit, tuple(map(float, factors[1:]))


def non_negative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 for which |a x - b| is least; `a` [rows, columns], `b` [rows].

    Source: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1
    a = a / scale  # columns differ by many orders of magnitude
    num_columns = a.shape[1]
    x, is_free = np.zeros(num_columns), np.zeros(num_columns, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(a.T @ b).max(initial=0)))
    for _ in range(3 * num_columns):
        gradient = a.T @ (b - a @ x)
        gradient[is_free] = -np.inf
        if is_free.all() or gradient.max() <= tolerance:
            break
        is_free[gradient.argmax()] = True
        while True:
            best = np.zeros(num_columns)
            best[is_free] = np.linalg.lstsq(a[:, is_free], b, rcond=None)[0]
            is_over = is_free & (best <= 0)
            if not is_over.any():
                x = best
                break
            # Go from x towards it until the first would be negative, and fix that one at 0.
            steps = x[is_over] / np.maximum(x[is_over] - best[is_over], 1e-300)
            x = x + steps.min() * (best - x)
            is_free &= x > 1e-15
            x[~is_free] = 0
    return x / scale


def _features(work: StepWork) -> tuple[float, ...]:
    """As `_FEATURES`. A step with prompts pays for no decode step (`StepCost`)."""
    has_prompts = work.prompt_tokens > 0
    return (
        float(has_prompts),
        work.prompt_tokens,
        work.prompt_pairs,
        float(not has_prompts),
        work.num_decodes,
        work.context_tokens,
    )
