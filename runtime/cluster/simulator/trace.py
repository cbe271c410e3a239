"""What a simulated cluster is asked, and what became of it."""

import msgspec
import numpy as np

from ....vmem.errors import InvalidConfig


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a trace.

    Attributes:
        arrival_s: from the beginning of the trace.
        prefix, prefix_tokens: requests of the same `prefix` begin with the same so many tokens.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    tenant: str = ""
    prefix: str = ""
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1 or self.arrival_s < 0:
            raise InvalidConfig(
                f"a request of {self.prompt_tokens} and {self.output_tokens} tokens at "
                f"{self.arrival_s} s: use a token at least of each, and a time from 0 on"
            )
        if not 0 <= self.prefix_tokens <= self.prompt_tokens:
            raise InvalidConfig(
                f"prefix_tokens is {self.prefix_tokens} of a prompt of {self.prompt_tokens}"
            )


class Served(msgspec.Struct, kw_only=True):
    """What became of a request. Times are from the beginning of the trace.

    Attributes:
        arrived_s: when it came: as the trace says, or once a client had its last answer.
        first_s, last_s: when its first and its last token were there.
        num_tokens: that it got.
        longest_gap_s: between two of its tokens.
        num_moves: times that it went on elsewhere.
        failure: why it got no more; empty for one that is whole.
    """

    request: TraceRequest
    arrived_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    longest_gap_s: float = 0.0
    num_moves: int = 0
    failure: str = ""

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return self.first_s - self.arrived_s

    @property
    def e2e_s(self) -> float:
        """From arrival to the last token."""
        return self.last_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None if there is none."""
        if self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)

    def note_tokens(self, count: int, first_s: float, last_s: float, gap_s: float) -> None:
        """Tokens came: `count` of them from `first_s` to `last_s`, `gap_s` apart at most."""
        if not self.num_tokens:
            self.first_s = first_s
        elif first_s - self.last_s > gap_s:
            gap_s = first_s - self.last_s
        self.num_tokens += count
        self.last_s = last_s
        if gap_s > self.longest_gap_s:
            self.longest_gap_s = gap_s


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What requests are promised: a first token in so long, and each further one.

    Attributes:
        share: of requests for which both must be kept.
        is_joint: by the same requests; else each by so many, as DistServe's own search asks.
    """

    ttft_s: float
    tpot_s: float
    share: float = 0.9
    is_joint: bool = True

    def __post_init__(self) -> None:
        if min(self.ttft_s, self.tpot_s) <= 0 or not 0 < self.share <= 1:
            raise InvalidConfig(
                f"ttft_s {self.ttft_s}, tpot_s {self.tpot_s}, share {self.share}: use times above "
                "0, and a share above 0 and at most 1"
            )


class Attainment(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of requests for which promises were kept."""

    ttft: float
    tpot: float
    both: float

    def meets(self, slo: Slo) -> bool:
        """Whether that is enough."""
        reached = self.both if slo.is_joint else min(self.ttft, self.tpot)
        return reached >= slo.share


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run, simulated or real.

    Attributes:
        served: in the order of the trace.
        duration_s: until the last token.
        num_steps: that instances computed.
        num_scheduled: of those, how many the scheduler was asked for; the others followed as they
            must, and were not asked for one by one.
        num_preemptions: slots taken away to be computed again.
        num_moves, num_refused: moves that were made, and that came to nothing.
        bytes_moved: that were copied for it.
        num_held_back: newcomers that no instance took at once.
        instance_s: that instances existed for, together.
        most_instances: at one time.
        busy: share of its time that each instance computed, by its id.
        most_used: share of its memory that each had in use at most, by its id.
        lent_tokens: that went from one instance to another as a loan.
        num_loans_lost: loans that were called back, so that their requests were computed again.
    """

    served: list[Served]
    duration_s: float
    num_steps: int
    num_scheduled: int
    num_preemptions: int
    num_moves: int
    num_refused: int
    bytes_moved: int
    num_held_back: int
    instance_s: float
    most_instances: int
    busy: dict[int, float]
    most_used: dict[int, float]
    lent_tokens: int = 0
    num_loans_lost: int = 0

    @property
    def whole(self) -> list[Served]:
        """Requests that got all of their tokens."""
        return [one for one in self.served if not one.failure]

    def attainment(self, slo: Slo) -> Attainment:
        """Of all requests; one that failed kept nothing."""
        count = max(1, len(self.served))
        first = [not one.failure and one.ttft_s <= slo.ttft_s for one in self.served]
        each = [not one.failure and (one.tpot_s or 0.0) <= slo.tpot_s for one in self.served]
        both = sum(a and b for a, b in zip(first, each, strict=True))
        return Attainment(ttft=sum(first) / count, tpot=sum(each) / count, both=both / count)

    def goodput(self, slo: Slo) -> float:
        """Requests a second that both promises were kept for."""
        return self.attainment(slo).both * len(self.served) / max(self.duration_s, 1e-9)

    def percentiles(self, *shares: float) -> dict[str, list[float]]:
        """Of TTFT, TPOT, E2E and the longest gap, in seconds; `shares` in percent."""
        whole = self.whole
        columns = {
            "ttft": [one.ttft_s for one in whole],
            "tpot": [one.tpot_s for one in whole if one.tpot_s is not None],
            "e2e": [one.e2e_s for one in whole],
            "gap": [one.longest_gap_s for one in whole if one.num_tokens > 1],
        }
        return {
            name: [float(p) for p in np.percentile(values or [0.0], shares)]
            for name, values in columns.items()
        }
