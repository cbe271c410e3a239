"""Clients that ask one request after another, and compare what comes with what is right."""

import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from ...runtime.frontend.text_stream import StreamDelta
from ...runtime.request.outputs import RequestOutput
from ...vmem.errors import VkvError
from .asks import Ask, Mix, draw
from .crew import at_work
from .reference import Reference, ReferenceFailed
from .right import CUT, Right, Turn, rights_of
from .tally import Tally

_BATCH = 8  # requests that the reference is asked at once
_AHEAD = 24  # that are answered before clients begin, and kept ready
_MOST_KNOWN = 300  # that may be asked again
_ENDS_S = 90.0  # for the last request of each client


class Front(Protocol):
    """What clients ask: a cluster, or an engine."""

    def generate(self, *given: Any, **how: Any) -> list[RequestOutput]: ...
    def stream(self, *given: Any, **how: Any) -> Iterator[StreamDelta]: ...


@dataclass(frozen=True)
class Known:
    """A request, and what should come of each of its turns."""

    ask: Ask
    right: Sequence[Turn]


class Supply:
    """Requests of a phase with their answers, which a thread fetches from the reference.

    New ones come first; while there is none, one of those before is asked again.
    """

    def __init__(self, reference: Reference, mix: Mix, *, seed: int, start: int = 0) -> None:
        self._reference, self._mix, self._seed = reference, mix, seed
        self._numbers = count(start)
        self._fresh: deque[Known] = deque()
        self._known: list[Known] = []
        self._changed = threading.Condition()
        self._is_over = False
        self.num_drawn = start
        self.error: ReferenceFailed | None = None
        self._thread = threading.Thread(target=self._fetch, name="vkv-soak-supply", daemon=True)
        self._thread.start()

    def wait_for_first(self) -> None:
        """Until there is enough to begin with. Raises ReferenceFailed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._known) >= _AHEAD or self.error)
        if self.error is not None:
            raise self.error

    def next(self, chance: random.Random) -> Known:
        """One to ask."""
        with self._changed:
            if not self._fresh:
                return chance.choice(self._known)
            self._changed.notify_all()
            return self._fresh.popleft()

    def _fetch(self) -> None:
        while not self._is_over:
            asks = [draw(self._seed, self._mix, next(self._numbers)) for _ in range(_BATCH)]
            try:
                answers = self._reference.answers(asks)
            except BaseException as error:
                with self._changed:
                    self.error = ReferenceFailed(f"what is right is not known: {error}")
                    self._changed.notify_all()
                if isinstance(error, ReferenceFailed):
                    return
                raise
            with self._changed:
                self.num_drawn += len(asks)
                known = [Known(ask, right) for ask, right in zip(asks, answers, strict=True)]
                self._fresh.extend(known)
                self._known = (self._known + known)[-_MOST_KNOWN:]
                self._changed.notify_all()
                self._changed.wait_for(lambda: len(self._fresh) < _AHEAD or self._is_over)

    def close(self) -> None:
        """Fetch no more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()


class Clients:
    """Threads that ask.

    Args:
        voices: how each is named in a call: `model=…` or `adapter=…`.
    """

    def __init__(
        self,
        front: Front,
        supply: Supply,
        voices: Mapping[str, Mapping[str, str]],
        tally: Tally,
    ) -> None:
        self._front, self._supply, self._voices, self._tally = front, supply, voices, tally
        self._is_over = threading.Event()
        self._asking: dict[str, tuple[Ask, float]] = {}

    @contextmanager
    def asking(self, number: int, chance: random.Random) -> Iterator[None]:
        """So many ask; when it ends they have their last answer, or are said to have lost it."""
        threads = [
            threading.Thread(
                target=self._ask_on,
                args=(random.Random(chance.random()),),
                name=f"vkv-soak-client-{place}",
                daemon=True,
            )
            for place in range(number)
        ]
        with at_work(threads, self._is_over, _ENDS_S, self._tell_late):
            yield

    def _tell_late(self, thread: threading.Thread) -> None:
        if asked := self._asking.get(thread.name):
            waited_s = time.monotonic() - asked[1]
            self._tally.lost(f"{asked[0]} has not ended after {waited_s:.0f} s")

    def _ask_on(self, chance: random.Random) -> None:
        me = threading.current_thread().name
        while not self._is_over.is_set():
            known = self._supply.next(chance)
            self._asking[me] = known.ask, time.monotonic()
            try:
                self.ask(known)
            except VkvError as error:
                self._tally.lost(f"{known.ask} ended with {type(error).__name__}: {error}")
            except Exception as error:
                self._tally.lost(f"{known.ask} ended with {error!r}")
                raise
        self._asking.pop(me, None)

    def ask(self, known: Known) -> None:
        """One request, all of its turns."""
        ask, said, num_tokens = known.ask, list[int](), 0
        for turn, (words, right) in enumerate(zip(ask.turns, known.right, strict=True)):
            said += words
            prompt: dict[str, Any] = {"prompt_token_ids": list(said)}
            if ask.salt:
                prompt["cache_salt"] = ask.salt
            how: dict[str, Any] = {
                "priority": ask.priority,
                "tenant": ask.tenant,
                **self._voices[ask.voice],
            }
            if ask.streams:
                found = self._stream(ask, prompt, how)
            else:
                (output,) = self._front.generate(prompt, ask.params, progress=False, **how)
                if output.error is not None:
                    raise output.error
                found = rights_of(output)
            num_tokens += sum(len(one.token_ids) for one in found)
            where = f"{ask}, turn {turn}" if len(ask.turns) > 1 else str(ask)
            if not self._tally.compare(where, found, right):
                return
            said += found[0].token_ids
        self._tally.whole(ask.kind, ask.voice, num_tokens)

    def _stream(self, ask: Ask, prompt: Any, how: Mapping[str, Any]) -> list[Right]:
        token_ids: list[int] = []
        text, finish_reason, stop_reason = "", None, None
        stream = self._front.stream(prompt, ask.params, **how)
        for delta in stream:
            token_ids += delta.token_ids
            text += delta.text
            finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
            if ask.cancel_after is not None and len(token_ids) >= ask.cancel_after:
                stream.close()  # type: ignore[attr-defined]
                self._tally.fault("cancel")
                return [Right(tuple(token_ids), text, CUT, None)]
        return [Right(tuple(token_ids), text, finish_reason, stop_reason)]
