"""What room instances have for requests that move, as a round of moves fills it."""

from collections.abc import Iterable

from ..snapshot import ClusterSnapshot, InstanceSnapshot, RequestSnapshot


class Rooms:
    """Room of instances, counted down move by move, so that a round never plans more than fits.

    Args:
        snapshot: before the round.
        kept: share of each instance's capacity that moves leave free, for requests to grow into.
    """

    def __init__(self, snapshot: ClusterSnapshot, kept: float = 0.0) -> None:
        self._tokens: dict[int, float] = {}
        self._slots: dict[int, float] = {}
        for instance in snapshot.working:
            self._tokens[instance.id] = (1 - kept) * instance.capacity_tokens - _spoken_for(
                instance
            )
            most = float("inf") if instance.max_running is None else instance.max_running
            self._slots[instance.id] = most - instance.num_requests

    def fits(self, instance: InstanceSnapshot, request: RequestSnapshot) -> bool:
        """Whether a request could go on there: its tokens, and the next one."""
        tokens = self._tokens.get(instance.id, 0)
        return tokens >= request.num_tokens + 1 and self._slots[instance.id] >= 1

    def take(self, instance: InstanceSnapshot, request: RequestSnapshot) -> None:
        """Count a request that will move there."""
        self._tokens[instance.id] -= request.num_tokens + 1
        self._slots[instance.id] -= 1

    def tokens(self, instance: InstanceSnapshot) -> float:
        """What is left."""
        return self._tokens.get(instance.id, 0)

    def roomiest(
        self, instances: Iterable[InstanceSnapshot], request: RequestSnapshot
    ) -> InstanceSnapshot | None:
        """The one with most room, if it is enough for a request."""
        fitting = [instance for instance in instances if self.fits(instance, request)]
        return max(fitting, key=self.tokens, default=None)


def _spoken_for(instance: InstanceSnapshot) -> int:
    """Tokens that are used, and those of requests that wait there already."""
    return instance.used_tokens + sum(r.num_tokens for r in instance.requests if r.is_waiting)
