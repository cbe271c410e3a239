"""By priority: the lower number first, and age, so that nobody waits for ever."""

from collections.abc import Sequence

from ..plan import LinesKind
from ..snapshot import RunningRequest, Snapshot, WaitingRequest

AGING_S = 60.0


class Priority:
    """The better priority, which is the lower number, goes first; of equals, who came first.

    **Age.** For each `aging_s` that a request waits it counts as one priority better in line, and
    what it counts as when it is admitted it keeps while it runs. So a request stands behind none
    of priority q that comes more than `(p - q) * aging_s` after it, nor loses its place to one.

    **Places.** A waiting request takes the place, or the memory, of a running one if its own
    priority is better than what that one counts as: of the worst, and of equals of the last
    admitted. Age takes nobody's place, or equals would drive each other out as they grow older.

    Args:
        aging_s: None for never: a better priority always goes first.
    """

    name = "priority"
    lines: LinesKind = "priority"

    def __init__(self, aging_s: float | None = AGING_S) -> None:
        self.aging_s = aging_s

    def rank(self, priority: int, waited_s: float) -> float:
        return priority if self.aging_s is None else priority - waited_s / self.aging_s

    def level(self, request: RunningRequest) -> int:
        """The priority that a running request counts as."""
        if self.aging_s is None:
            return request.priority
        return request.priority - int(request.waited_s / self.aging_s)

    def newcomers(self, snapshot: Snapshot, count: int) -> Sequence[WaitingRequest]:
        return sorted(snapshot.waiting, key=self._place_in_line)[:count]

    def _place_in_line(self, request: WaitingRequest) -> tuple[float, float]:
        return self.rank(request.priority, request.waited_s), -request.waited_s

    def ranked(self, running: Sequence[RunningRequest]) -> Sequence[RunningRequest]:
        return sorted(running, key=self.level)

    def goes_before(
        self, snapshot: Snapshot, newcomer: WaitingRequest, request: RunningRequest
    ) -> bool:
        return newcomer.priority < self.level(request)

    def loser(self, snapshot: Snapshot) -> RunningRequest:
        return self.ranked(snapshot.running)[-1]

    def claims(self, snapshot: Snapshot) -> Sequence[tuple[WaitingRequest, RunningRequest]]:
        if snapshot.short is not None:
            claimants = [r for r in snapshot.waiting if r.key == snapshot.short]
        elif snapshot.num_free <= 0:
            claimants = sorted(snapshot.waiting, key=lambda r: (r.priority, -r.waited_s))
        else:
            return ()
        found: list[tuple[WaitingRequest, RunningRequest]] = []
        losers = self.ranked(snapshot.running)[::-1]
        num_pages = snapshot.pages_obtainable
        for claimant, loser in zip(claimants, losers, strict=False):
            if claimant.priority >= self.level(loser):
                break
            needed = snapshot.num_pages(claimant.num_tokens)
            if needed > num_pages + self._num_pages_below(claimant, losers[len(found) :], snapshot):
                break  # all their memory together would not do
            num_pages += snapshot.num_pages(loser.num_tokens) - needed
            found.append((claimant, loser))
        return found

    def _num_pages_below(
        self, claimant: WaitingRequest, running: Sequence[RunningRequest], snapshot: Snapshot
    ) -> int:
        """Pages of running requests whose place it could take."""
        return sum(
            snapshot.num_pages(r.num_tokens) for r in running if claimant.priority < self.level(r)
        )
