"""When a request was queued, scheduled, and got its tokens."""

import time

from ..request.outputs import RequestMetrics
from ..request.spec import RequestSpec
from ..request.step_output import StepOutput


class RequestTimes:
    """What a request's outputs say of the time."""

    def __init__(self, spec: RequestSpec) -> None:
        self.arrival_ts = spec.arrival_time_s
        self.arrival_time = time.time() - time.monotonic() + spec.arrival_time_s
        self.queued_ts: float | None = None
        self.scheduled_ts: float | None = None
        self.first_token_ts: float | None = None
        self.last_token_ts: float | None = None
        self.finished_ts: float | None = None

    def note(self, output: StepOutput) -> None:
        """Take the times of an output."""
        if self.queued_ts is None:
            self.queued_ts, self.scheduled_ts = output.queued_time_s, output.scheduled_time_s
        if output.token_ids:
            self.last_token_ts = output.time_s
            if self.first_token_ts is None:
                self.first_token_ts = output.time_s

    def metrics(self, num_tokens: int, *, finished: bool) -> RequestMetrics:
        """All that is known, of so many tokens."""
        times = {**vars(self), "finished_ts": self.finished_ts if finished else None}
        return RequestMetrics(**times, num_generation_tokens=num_tokens)
