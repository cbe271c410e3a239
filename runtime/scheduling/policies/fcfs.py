"""First come, first served."""

from collections.abc import Sequence

from ..plan import LinesKind
from ..snapshot import RunningRequest, Snapshot, WaitingRequest


class Fcfs:
    """Who came first is admitted first, and who was admitted last gives way."""

    name = "fcfs"
    lines: LinesKind = "arrival"

    def rank(self, priority: int, waited_s: float) -> float:
        return -waited_s

    def newcomers(self, snapshot: Snapshot, count: int) -> Sequence[WaitingRequest]:
        return snapshot.waiting[:count]

    def ranked(self, running: Sequence[RunningRequest]) -> Sequence[RunningRequest]:
        return running

    def goes_before(
        self, snapshot: Snapshot, newcomer: WaitingRequest, request: RunningRequest
    ) -> bool:
        return False

    def loser(self, snapshot: Snapshot) -> RunningRequest:
        return snapshot.running[-1]

    def claims(self, snapshot: Snapshot) -> Sequence[tuple[WaitingRequest, RunningRequest]]:
        return ()
