"""A small model guesses for a large one."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
from torch import nn

from ...allocator import Exits
from ...vmem.errors import DriverError, Shortage
from ..execution.model_runner import ModelRunner
from ..model.weights import ModelWatch
from ..request.request import Request, RequestState
from .drafter import Drafter
from .shadows import go_ahead, shadow_of

_log = logging.getLogger(__name__)


class DraftModel(Drafter):
    """Guesses what another model says, for all requests of a step in one batch.

    It has keys and values of its own, under the limit of the model that verifies. Between two
    guesses all of them are parked, so that whoever runs short under that limit has them before
    anybody waits or gives way for them; what went is computed again. It takes no memory but what is
    free. Of a request it begins with the prompt when it is first asked for a guess, in chunks, and
    then computes what it has not seen; while it lacks some, there is no guess.

    Args:
        runner: runs the model, with a cache of its own: contiguous, and a slot and a parking place
            for each request that may run.
        close: gives the cache back.
        watch: notices that somebody changed the model.
        chunk_tokens: tokens that it has not seen that it computes at a time, of all requests.
    """

    kind = "draft"
    takes_time = True

    def __init__(
        self,
        runner: ModelRunner,
        close: Callable[[], None],
        *,
        watch: ModelWatch,
        chunk_tokens: int,
    ) -> None:
        self._runner = runner
        self._cache = runner.cache
        self._exits = Exits(runner.cache)
        self._close = close
        self._watch = watch
        self._chunk_tokens = chunk_tokens
        self._shadows: dict[Request, _Shadow] = {}
        self._numbers = itertools.count()

    @property
    def kv_bytes(self) -> int:
        """As of `Drafter`."""
        return self._cache.stats().physical_bytes

    def num_unseen(self, request: Request) -> int:
        """As of `Drafter`."""
        shadow = self._shadows.get(request)
        return len(request.token_ids) - (shadow.num_parked if shadow is not None else 0) - 1

    def draft(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """As of `Drafter`."""
        self._notice_changes()
        self._exits.retry()
        taken: dict[Request, _Shadow] = {}
        try:
            counts: dict[Request, int] = {}
            lengths: dict[Request, int] = {}
            room = self._chunk_tokens
            for request in wanted:
                taken[request] = self._take(request)
            # Those that lack least first: they can guess in this step.
            for request in sorted(taken, key=lambda one: taken[one].request.num_uncomputed):
                room = self._plan(taken[request].request, wanted[request], room, counts, lengths)
            self.num_caught_up = sum(counts.values()) - len(lengths)
            said = go_ahead(self._runner, counts, lengths)
        finally:
            for request, shadow in taken.items():
                self._park(request, shadow)
        return {request: said.get(shadow.request, []) for request, shadow in taken.items()}

    def let_go(self) -> None:
        """As of `Drafter`."""
        for request in list(self._shadows):
            if request.state is not RequestState.RUNNING:
                self._drop(request)

    def trim(self) -> int:
        """As of `Drafter`."""
        self.let_go()
        return self._cache.trim()

    def release_weights(self) -> Sequence[nn.Module]:
        """As of `Drafter`."""
        self._forget_recordings()
        self._watch.release()
        return (self._runner.forward.model,)

    def weights_are_back(self) -> None:
        """As of `Drafter`."""
        self._watch.renew()

    def close(self) -> None:
        """As of `Drafter`."""
        self._shadows.clear()
        self._forget_recordings()
        self._close()

    def _forget_recordings(self) -> None:
        if self._runner.recordings is not None:
            self._runner.recordings.forget()

    def _plan(
        self,
        shadow: Request,
        num_wanted: int,
        room: int,
        counts: dict[Request, int],
        lengths: dict[Request, int],
    ) -> int:
        """Note what a shadow computes first and how much it says then; returns the room left.

        Nothing of one without a slot, or without memory to spare for that.
        """
        slot, num_unseen = shadow.slot, shadow.num_uncomputed
        count = min(num_unseen, room)
        if slot is None or not count:
            return room
        is_ready = count == num_unseen
        left = self._cache.max_len - shadow.num_tokens  # tokens that it has room for
        num_said = min(num_wanted, left + 1)
        stop = shadow.num_computed + count + (num_said - 1 if is_ready else 0)
        if num_said <= 0 or not self._back(shadow, stop):
            return room
        counts[shadow] = count
        if is_ready:
            lengths[shadow] = num_said
        return room - count

    def _back(self, shadow: Request, stop: int) -> bool:
        """Back the tokens before `stop`, by free memory alone."""
        slot, cache = shadow.slot, self._cache
        assert slot is not None, shadow
        lacking = cache.num_pages(stop) - slot.num_pages
        if stop > slot.ready_tokens and lacking > cache.pool.num_available:
            return False
        try:
            cache.grow(slot, stop)
        except (Shortage, DriverError):
            return False
        return True

    def _take(self, request: Request) -> "_Shadow":
        """The request's shadow, with all tokens that the request has, and a slot if there is one.

        What is parked for it is found by places, not tokens: nobody else knows its variant.
        """
        shadow = self._shadows.get(request)
        if shadow is None:
            shadow = self._shadows[request] = _Shadow(shadow_of(request), next(self._numbers))
        num_equal = shadow.follow(request)
        ahead = shadow.request
        ahead.sampling = request.sampling.fork(ahead.params)
        ahead.num_computed = 0
        try:
            ahead.slot, ahead.num_computed = self._cache.adopt(
                _places(num_equal), shadow.variant, recycle=False
            )
        except (Shortage, DriverError):
            ahead.slot = None
        return shadow

    def _park(self, request: Request, shadow: "_Shadow") -> None:
        """Let go of a slot with what is in it, for the next guess or for whoever needs memory."""
        ahead = shadow.request
        slot, ahead.slot = ahead.slot, None
        if slot is None:
            return
        num_tokens = min(ahead.num_computed, slot.num_tokens)
        if num_tokens >= 2 * len(request.token_ids):  # else most of it might soon be of no use
            num_tokens = len(request.token_ids)
        self._exits.let_go(slot, _places(num_tokens), shadow.variant)
        shadow.num_parked = num_tokens

    def _drop(self, request: Request) -> None:
        shadow = self._shadows.pop(request)
        if shadow.num_parked:
            with suppress(Shortage, DriverError):  # then it stays parked, until memory is short
                places = _places(shadow.num_parked)
                slot, _ = self._cache.adopt(places, shadow.variant, recycle=False)
                self._exits.let_go(slot)

    def _notice_changes(self) -> None:
        change = self._watch.change(thoroughly=False)
        if change is not None:
            _log.warning("%s of the model that guesses; all is computed anew", change)
            layers = self._watch.learn()
            self._runner.model_changed(layers, recordable=not self._watch.has_hooks)
            self._cache.trim()


class _Shadow:
    """A request as the small model goes on with it, and what is parked for that.

    Attributes:
        variant: what its slot is parked under.
        num_parked: tokens that were parked there; some may have been reclaimed.
    """

    def __init__(self, request: Request, number: int) -> None:
        self.request = request
        self.variant = f"shadow {number}"
        self.num_parked = 0
        self._num_followed = len(request.token_ids)

    def follow(self, request: Request) -> int:
        """Take over the tokens that the request has by now; returns how many it had right."""
        own, tokens = self.request.token_ids, request.token_ids
        num_equal = self._num_followed
        while num_equal < min(len(own), len(tokens)) and own[num_equal] == tokens[num_equal]:
            num_equal += 1
        own[num_equal:] = tokens[num_equal:]
        self._num_followed = len(tokens)
        # The last token is always computed: what follows is drawn from its logits.
        return min(num_equal, len(tokens) - 1)


def _places(num_tokens: int) -> memoryview[int]:
    """Places 0 …, as a slot is tagged with; no list, which would take long to compare."""
    return memoryview(np.arange(num_tokens))
