"""How many instances there should be.

Source: Sun et al., Llumnix (OSDI 2024), arXiv:2406.03243, section 4.4.3.
"""

from ....vmem.errors import InvalidConfig
from ..snapshot import ClusterSnapshot
from .freeness import Freeness


class Scaling:
    """Keeps the average freeness within two bounds, by one instance at a time.

    Args:
        least, most: instances, those that drain not counted.
        below, above: average freeness, in decode steps, under which there is to be one more, and
            over which one less. The distance between them is what keeps it from swinging.
        pause_s: between two changes, so that the first has been felt.
        freeness: of an instance.
    """

    def __init__(
        self,
        *,
        least: int,
        most: int,
        below: float = 60.0,
        above: float = 300.0,
        pause_s: float = 30.0,
        freeness: Freeness | None = None,
    ) -> None:
        if not (1 <= least <= most and below < above):
            raise InvalidConfig(
                f"least {least}, most {most}, below {below}, above {above}: use 1 <= least <= most "
                "and below < above"
            )
        self.least = least
        self.most = most
        self.below = below
        self.above = above
        self.pause_s = pause_s
        self.freeness = freeness or Freeness()

    def wanted(self, snapshot: ClusterSnapshot) -> int:
        """How many there should be now."""
        working = snapshot.working
        count = len(working)
        if not self.least <= count <= self.most:
            return min(max(count, self.least), self.most)
        if snapshot.scaled_s is not None and snapshot.time_s - snapshot.scaled_s < self.pause_s:
            return count
        average = sum(map(self.freeness, working)) / count
        if average < self.below:
            return min(count + 1, self.most)
        if average > self.above:
            return max(count - 1, self.least)
        return count
