"""Policies that only dispatch: baselines, and enough where requests are alike."""

from collections.abc import Mapping

from ..snapshot import ClusterSnapshot, InstanceSnapshot, Newcomer, Role
from .draining import drain_moves
from .policy import Move
from .rooms import Rooms
from .scaling import Scaling
from .scores import Scores


class RoundRobin:
    """To each in turn, whatever it has. Nothing moves but what drains.

    Args:
        scaling: how many instances there should be; None for as many as there are.
    """

    name = "round_robin"

    def __init__(self, scaling: Scaling | None = None) -> None:
        self.scaling = scaling

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        able = [i for i in snapshot.instances if i.is_for_prompts]
        return able[snapshot.num_dispatched % len(able)].id if able else None

    def migrations(self, snapshot: ClusterSnapshot) -> list[Move]:
        return drain_moves(snapshot, Rooms(snapshot))

    def scale(self, snapshot: ClusterSnapshot) -> int:
        return self.scaling.wanted(snapshot) if self.scaling else len(snapshot.working)

    def roles(self, snapshot: ClusterSnapshot) -> Mapping[int, Role]:
        return {}


class LeastLoaded(RoundRobin):
    """To the one with the fewest live requests; of equals, to the one with the fewest tokens; or to
    one about as good where more of what it needs is in memory."""

    name = "least_loaded"

    def __init__(self, scaling: Scaling | None = None) -> None:
        super().__init__(scaling)
        self._scores = Scores(_emptiness)

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        best = self._scores.best_for(snapshot.instances, newcomer)
        return best.id if best is not None else None


def _emptiness(instance: InstanceSnapshot) -> float:
    if not instance.is_for_prompts:
        return float("-inf")
    tokens = instance.used_tokens + instance.queued_tokens
    return -instance.num_requests - tokens / (tokens + 1e9)  # tokens decide between equals alone
