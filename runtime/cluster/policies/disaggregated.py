"""Prompts on some instances, the tokens after them on others.

Source: Zhong et al., DistServe (OSDI 2024), arXiv:2401.09670, sections 4.3 and 5.
"""

from collections.abc import Mapping

from ....vmem.errors import InvalidConfig
from ..snapshot import ClusterSnapshot, InstanceSnapshot, Newcomer, Role
from .draining import drain_moves
from .policy import Move
from .rooms import Rooms
from .scaling import Scaling
from .scores import Scores


class Disaggregated:
    """A dispatch rule and a migrate rule; instances of the role "both" do either.

    **Dispatch** goes to the shortest queue of prompt tokens. While the prompts that are computed
    and not yet taken hold more than `held` of the memory of all that compute prompts, newcomers are
    held back, at the front end, where they cost nothing. So a burst fills neither side.

    **Moves.** A request whose prompt is computed is pulled by the least loaded decode instance,
    once that has room for it beside `kept` of its memory, or by one of the same node with about as
    much; who waited longest goes first. Until then it stays where its prompt was computed.

    **Roles** change one at a time, where `switching` says when. A role is about what an instance is
    given: one that now computes prompts has what it generates taken over by the moves above. Where
    one side has nobody left, all of the other do both, until somebody is there for it again.

    Args:
        kept: share of a decode instance's memory left for its requests to grow into.
        held: share of the prompt instances' memory that computed prompts may hold.
        switching: None for roles that stay.
        scaling: how many instances there should be; None for as many as there are.
    """

    name = "disaggregated"

    def __init__(
        self,
        *,
        kept: float = 0.1,
        held: float = 0.5,
        switching: "Switching | None" = None,
        scaling: Scaling | None = None,
    ) -> None:
        if not (0 <= kept < 1 and 0 < held <= 1):
            raise InvalidConfig(f"kept {kept} and held {held}: use 0 <= kept < 1 and 0 < held <= 1")
        self.kept = kept
        self.held = held
        self.switching = switching
        self.scaling = scaling
        self._queues = Scores(_shortness)
        self._computed = Scores(_computed_tokens)
        self._capacities = Scores(_prompt_capacity)

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        best = self._queues.best_for(snapshot.instances, newcomer)
        if best is None:  # nobody computes prompts any more: then whoever is left
            best = min(snapshot.working, key=lambda i: i.used_tokens, default=None)
        elif self._is_backed_up(snapshot):
            return None
        return best.id if best is not None else None

    def migrations(self, snapshot: ClusterSnapshot) -> list[Move]:
        rooms = Rooms(snapshot, self.kept)
        moves = drain_moves(snapshot, rooms)
        targets = [i for i in snapshot.instances if i.takes_work and i.role == "decode"] or [
            i for i in snapshot.instances if i.is_for_decodes
        ]
        if not targets:
            return moves
        ready = [
            (request.waited_s, source, request)
            for source in snapshot.instances
            if source.role == "prefill" and source.takes_work
            for request in source.requests
            if request.has_prompt and request.is_migratable
        ]
        for _, source, request in sorted(ready, key=lambda found: -found[0]):
            target = rooms.roomiest(targets, request, source)
            if target is not None:
                rooms.take(target, request)
                moves.append(Move(request.key, source.id, target.id, "decode"))
        return moves

    def scale(self, snapshot: ClusterSnapshot) -> int:
        return self.scaling.wanted(snapshot) if self.scaling else len(snapshot.working)

    def roles(self, snapshot: ClusterSnapshot) -> Mapping[int, Role]:
        working = snapshot.working
        own = {i.own_role for i in working}
        has_both_sides = bool(own - {"decode"}) and bool(own - {"prefill"})
        wanted: dict[int, Role] = {i.id: i.own_role if has_both_sides else "both" for i in working}
        changes: dict[int, Role] = {i.id: wanted[i.id] for i in working if i.role != wanted[i.id]}
        if changes:
            return changes
        return self.switching.changes(snapshot) if self.switching else {}

    def _is_backed_up(self, snapshot: ClusterSnapshot) -> bool:
        """Whether computed prompts wait in vain: decode instances are to take them first."""
        computed = sum(self._computed.of(snapshot.instances))
        if not computed:
            return False
        return computed > self.held * sum(self._capacities.of(snapshot.instances))


class Switching:
    """When an instance changes from computing prompts to generating, or back.

    Both sides are looked at as shares of what they can take: the queue of an instance that computes
    prompts over `queue_tokens`, and the memory of one that generates. The side that is over `high`
    gets an instance from the other if that one is under `low`, has more than one, and would not be
    over `high` with one less.

    Args:
        queue_tokens: prompt tokens in line at which an instance counts as full: what it computes in
            the time that a first token may take.
        pause_s: between two changes.
    """

    def __init__(
        self,
        *,
        queue_tokens: int = 8192,
        high: float = 0.8,
        low: float = 0.4,
        pause_s: float = 30.0,
    ) -> None:
        if queue_tokens < 1 or not 0 <= low < high:
            raise InvalidConfig(
                f"queue_tokens {queue_tokens}, low {low}, high {high}: use at least one token, and "
                "0 <= low < high"
            )
        self.queue_tokens = queue_tokens
        self.high = high
        self.low = low
        self.pause_s = pause_s

    def changes(self, snapshot: ClusterSnapshot) -> Mapping[int, Role]:
        """One instance and its new role, or nothing."""
        since = snapshot.switched_s
        if since is not None and snapshot.time_s - since < self.pause_s:
            return {}
        prompts = [i for i in snapshot.working if i.role == "prefill"]
        decodes = [i for i in snapshot.working if i.role == "decode"]
        if not prompts or not decodes:
            return {}
        queue = sum(i.queued_tokens for i in prompts) / self.queue_tokens
        memory = sum(i.used_tokens / i.capacity_tokens for i in decodes)
        if self._gives(memory, len(decodes)) and queue > self.high * len(prompts):
            return {min(decodes, key=lambda i: i.used_tokens).id: "prefill"}
        if self._gives(queue, len(prompts)) and memory > self.high * len(decodes):
            return {min(prompts, key=lambda i: i.queued_tokens).id: "decode"}
        return {}

    def _gives(self, load: float, count: int) -> bool:
        """Whether a side with this load, in full instances, can do without one of `count`."""
        return count > 1 and load < self.low * count and load < self.high * (count - 1)


def _shortness(instance: InstanceSnapshot) -> float:
    return -instance.queued_tokens if instance.is_for_prompts else float("-inf")


def _prompt_capacity(instance: InstanceSnapshot) -> int:
    return instance.capacity_tokens if instance.takes_work and instance.role == "prefill" else 0


def _computed_tokens(instance: InstanceSnapshot) -> int:
    if instance.role != "prefill":
        return 0
    return sum(r.num_tokens for r in instance.requests if r.has_prompt)
