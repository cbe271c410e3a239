"""What room instances have for requests that move, as a round of moves fills it."""

from collections.abc import Callable, Iterable

from ..snapshot import ClusterSnapshot, InstanceSnapshot, RequestSnapshot

AS_GOOD = 0.9  # of the best: to be near is worth the rest


class Rooms:
    """Room of instances, counted down move by move, so that a round never plans more than fits.

    Args:
        snapshot: before the round.
        kept: share of each instance's capacity that moves leave free, for requests to grow into;
            not for the first on one that has none, which would else fit nowhere for good.
    """

    def __init__(self, snapshot: ClusterSnapshot, kept: float = 0.0) -> None:
        self._snapshot = snapshot
        self._tokens: dict[int, float] = {}
        self._slots: dict[int, float] = {}
        self._spare: dict[int, float] = {}  # of what is kept, for the first alone
        for instance in snapshot.working:
            self._tokens[instance.id] = (1 - kept) * instance.capacity_tokens - _spoken_for(
                instance
            )
            most = float("inf") if instance.max_running is None else instance.max_running
            self._slots[instance.id] = most - instance.num_requests
            is_empty = not instance.num_requests
            self._spare[instance.id] = kept * instance.capacity_tokens if is_empty else 0.0

    def fits(self, instance: InstanceSnapshot, request: RequestSnapshot) -> bool:
        """Whether a request could go on there: its tokens, and the next one."""
        tokens = self._tokens.get(instance.id, 0) + self._spare.get(instance.id, 0)
        return tokens >= request.num_tokens + 1 and self._slots[instance.id] >= 1

    def take(self, instance: InstanceSnapshot, request: RequestSnapshot) -> None:
        """Count a request that will move there."""
        self._tokens[instance.id] -= request.num_tokens + 1
        self._slots[instance.id] -= 1
        self._spare[instance.id] = 0.0

    def tokens(self, instance: InstanceSnapshot) -> float:
        """What is left."""
        return self._tokens.get(instance.id, 0)

    def roomiest(
        self,
        instances: Iterable[InstanceSnapshot],
        request: RequestSnapshot,
        source: InstanceSnapshot,
    ) -> InstanceSnapshot | None:
        """The one with most room, if it is enough for a request; or one `nearer` to its source."""
        fitting = [instance for instance in instances if self.fits(instance, request)]
        best = max(fitting, key=self.tokens, default=None)
        return best and nearer(self._snapshot, source, best, fitting, self.tokens)


def nearer(
    snapshot: ClusterSnapshot,
    source: InstanceSnapshot,
    best: InstanceSnapshot,
    others: Iterable[InstanceSnapshot],
    worth: Callable[[InstanceSnapshot], float],
) -> InstanceSnapshot:
    """The best of several targets; or, if a move there takes bytes, one that is about as good and
    to which pages go as they are."""
    if not snapshot.is_copied(source, best):
        return best
    near = (other for other in others if not snapshot.is_copied(source, other))
    found = max(near, key=worth, default=best)
    return found if worth(found) >= AS_GOOD * worth(best) else best


def _spoken_for(instance: InstanceSnapshot) -> int:
    """Tokens that are used, and those of requests that wait there already."""
    return instance.used_tokens + sum(r.num_tokens for r in instance.requests if r.is_waiting)
