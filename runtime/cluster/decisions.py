"""What the policy of a cluster is asked, and what is done as it says."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from ...vmem.errors import InvalidOperation
from ..engine.migration.arbiter import Arbiter
from ..request.spec import RequestSpec
from .lending import LendingDesk
from .members import Members, most_tokens
from .policies import ClusterPolicy
from .snapshot import ClusterSnapshot, Newcomer

_TRY_AGAIN_S = 5.0  # after a start, or an end, of instances that could not be

_log = logging.getLogger(__name__)


class Decisions:
    """Asks a policy where requests go, which of them move, and how many instances there are to be.

    Of one event loop. What it decides is recorded with the arbiter, which has it sent.

    Args:
        max_moves: sequences that move at once.

    Attributes:
        held: requests that no instance takes yet, in order.
        lending: what instances lend each other.
        on_scale: called with how many instances the policy wants; `has_scaled` answers it.
    """

    def __init__(
        self, policy: ClusterPolicy, arbiter: Arbiter, members: Members, *, max_moves: int
    ) -> None:
        self.held: deque[RequestSpec] = deque()
        self.on_scale: Callable[[int], None] = lambda instances: self.has_scaled()
        self._policy = policy
        self._arbiter = arbiter
        self._members = members
        self._max_moves = max_moves
        self.lending = LendingDesk(members)
        self._num_dispatched = 0
        self._is_scaling = True  # until the first instances are there
        self._scales_from_s = -math.inf

    def picture(self) -> ClusterSnapshot:
        """The cluster as the policy sees it."""
        return self._members.snapshot(num_dispatched=self._num_dispatched)

    def dispatch(self, is_wanted: Callable[[str], bool]) -> None:
        """Give those that are held to instances, in order, as far as the policy lets them.

        Args:
            is_wanted: whether anybody waits for a request still.
        """
        while self.held:
            spec = self.held[0]
            if not is_wanted(spec.request_id):
                self.held.popleft()
                continue
            newcomer = Newcomer(
                key=(spec.request_id, 0),
                num_tokens=len(spec.prompt_token_ids),
                priority=spec.priority,
                tenant=spec.tenant,
                needs=self._members.needs(spec),
                most_tokens=most_tokens(spec),
            )
            chosen = self._choose(newcomer)
            if chosen is None:
                return
            self.held.popleft()
            self._num_dispatched += 1
            self._arbiter.add(spec, str(chosen))
            for index in range(spec.params.n):
                key = spec.request_id, index
                self._members.gave(chosen, msgspec.structs.replace(newcomer, key=key))

    def _choose(self, newcomer: Newcomer) -> int | None:
        """The instance that the policy chooses, which is there; None for none."""
        chosen = self._policy.dispatch(self.picture(), newcomer)
        if chosen is None or self._members.link(chosen) is not None:
            return chosen
        _log.error("policy %r chose instance %r, which is not there", self._policy.name, chosen)
        return None

    def drop(self, request_id: str) -> Sequence[RequestSpec]:
        """Hold a request no longer; what was held of it."""
        dropped = [spec for spec in self.held if spec.request_id == request_id]
        for spec in dropped:
            self.held.remove(spec)
        return dropped

    def set_priority(self, request_id: str, priority: int) -> None:
        """Give a request that is held another priority. Its place in the line stays."""
        for place, spec in enumerate(self.held):
            if spec.request_id == request_id:
                self.held[place] = msgspec.structs.replace(spec, priority=priority)

    def place_orphans(self) -> None:
        """Have what nobody has any more go on somewhere, if anybody is left: also where the policy,
        which may be a user's own, fails."""
        if not self._members.now():
            return
        for orphan in self._arbiter.take_orphans():
            newcomer = Newcomer(
                key=orphan.key,
                num_tokens=len(orphan.token_ids),
                priority=orphan.spec.priority,
                needs=self._members.needs(orphan.spec),
            )
            try:
                chosen = self._choose(newcomer)
            except Exception:  # noqa: BLE001 - logged; an orphan is given once, and would be lost
                _log.exception("policy %r failed", self._policy.name)
                chosen = None
            if chosen is None:  # backpressure is for newcomers: these were let in
                snapshot = self.picture()
                able = snapshot.working or snapshot.instances
                chosen = min(able, key=lambda i: i.num_requests).id
            self._arbiter.resume(orphan, str(chosen))
            self._members.changed()

    def rebalance(self) -> None:
        """Ask how many instances there should be, what for, and which requests move."""
        snapshot = self.picture()
        self.lending.settle(snapshot)
        wanted = self._policy.scale(snapshot)
        may_scale = not self._is_scaling and snapshot.time_s >= self._scales_from_s
        if wanted != len(snapshot.working) and may_scale:
            self._is_scaling = True
            self._members.scaled_s = snapshot.time_s
            self.on_scale(wanted)
        if len(snapshot.instances) < 2 or not self._arbiter.has_some:
            return
        for instance, role in self._policy.roles(snapshot).items():
            self._members.switch(instance, role, snapshot.time_s)
        for move in self._policy.migrations(snapshot):
            if self._arbiter.num_moving >= self._max_moves:
                break
            try:
                self._arbiter.migrate(move.key, str(move.target))
            except InvalidOperation as error:  # it has just ended
                _log.debug("%s does not move: %s", move, error)

    def has_scaled(self, *, done: bool = True) -> None:
        """What `on_scale` asked for is done: the policy may ask again. If it could not be, after a
        while: what fails at once, as a start without memory, would fail ten times a second."""
        self._is_scaling = False
        self._members.scaled_s = time.monotonic()
        self._scales_from_s = self._members.scaled_s + (0.0 if done else _TRY_AGAIN_S)
