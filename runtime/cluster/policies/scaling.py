"""How many instances there should be.

Source: Sun et al., Llumnix (OSDI 2024), arXiv:2406.03243, section 4.4.3.
"""

import math

from ....vmem.errors import InvalidConfig
from ..snapshot import ClusterSnapshot
from .freeness import Freeness

_MOST_LESS = 8  # of so many instances one, at least, may leave at once


class Scaling:
    """Keeps the freeness of the cluster within two bounds.

    It is that of one instance as large as all of them: what is free together, over all requests
    that run. The mean of theirs, which the paper takes, says little: an idle instance is as free as
    it is large, and one among many that are short of memory hides them all.

    Beyond a bound there are to be as many instances as bring it to the middle of the two: more at
    once, and fewer by an eighth of them at most, as those that leave hand over what they have.

    Args:
        least, most: instances, those that drain not counted.
        below, above: freeness, in decode steps, under which there are to be more, and over which
            fewer. The distance between them is what keeps it from swinging.
        pause_s: between two changes, so that the first has been felt.
        freeness: what requests count as.
    """

    def __init__(
        self,
        *,
        least: int,
        most: int,
        below: float = 400.0,
        above: float = 1200.0,
        pause_s: float = 10.0,
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
        used = sum(map(self.freeness.virtual_tokens, working))
        running = max(1, sum(i.num_running for i in working))
        capacity = sum(i.capacity_tokens for i in working)
        freeness = (capacity - used) / running
        if self.below <= freeness <= self.above or not capacity:
            return count
        goal = (self.below + self.above) / 2
        enough = math.ceil((used + goal * running) * count / capacity)
        if freeness < self.below:
            return min(max(enough, count + 1), self.most)
        return max(min(enough, count - 1), count - max(1, count // _MOST_LESS), self.least)
