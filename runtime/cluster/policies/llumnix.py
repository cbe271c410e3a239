"""Dispatch to the freest instance, and requests that move to where more is free.

Source: Sun et al., Llumnix (OSDI 2024), arXiv:2406.03243, sections 4.4.1 to 4.4.3.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import msgspec

from ....vmem.errors import InvalidConfig
from ..snapshot import ClusterSnapshot, InstanceSnapshot, Newcomer, RequestSnapshot, Role
from .draining import drain_moves
from .freeness import Freeness
from .policy import Move
from .rooms import Rooms, nearer
from .scaling import Scaling
from .scores import Scores


class Llumnix:
    """By freeness (`Freeness`): evens loads out, makes room for who waits, keeps urgent ones fast.

    **Dispatch** goes to the instance that will be freest once all that waits there runs, too, or to
    one about as free where more of what a newcomer needs is in memory; or to the one that holds
    most of a prompt's beginning, if that spares `prefix_tokens` of it at least and its freeness is
    not below `source_below`. For an urgent newcomer headroom does not count: it is kept for such
    as this one. So urgent requests come together where others have made room, and
    share it; with headroom counted they would be sent away from there, to crowd with the rest.

    **Moves.** Instances below `source_below` are paired with those above `target_above`, the least
    free with the freest, or with one about as free to which pages go without a copy. Each pair
    moves one request: of the least urgent the one with the fewest tokens, which takes least to
    move. It must fit, and must leave its new instance freer than `source_below`. So no instance
    becomes one to move away from by what it is given, and as long as loads stay as they are no
    request moves twice.

    Args:
        source_below, target_above: freeness, in decode steps.
        prefix_tokens: None to dispatch by freeness alone.
        moves: at most from one instance in a round.
        freeness: what a request counts as.
        scaling: how many instances there should be; None for as many as there are.
    """

    name = "llumnix"

    def __init__(
        self,
        *,
        source_below: float = 30.0,
        target_above: float = 100.0,
        prefix_tokens: int | None = None,
        moves: int = 1,
        freeness: Freeness | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        if source_below > target_above:
            raise InvalidConfig(
                f"source_below {source_below} is more than target_above {target_above}: requests "
                "would move to and fro; use source_below <= target_above"
            )
        self.source_below = source_below
        self.target_above = target_above
        self.prefix_tokens = prefix_tokens
        self.moves = moves
        self.freeness = freeness or Freeness()
        self.scaling = scaling
        self._scores = Scores(self.freeness)
        self._dispatch_scores = Scores(partial(_dispatch_score, self.freeness))
        self._urgent_scores = Scores(partial(_dispatch_score, Freeness()))

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        if self.prefix_tokens is not None and newcomer.prefixes:
            holder = self._holder(snapshot, newcomer, self.prefix_tokens)
            if holder is not None:
                return holder.id
        is_urgent = newcomer.priority in self.freeness.headroom_tokens
        scores = self._urgent_scores if is_urgent else self._dispatch_scores
        best = scores.best_for(snapshot.instances, newcomer)
        return best.id if best is not None else None

    def migrations(self, snapshot: ClusterSnapshot) -> list[Move]:
        rooms = Rooms(snapshot)
        moves = drain_moves(snapshot, rooms)
        free = dict(
            zip(
                (i.id for i in snapshot.instances), self._scores.of(snapshot.instances), strict=True
            )
        )
        given_to = {move.target for move in moves}
        sources = sorted(
            (i for i in snapshot.working if free[i.id] < self.source_below),
            key=lambda i: free[i.id],
        )
        targets = sorted(
            (
                i
                for i in snapshot.working
                if free[i.id] > self.target_above and i.id not in given_to and i.is_for_decodes
            ),
            key=lambda i: -free[i.id],
        )
        for source in sources[: len(targets)]:
            target = nearer(snapshot, source, targets[0], targets, lambda i: free[i.id])
            targets.remove(target)
            moves += self._relieve(source, target, rooms)
        return moves

    def scale(self, snapshot: ClusterSnapshot) -> int:
        return self.scaling.wanted(snapshot) if self.scaling else len(snapshot.working)

    def roles(self, snapshot: ClusterSnapshot) -> Mapping[int, Role]:
        return {}

    def _holder(
        self, snapshot: ClusterSnapshot, newcomer: Newcomer, least: int
    ) -> InstanceSnapshot | None:
        """The instance with the longest beginning of a newcomer, if it is worth going there."""
        able = [
            i
            for i in snapshot.instances
            if i.is_for_prompts
            and newcomer.prefixes.get(i.id, 0) >= max(least, 1)
            and self.freeness(i) >= self.source_below
        ]
        return max(able, key=lambda i: (newcomer.prefixes[i.id], self.freeness(i)), default=None)

    def _relieve(
        self, source: InstanceSnapshot, target: InstanceSnapshot, rooms: Rooms
    ) -> list[Move]:
        """Moves from one of a pair to the other."""
        moves: list[Move] = []
        now = target
        for request in _movable(source):
            if len(moves) == self.moves:
                break
            after = _with_running(now, request)
            if rooms.fits(target, request) and self.freeness(after) > self.source_below:
                rooms.take(target, request)
                moves.append(Move(request.key, source.id, target.id, "balance"))
                now = after
        return moves


def _dispatch_score(freeness: Freeness, instance: InstanceSnapshot) -> float:
    """Freeness once all that waits runs, and one more beside it."""
    if not instance.is_for_prompts:
        return float("-inf")
    free = instance.capacity_tokens - freeness.virtual_tokens(instance)
    if instance.num_waiting > 1:  # the first in line is counted
        waiting = [r.num_tokens for r in instance.requests if r.is_waiting]
        free -= sum(waiting[1:])
    return free / (instance.num_requests + 1)


def _movable(instance: InstanceSnapshot) -> Iterator[RequestSnapshot]:
    """Running requests that generate: the least urgent first, of those the shortest."""
    found = [r for r in instance.requests if r.is_migratable and r.has_prompt]
    yield from sorted(found, key=lambda r: (-r.priority, r.num_tokens))


def _with_running(instance: InstanceSnapshot, request: RequestSnapshot) -> InstanceSnapshot:
    """An instance once a request runs there, too."""
    return msgspec.structs.replace(
        instance,
        used_tokens=instance.used_tokens + request.num_tokens,
        num_running=instance.num_running + 1,
        requests=(request, *instance.requests),
    )
