"""Conversations of several turns whose priorities change: FastSwitch's experiment.

Each turn asks with all that was said before, some time after the last answer. Priorities are drawn
anew every so many steps, at random or by a Markov chain, and are the same in every run.

Source: FastSwitch, arXiv:2411.18424, section 5.
"""

import heapq
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..driver import Driver
from .client import RequestTrace, Trace
from .workloads import TRAFFIC, gamma_arrivals

LEVELS = 8  # priorities are 0 to 7, the lower the earlier
_STAYS = 0.7  # of a Markov chain; else one level up or down


@dataclass(frozen=True)
class Turn:
    """What is said: new tokens, how many are answered, and how long the next turn takes to come."""

    tokens: tuple[int, ...]
    num_output_tokens: int
    pause_s: float


@dataclass(frozen=True)
class Conversation:
    """Turns, and when the first of them comes."""

    arrival_s: float
    turns: tuple[Turn, ...]


def conversations(
    count: int,
    *,
    rate: float,
    mean_turns: float,
    pause_s: float,
    scale: float,
    max_len: int,
    vocab_size: int,
    seed: int,
) -> list[Conversation]:
    """`count` conversations, `rate` of them a second (Poisson), of `mean_turns` turns in the mean.

    Prompts and answers are as long as ShareGPT's, times `scale`. A conversation ends before it
    outgrows `max_len` tokens.
    """
    rng = random.Random(seed)
    lengths = TRAFFIC["sharegpt"]

    def length(of: str) -> int:
        return max(1, round(getattr(lengths, of).at(rng.uniform(1e-9, 1 - 1e-9)) * scale))

    found = []
    for arrival_s in gamma_arrivals(count, rate=rate, seed=seed):
        num_turns = 1 + np.random.default_rng(rng.getrandbits(32)).poisson(mean_turns - 1)
        turns: list[Turn] = []
        total = 0
        for _ in range(num_turns):
            prompt, output = length("prompts"), length("outputs")
            total += prompt + output
            if total > max_len:
                break
            tokens = tuple(rng.choices(range(vocab_size), k=prompt))
            turns.append(Turn(tokens, output, rng.expovariate(1 / pause_s)))
        if turns:
            found.append(Conversation(arrival_s, tuple(turns)))
    return found


def priority_changes(kind: str, count: int, *, seed: int) -> Iterator[list[int]]:
    """The priorities of `count` conversations, change by change: "random" or "markov"."""
    rng = random.Random(seed)
    levels = [rng.randrange(LEVELS) for _ in range(count)]
    while True:
        yield list(levels)
        for index in range(count):
            if kind == "random":
                levels[index] = rng.randrange(LEVELS)
            elif rng.random() > _STAYS:
                levels[index] = min(LEVELS - 1, max(0, levels[index] + rng.choice((-1, 1))))


def converse(
    driver: Driver,
    work: Sequence[Conversation],
    changes: Iterator[list[int]],
    *,
    steps_between: int,
    on_turn: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Trace:
    """Run conversations in real time; priorities change every `steps_between` steps."""
    trace = Trace()
    said: list[list[int]] = [[] for _ in work]  # what each conversation holds
    due = [(one.arrival_s, index, 0) for index, one in enumerate(work)]
    heapq.heapify(due)
    running: dict[str, tuple[int, int, RequestTrace]] = {}
    levels = next(changes)
    computed, start = driver.num_computed_tokens, clock()
    for step in itertools.count():
        now = clock() - start
        while due and due[0][0] <= now:
            at_s, index, number = heapq.heappop(due)
            turn = work[index].turns[number]
            said[index].extend(turn.tokens)
            request = RequestTrace(len(said[index]), at_s)
            trace.requests.append(request)
            name = f"{index}/{number}"
            running[name] = index, number, request
            driver.submit(name, list(said[index]), turn.num_output_tokens, priority=levels[index])
        if not driver.has_work:
            if not due:
                return trace
            sleep(max(0.0, due[0][0] - now))
            continue
        if step % steps_between == steps_between - 1:
            levels = next(changes)
            for name, (index, _, _) in running.items():
                driver.set_priority(name, levels[index])
        advanced = driver.step()
        now = clock() - start
        before, computed = computed, driver.num_computed_tokens
        trace.step_tokens.append(computed - before)
        trace.step_ends_s.append(now)
        for token in advanced:
            index, number, request = running[token.request_id]
            request.token_times_s.append(now)
            said[index].append(token.token_id)
            if token.is_finished:
                del running[token.request_id]
                on_turn()
                turn = work[index].turns[number]
                if number + 1 < len(work[index].turns):
                    heapq.heappush(due, (now + turn.pause_s, index, number + 1))
    raise AssertionError("unreachable")
