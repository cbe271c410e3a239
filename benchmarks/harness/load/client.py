"""Requests that arrive while others run, and when each of their tokens came."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..driver import Driver
from .workloads import WorkItem


@dataclass
class RequestTrace:
    """One request, in seconds since the start.

    Attributes:
        num_prompt_tokens: length of its prompt.
        arrival_s: when it was due, whether or not the engine was busy.
        token_times_s: when each of its output tokens was there.
    """

    num_prompt_tokens: int
    arrival_s: float
    token_times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token, queueing included."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """From arrival to the last token."""
        return self.token_times_s[-1] - self.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        times = self.token_times_s
        return [after - before for before, after in pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None if there is none."""
        gaps = self.gaps_s
        return sum(gaps) / len(gaps) if gaps else None


@dataclass
class Trace:
    """What a run came to.

    Attributes:
        requests: in the order of arrival, all of them finished.
        step_tokens: tokens that went through the model, by step.
        step_ends_s: when each step was over.
    """

    requests: list[RequestTrace] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_ends_s: list[float] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """From the start to the last token."""
        return self.step_ends_s[-1]


def drive(
    driver: Driver,
    work: Sequence[WorkItem],
    arrivals_s: Sequence[float],
    *,
    on_finish: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Trace:
    """Run `work` in real time, greedily and to its full length.

    Request `i` arrives at `arrivals_s[i]`. What lies beyond `arrivals_s` comes as it does from
    clients that wait for their answer and ask again: one whenever another has finished.
    """
    trace, of_request = Trace(), dict[str, RequestTrace]()
    due = deque(arrivals_s[: len(work)])
    to_follow = len(work) - len(due)
    computed = driver.num_computed_tokens
    start = clock()
    while due or driver.has_work:
        now = clock() - start
        while due and due[0] <= now:
            index = len(trace.requests)
            item = work[index]
            trace.requests.append(RequestTrace(len(item.prompt), due.popleft()))
            of_request[str(index)] = trace.requests[-1]
            driver.submit(
                str(index),
                item.prompt,
                item.num_output_tokens,
                tenant=item.tenant,
                model=item.model,
            )
        if not driver.has_work:
            sleep(due[0] - now)
            continue
        advanced = driver.step()
        now = clock() - start
        before, computed = computed, driver.num_computed_tokens
        trace.step_tokens.append(computed - before)
        trace.step_ends_s.append(now)
        for token in advanced:
            of_request[token.request_id].token_times_s.append(now)
            if token.is_finished:
                on_finish()
                if to_follow:
                    to_follow -= 1
                    due.append(now)
    return trace
