"""Requests to measure with, seeded so that every run has the same.

Published traces are regenerated from their published figures: lengths of prompts and outputs have
the quantiles and the mean that were reported, each drawn by itself. No data of theirs is here.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Protocol

import numpy as np

from ...vmem.errors import InvalidConfig


@dataclass(frozen=True)
class WorkItem:
    """A prompt, how many tokens it generates, whose it is, and which model's of several."""

    prompt: tuple[int, ...]
    num_output_tokens: int
    tenant: str = ""
    model: str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.prompt) + self.num_output_tokens


def ragged(
    count: int,
    *,
    prompt_lens: tuple[int, int],
    output_lens: tuple[int, int],
    vocab_size: int,
    seed: int = 0,
) -> Sequence[WorkItem]:
    """`count` random prompts, lengths uniform within the two bounds, ends included."""
    rng = random.Random(seed)
    return [
        WorkItem(
            tuple(rng.randrange(vocab_size) for _ in range(rng.randint(*prompt_lens))),
            rng.randint(*output_lens),
        )
        for _ in range(count)
    ]


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    def at(self, share: float) -> float:
        """The length that `share` of all lengths, in (0, 1), do not exceed."""
        ...


@dataclass(frozen=True)
class Quantiles:
    """Lengths with given mean and quantiles, geometric in between.

    Nothing is known of the hundredth beyond `p99`, so it is as long as that. The shortest length
    is the one that makes the mean come out.
    """

    mean: float
    p50: float
    p80: float
    p95: float
    p99: float

    def at(self, share: float) -> float:
        knots = [self.shortest, self.p50, self.p80, self.p95, self.p99, self.p99]
        return math.exp(np.interp(share, [0, 0.5, 0.8, 0.95, 0.99, 1], np.log(knots)))

    @cached_property
    def shortest(self) -> float:
        """Where the lower half begins, by bisection: its mean grows with that."""
        above = (
            0.3 * _mean_between(self.p50, self.p80)
            + 0.15 * _mean_between(self.p80, self.p95)
            + 0.04 * _mean_between(self.p95, self.p99)
            + 0.01 * self.p99
        )
        wanted = (self.mean - above) / 0.5
        low, high = 1e-9, self.p50
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if _mean_between(middle, self.p50) < wanted else (low, middle)
            )
        return low


@dataclass(frozen=True)
class Normal:
    """Normally distributed lengths; the spread is a share of the mean."""

    mean: float
    spread: float = 0.3

    def at(self, share: float) -> float:
        return NormalDist(self.mean, self.spread * self.mean).inv_cdf(share)


@dataclass(frozen=True)
class PowerLaw:
    """Lengths of a heavy tail: most are short, and a few are as long as `longest`.

    A length is a rank from 1 to twice the mean, drawn with probability rank^-exponent, times what
    makes the mean come out; what is beyond `longest` is cut, so that the mean is a little less.

    Source: the generator of Llumnix's artifact (AlibabaPAI/llumnix, commit 92f6f9d), which makes
    the traces of arXiv:2406.03243, table 1.
    """

    mean: int
    exponent: float
    longest: int = 6144

    def at(self, share: float) -> float:
        rank = 1 + int(np.searchsorted(self._shares, share))
        return min(rank * self._unit, self.longest)

    @cached_property
    def _shares(self) -> np.ndarray:
        """Of each rank, how many are not above it."""
        weights = np.arange(1, 2 * self.mean) ** -self.exponent
        return np.cumsum(weights / weights.sum())[:-1]  # the last one is all of them

    @cached_property
    def _unit(self) -> float:
        weights = np.diff(self._shares, prepend=0, append=1)
        return self.mean / float(weights @ np.arange(1, 2 * self.mean))


@dataclass(frozen=True)
class Traffic:
    """How long prompts and outputs are."""

    prompts: Lengths
    outputs: Lengths


