"""How free an instance is: the decode steps until what its requests count as would fill it.

Source: Sun et al., Llumnix (OSDI 2024), arXiv:2406.03243, section 4.4.2 and algorithm 1.
"""

from collections import Counter
from collections.abc import Mapping

from ..snapshot import InstanceSnapshot


class Freeness:
    """Memory that no request counts as its own, over the requests that run.

    A running request counts as the tokens that it holds. The first in line counts as those that it
    asks for, so that an instance on which it waits looks full, and others are moved away for it.
    Urgent requests count as more than they hold, so that they keep room to be fast in. An instance
    that drains is full without end.

    Args:
        headroom_tokens: by priority, what all running requests of that priority on an instance
            count as together, beside what they hold.
    """

    def __init__(self, headroom_tokens: Mapping[int, int] | None = None) -> None:
        self.headroom_tokens = dict(headroom_tokens or {})

    def __call__(self, instance: InstanceSnapshot) -> float:
        """Steps; negative where more is asked for than there is, minus infinity where nothing may
        go."""
        if not instance.takes_work:
            return float("-inf")
        free = instance.capacity_tokens - self.virtual_tokens(instance)
        return free / max(1, instance.num_running)

    def virtual_tokens(self, instance: InstanceSnapshot) -> int:
        """What all requests of an instance count as, together."""
        return instance.used_tokens + self._demand(instance) + self._headroom(instance)

    def _demand(self, instance: InstanceSnapshot) -> int:
        """Of the first in line."""
        if not instance.num_waiting:
            return 0
        return next((r.num_tokens for r in instance.requests if r.is_waiting), 0)

    def _headroom(self, instance: InstanceSnapshot) -> int:
        """The paper shares the headroom of a priority among its requests: once if there is one."""
        if not self.headroom_tokens:
            return 0
        running = Counter(r.priority for r in instance.requests if not r.is_waiting)
        return sum(tokens for p, tokens in self.headroom_tokens.items() if running[p])
