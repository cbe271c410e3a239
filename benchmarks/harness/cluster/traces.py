"""Traces for the simulator: of workloads, and of what a record has measured."""

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ...runtime.cluster.simulator.costs import StepWork, pairs
from ...runtime.cluster.simulator.fitting import StepRecord
from ...runtime.cluster.simulator.trace import TraceRequest
from ..load.workloads import gamma_arrivals, lengths
from .contenders import URGENT
from .options import Load


def trace_of(load: Load, rate: float) -> list[TraceRequest]:
    """The requests of a load, `rate` of them a second. Another rate has the same requests."""
    arrivals = gamma_arrivals(load.num_requests, rate=1.0, cv=load.cv, seed=load.seed)
    rng = random.Random(f"urgent {load.seed}")
    found = []
    sizes = lengths(load.workload, load.num_requests, scale=load.scale, seed=load.seed)
    for arrival, (prompt, output) in zip(arrivals, sizes, strict=True):
        if load.most_tokens is not None:
            prompt = min(prompt, load.most_tokens - 1)
            output = min(output, load.most_tokens - prompt)
        found.append(
            TraceRequest(
                arrival_s=arrival / rate,
                prompt_tokens=prompt,
                output_tokens=output,
                priority=URGENT if rng.random() < load.urgent else 0,
            )
        )
    return found


def recorded_trace(run: Mapping[str, Any]) -> list[TraceRequest]:
    """The requests of a run in a record of `vkv bench serve`, when they came."""
    return [
        TraceRequest(arrival_s=arrival, prompt_tokens=prompt, output_tokens=output)
        for arrival, prompt, output in zip(
            run["arrivals"], run["input_lens"], run["output_lens"], strict=True
        )
    ]


def recorded_steps(run: Mapping[str, Any]) -> list[StepRecord]:
    """What each step of such a run computed, and how long it took.

    A record has the tokens of each step and when it ended. Which requests decoded in it is seen
    from when their tokens came; the rest is of prompts, the oldest first. That is so where nobody
    lost a slot (`num_preemptions` is 0).
    """
    ends: Sequence[float] = run["step_ends"]
    decodes: list[list[int]] = [[] for _ in ends]  # of each step, tokens attended to
    first_steps = []
    for arrival, ttft, gaps, prompt in zip(
        run["arrivals"], run["ttfts"], run["itls"], run["input_lens"], strict=True
    ):
        times = list(accumulate(gaps, initial=arrival + ttft))
        first_steps.append(_nearest(ends, times[0]))
        for count, at in enumerate(times[1:], start=1):
            decodes[_nearest(ends, at)].append(prompt + count)
    left = [(first, n, 0) for n, first in enumerate(first_steps)]
    found, before = [], 0.0
    for step, (end, tokens) in enumerate(zip(ends, run["step_tokens"], strict=True)):
        came = [run["arrivals"][n] for first, n, _ in left if first >= step]
        busy = bool(decodes[step]) or (came and min(came) <= before)
        start = before if busy or not came else min(came)
        before = end
        prompt_tokens = tokens - len(decodes[step])
        num_pairs, left = _computed(left, prompt_tokens, run["input_lens"])
        work = StepWork(prompt_tokens, num_pairs, len(decodes[step]), sum(decodes[step]))
        if tokens > 0 and end > start:
            found.append(StepRecord(work, end - start))
    return found


def _computed(
    left: list[tuple[int, int, int]], budget: int, prompts: Sequence[int]
) -> tuple[float, list[tuple[int, int, int]]]:
    """Pairs that attend in the next `budget` tokens of prompts, and what is then left of them."""
    num_pairs, rest = 0.0, []
    for first, number, start in left:
        count = min(budget, prompts[number] - start)
        num_pairs += pairs(start, count)
        budget -= count
        if start + count < prompts[number]:
            rest.append((first, number, start + count))
    return num_pairs, rest


def _nearest(ends: Sequence[float], at: float) -> int:
    """The step that ended at a time, but for rounding."""
    place = bisect_left(ends, at)
    around = [n for n in (place - 1, place) if 0 <= n < len(ends)]
    return min(around, key=lambda n: abs(ends[n] - at))