FASTGEN = {
    f"fastgen-{prompt}-{output}": Traffic(Normal(prompt), Normal(output))
    for prompt in (1200, 2600)
    for output in (60, 128)
}
_POWER_LAWS = {128: PowerLaw(128, 2.0), 256: PowerLaw(256, 1.5), 512: PowerLaw(512, 1.15)}
POWER_LAW = {
    f"powerlaw-{prompt}-{output}": Traffic(_POWER_LAWS[prompt], _POWER_LAWS[output])
    for prompt, output in ((128, 128), (256, 256), (512, 512), (128, 512), (512, 128))
}
TRAFFIC: Mapping[str, Traffic] = {
    # Sources: DeepSpeed-FastGen, arXiv:2401.08671, section 4; quantiles of ShareGPT's and
    # BurstGPT's (GPT-4) conversations; of arXiv summarisation only the means are published, and
    # the spread is FastGen's. ShareGPT by turns: prompts are conversations so far, of 2,047 tokens
    # with the answer at most, as DistServe prepares them; quantiles of the 1,200 requests that its
    # repository has measured runs of (LLMServe/DistServe, commit 20a1633).
    **FASTGEN,
    **POWER_LAW,
    "sharegpt": Traffic(
        Quantiles(306, 74, 348, 1484, 3388),
        Quantiles(500, 487, 781, 988, 1234),
    ),
    "sharegpt-turns": Traffic(
        Quantiles(756, 686, 1281, 1723, 1923),
        Quantiles(189, 82, 358, 648, 977),
    ),
    "burstgpt": Traffic(
        Quantiles(830, 582, 1427, 2345, 3549),
        Quantiles(271, 243, 434, 669, 964),
    ),
    "arxiv": Traffic(Normal(29_600), Normal(363)),
    "documents": Traffic(Normal(12_000), Quantiles(500, 487, 781, 988, 1234)),
}
# A few long among many short: so many of each, in random order. "skewed" is one document, of 12,000
# tokens in the mean with ShareGPT's answers, among fifteen of ShareGPT's requests: half of all
# tokens are the documents'.
MIXED: Mapping[str, Mapping[str, int]] = {"skewed": {"sharegpt": 15, "documents": 1}}


def gamma_arrivals(count: int, *, rate: float, cv: float = 1.0, seed: int = 0) -> list[float]:
    """When `count` requests arrive, in seconds, `rate` of them a second on average.

    The times between them are Gamma distributed with the coefficient of variation `cv`: 1 is a
    Poisson process, more comes in bursts.
    """
    gaps = np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / rate, count)
    return np.cumsum(gaps).tolist()


def swung(arrivals_s: Sequence[float], *, swing: float, period_s: float) -> list[float]:
    """Arrivals whose rate rises and falls like a sine, by `swing` of its mean, from its mean on."""
    if not swing or not arrivals_s:
        return list(arrivals_s)
    turn = 2 * math.pi / period_s
    times = np.linspace(0, arrivals_s[-1] + period_s, 1 + int(64 * (2 + arrivals_s[-1] / period_s)))
    due = times + swing / turn * (1 - np.cos(turn * times))  # how many are, at a rate of 1 a second
    return np.interp(arrivals_s, due, times).tolist()


def traffic(
    name: str, count: int, *, scale: float = 1.0, vocab_size: int, seed: int = 0
) -> list[WorkItem]:
    """`count` requests with the lengths of `TRAFFIC[name]` times `scale`, and random prompts.

    Every equal part of the distribution is drawn from once, in random order, so that few requests
    have its quantiles too. Raises InvalidConfig for an unknown name.
    """
    rng = random.Random(seed)
    return [
        WorkItem(tuple(rng.choices(range(vocab_size), k=prompt)), output)
        for prompt, output in _lengths(name, count, scale, rng)
    ]


def lengths(name: str, count: int, *, scale: float = 1.0, seed: int = 0) -> list[tuple[int, int]]:
    """Tokens of prompt and output of the requests of `traffic`, without the prompts.

    Raises InvalidConfig for an unknown name.
    """
    return _lengths(name, count, scale, random.Random(seed))


def _lengths(name: str, count: int, scale: float, rng: random.Random) -> list[tuple[int, int]]:
    if name in MIXED:
        return _mixed(MIXED[name], count, scale, rng)
    if name not in TRAFFIC:
        known = ", ".join((*TRAFFIC, *MIXED))
        raise InvalidConfig(f"workload is {name!r}; use fastgen or one of {known}")
    prompts = _draw(TRAFFIC[name].prompts, count, scale, rng)
    outputs = _draw(TRAFFIC[name].outputs, count, scale, rng)
    return list(zip(prompts, outputs, strict=True))


def _mixed(
    parts: Mapping[str, int], count: int, scale: float, rng: random.Random
) -> list[tuple[int, int]]:
    """Of each kind as many as its part says, but for rounding; the first has the rest."""
    total = sum(parts.values())
    counts = {name: round(count * part / total) for name, part in parts.items()}
    first = next(iter(parts))
    counts[first] += count - sum(counts.values())
    found = [
        pair for name, part in counts.items() if part for pair in _lengths(name, part, scale, rng)
    ]
    rng.shuffle(found)
    return found


def _draw(lengths: Lengths, count: int, scale: float, rng: random.Random) -> list[int]:
    """One length from each of `count` equal parts, shuffled; at least one token."""
    shares = [(part + rng.uniform(1e-9, 1)) / count for part in range(count)]
    rng.shuffle(shares)
    return [max(1, round(lengths.at(min(share, 1 - 1e-9)) * scale)) for share in shares]


def _mean_between(low: float, high: float) -> float:
    """The mean of lengths that go from `low` to `high` geometrically."""
    return high if low == high else (high - low) / math.log(high / low)
