"""Emptying instances that are to end, for any policy."""

from collections.abc import Sequence

from ..snapshot import ClusterSnapshot, InstanceSnapshot
from .policy import Move
from .rooms import Rooms


def drain_moves(snapshot: ClusterSnapshot, rooms: Rooms) -> list[Move]:
    """Everything that fits elsewhere moves away from instances that drain.

    What has keys and values goes where most room is, to an instance that is for prompts while its
    prompt is not computed, and else to one for decodes. What waits goes to the shortest queue,
    whatever room there is. What fits nowhere goes on where it is until something does.
    """
    moves: list[Move] = []
    working = snapshot.working
    prompts = [i for i in working if i.is_for_prompts] or working
    decodes = [i for i in working if i.is_for_decodes] or working
    queues = {i.id: i.queued_tokens for i in prompts}
    for source in snapshot.instances:
        if not (source.is_draining and source.is_alive):
            continue
        for request in source.requests:
            if not request.is_migratable:
                continue
            if request.is_waiting and queues:
                target_id = min(queues, key=queues.__getitem__)
                queues[target_id] += request.num_uncomputed
                moves.append(Move(request.key, source.id, target_id, "drain"))
            elif not request.is_waiting:
                able = decodes if request.has_prompt else prompts
                target = rooms.roomiest(able, request, source)
                if target is not None:
                    rooms.take(target, request)
                    moves.append(Move(request.key, source.id, target.id, "drain"))
    return moves


def drained_first(snapshot: ClusterSnapshot, count: int) -> Sequence[int]:
    """The instances to drain if there are to be `count` less: those with least to move away.

    Of each role one stays.
    """
    left = snapshot.working
    found: list[int] = []
    for instance in sorted(left, key=_weight):
        others = [i for i in left if i is not instance]
        if len(found) < count and {i.role for i in others} == {i.role for i in left}:
            found.append(instance.id)
            left = others
    return found


def _weight(instance: InstanceSnapshot) -> tuple[int, int, int]:
    return instance.num_running, instance.num_waiting, instance.used_tokens
