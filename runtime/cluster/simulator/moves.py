"""Requests on their way from one simulated instance to another."""

from collections.abc import Callable

import msgspec

from ....vmem.errors import OutOfPages
from ...request.request import Request
from .costs import TransferCost
from .counting_cache import CountedSlot
from .instance import SimulatedInstance
from .requests import resumed

Later = Callable[[float, Callable[[], None]], None]
"""Calls something when it is a certain time."""


class Transit(msgspec.Struct, kw_only=True):
    """A request with its keys and values under way.

    Attributes:
        slot: what is reserved for it.
        num_tokens: that are copied while it goes on.
        from_slot: the slot that is read; a request that has lost it is not moved.
    """

    request: Request
    source: SimulatedInstance
    target: SimulatedInstance
    slot: CountedSlot
    num_tokens: int
    from_slot: object


class Moving:
    """Moves requests as the runtime does: room first, then a copy beside the steps, then the rest.

    A request goes on at its source while it is copied, and stands still for the last stage alone:
    a handshake, and the tokens that came meanwhile. One whose prompt was computed by an instance of
    the role "prefill" stands still until it is there. An instance sends, and receives, one request
    at a time.

    Args:
        clock: the time now.
        later: has something called at a time.
        transfer: what it takes from one instance to another.
        on_moved: called with what a request is at its target once it is there.
        on_change: called when something else has changed for an instance.

    Attributes:
        num_moves, num_refused: made; and given up, as there was no room or the request had ended.
        num_bytes: copied.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        later: Later,
        transfer: Callable[[int, int], TransferCost],
        on_moved: Callable[[Request, SimulatedInstance], None],
        on_change: Callable[[SimulatedInstance], None],
    ) -> None:
        self._clock = clock
        self._later = later
        self._transfer = transfer
        self._on_moved = on_moved
        self._on_change = on_change
        self._sends_s: dict[int, float] = {}  # until when an instance sends, and receives
        self._receives_s: dict[int, float] = {}
        self.under_way: dict[Request, Transit] = {}
        self.num_moves = self.num_refused = self.num_bytes = 0

    def begin(self, request: Request, source: SimulatedInstance, target: SimulatedInstance) -> None:
        """Transit a request, if there is room for it."""
        source.interrupt()  # so that its tokens are counted
        held = source.held.get(request)
        if held is None and request.slot is None:
            self._resend(request, source, target)
            return
        margin = 0 if held is not None else target.cache.growth_tokens
        try:
            slot = target.reserve(request.num_tokens + margin)
        except OutOfPages:
            self.num_refused += 1
            return
        if held is not None:
            held.is_moving = True
        else:
            source.moving.add(request)
        num_tokens = request.num_tokens - 1  # the last one is not computed
        move = Transit(
            request=request,
            source=source,
            target=target,
            slot=slot,
            num_tokens=num_tokens,
            from_slot=held.slot if held is not None else request.slot,
        )
        self.under_way[request] = move
        cost = self._transfer(source.id, target.id)
        starts_s = max(
            self._clock(),
            self._sends_s.get(source.id, 0.0),
            self._receives_s.get(target.id, 0.0),
        )
        ends_s = starts_s + cost.time_s(num_tokens)
        self._sends_s[source.id] = self._receives_s[target.id] = ends_s
        self.num_bytes += cost.num_bytes(num_tokens)
        self._later(ends_s, lambda: self._copied(move))

    def ended(self, request: Request) -> None:
        """A request has ended: what is reserved for it is given back."""
        move = self.under_way.get(request)
        if move is not None:
            self._give_up(move)

    def left(self, request: Request) -> None:
        """The source has no step with a request any more: the last stage begins."""
        move = self.under_way[request]
        if not self._is_sound(move):
            self._give_up(move)
            return
        try:
            move.target.interrupt()
            move.target.cache.grow(move.slot, request.num_tokens)
        except OutOfPages:
            self._give_up(move)
            return
        self._on_change(move.target)
        cost = self._transfer(move.source.id, move.target.id)
        num_left = request.num_tokens - 1 - move.num_tokens
        self.num_bytes += cost.num_bytes(num_left)
        self._hand_over(move, self._clock() + cost.time_s(num_left))

    def _copied(self, move: Transit) -> None:
        if self.under_way.get(move.request) is not move:
            return  # it ended meanwhile
        if move.request in move.source.held:
            self.left(move.request)
        elif self._is_sound(move):
            move.source.leave(move.request)
            self._on_change(move.source)
        else:
            self._give_up(move)

    def _is_sound(self, move: Transit) -> bool:
        """Whether the source still has what was copied."""
        held = move.source.held.get(move.request)
        slot = held.slot if held is not None else move.request.slot
        return slot is move.from_slot

    def _hand_over(self, move: Transit, at_s: float) -> None:
        """The source lets go; at `at_s` the target goes on."""
        del self.under_way[move.request]
        other = resumed(move.request)
        served = move.source.take(move.request)
        self._on_change(move.source)
        self.num_moves += 1
        served.num_moves += 1

        def arrive() -> None:
            move.target.receive(other, served, move.slot)
            self._on_moved(other, move.target)

        self._later(at_s, arrive)

    def _resend(
        self, request: Request, source: SimulatedInstance, target: SimulatedInstance
    ) -> None:
        """A request without a slot is queued elsewhere."""
        other = resumed(request)
        served = source.take(request)
        self.num_moves += 1
        served.num_moves += 1
        target.num_incoming += 1

        def arrive() -> None:
            target.num_incoming -= 1
            target.add(other, served)
            self._on_moved(other, target)

        self._later(self._clock() + self._transfer(source.id, target.id).latency_s, arrive)

    def _give_up(self, move: Transit) -> None:
        """The request stays where it is, or has ended there."""
        del self.under_way[move.request]
        move.source.moving.discard(move.request)
        held = move.source.held.get(move.request)
        if held is not None:
            held.is_moving = False
        move.target.release(move.slot)
        self.num_refused += 1
        self._on_change(move.target)
