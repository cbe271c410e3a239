"""A man in the middle: between a cluster's front end and its instances, and between these.

Every message passes through it. Tokens, and whatever else is no part of a migration, go on at once
and in order; of a migration's commands and answers a test says how often and how late each goes on,
and may do something else at that moment, such as to kill an instance. It can also cut the
connection over which keys and values go from instance to instance.
"""

import heapq
import itertools
import os
import select
import selectors
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import msgspec
from vkv.runtime.cluster import cluster as cluster_module
from vkv.runtime.cluster.router import Router
from vkv.runtime.cluster.stats import Member
from vkv.runtime.engine.migration.messages import Answer, Command, Ready
from vkv.runtime.link.messages import decode_from_engine, decode_to_engine, encode
from vkv.runtime.link.wire import Frames
from vkv.runtime.request.spec import SequenceKey

COMMANDS, ANSWERS = get_args(Command), get_args(Answer)
KINDS = [kind.__name__ for kind in (*COMMANDS, *ANSWERS)]
TO_SOURCE = {"Begin", "Carry", "Pause", "GoOn", "Release"}
FROM_SOURCE = {"Begun", "Carried", "Paused", "Ended", "WentOn", "Released"}

Fate = Sequence[float]
"""When each copy of a message goes on, in seconds from now: `(0,)` as it should be, `()` never."""

ON: Fate = (0,)


@dataclass(frozen=True)
class Passing:
    """A message of a migration that passes.

    Attributes:
        instance: that it is for, or from.
        count: of its kind and epoch, beginning with 1: a command is repeated until it is answered.
    """

    instance: int
    message: Any
    count: int

    @property
    def kind(self) -> str:
        return type(self.message).__name__

    @property
    def is_answer(self) -> bool:
        return isinstance(self.message, ANSWERS)

    @property
    def is_of_source(self) -> bool:
        return self.kind in TO_SOURCE or self.kind in FROM_SOURCE


@dataclass(eq=False)
class _Pair:
    """A connection of the front end's, and the one to the instance."""

    instance: int
    front: Frames
    engine: Frames
    is_open: bool = True


@dataclass
class Middle:
    """Hears all, on a thread of its own.

    Attributes:
        decide: the fate of a message of a migration; called on that thread.
        cut_at: after how many bytes the next stage that goes to an instance is cut, None for not
            at all; called likewise, for each address that an instance offers.
        pids: of the instances' processes.
    """

    decide: Callable[[Passing], Fate] = lambda passing: ON
    cut_at: Callable[[SequenceKey], int | None] = lambda key: None
    pids: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._ringer = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self._new: list[_Pair] = []
        self._late: list[tuple[float, int, _Pair, bool, bytes]] = []
        self._order = itertools.count()
        self._counts: Counter[tuple[SequenceKey, int, str]] = Counter()
        self._is_closed = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="middle", daemon=True)
        self._thread.start()

    def between(self, instance: int, connection: socket.socket, pid: int) -> socket.socket:
        """What is spoken into in place of an instance's own connection."""
        ours, theirs = socket.socketpair()
        self.pids[instance] = pid
        self._new.append(_Pair(instance, Frames(ours), Frames(connection)))
        self._ringer.send(b"!")
        return theirs

    def kill(self, instance: int, number: int = signal.SIGKILL) -> None:
        """Send an instance a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pids[instance], number)

    def close(self) -> None:
        """Hang up on all."""
        self._is_closed = True
        self._ringer.send(b"!")
        self._thread.join(10)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._ringer.close()
        self._selector.close()

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._turn()
        except BaseException as error:
            self.error = error
            raise

    def _turn(self) -> None:
        wait_s = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                self._bell.recv(64)
                self._greet()
            else:
                self._hear(*key.data.both)
        while self._late and self._late[0][0] <= time.monotonic():
            _, _, pair, is_answer, packed = heapq.heappop(self._late)
            self._pass_on(pair, is_answer, packed)

    def _greet(self) -> None:
        while self._new:
            pair = self._new.pop()
            self._selector.register(pair.front, selectors.EVENT_READ, _End(pair, False))
            self._selector.register(pair.engine, selectors.EVENT_READ, _End(pair, True))

    def _hear(self, pair: _Pair, is_answer: bool) -> None:
        if not pair.is_open:
            return
        try:
            messages = (pair.engine if is_answer else pair.front).read()
        except EOFError:
            self._hang_up(pair)
            return
        for packed in messages:
            for late_s in self._fate(pair, is_answer, packed):
                packed = self._readdressed(pair, packed) if is_answer else packed
                if late_s:
                    at = time.monotonic() + late_s
                    heapq.heappush(self._late, (at, next(self._order), pair, is_answer, packed))
                else:
                    self._pass_on(pair, is_answer, packed)

    def _fate(self, pair: _Pair, is_answer: bool, packed: bytes) -> Fate:
        message: Any = (decode_from_engine if is_answer else decode_to_engine)(packed)
        if not isinstance(message, ANSWERS if is_answer else COMMANDS):
            return ON
        named = message.key, message.epoch, type(message).__name__
        self._counts[named] += 1
        return self.decide(Passing(pair.instance, message, self._counts[named]))

    def _pass_on(self, pair: _Pair, is_answer: bool, packed: bytes) -> None:
        if not pair.is_open:
            return
        frames = pair.front if is_answer else pair.engine
        try:
            frames.write(packed)
            while frames.has_kept:  # one side is slow, and both wait for it
                select.select([], [frames], [], 1.0)
                frames.flush()
        except OSError:
            if is_answer:  # else what the engine said before it died is still to be heard
                self._hang_up(pair)

    def _hang_up(self, pair: _Pair) -> None:
        pair.is_open = False
        for frames in (pair.front, pair.engine):
            self._selector.unregister(frames)
            frames.close()

    # -- between instances -------------------------------------------------------------------------

    def _readdressed(self, pair: _Pair, packed: bytes) -> bytes:
        """An offer of memory, where the way to it is to break."""
        message = decode_from_engine(packed)
        if not isinstance(message, Ready) or not message.address:
            return packed
        num_bytes = self.cut_at(message.key)
        if num_bytes is None:
            return packed
        offer = msgspec.msgpack.decode(message.address)
        theirs = next(part for part in _parts(offer) if isinstance(part, str) and part[:1] == "/")
        ours = f"{theirs}.{next(self._order)}"
        _Cut(ours, theirs, num_bytes)
        address = msgspec.msgpack.encode(_replaced(offer, theirs, ours))
        return encode(msgspec.structs.replace(message, address=address))


def _parts(offer: Any) -> Iterator[Any]:
    if isinstance(offer, list):
        for part in offer:
            yield from _parts(part)
    else:
        yield offer


def _replaced(offer: Any, what: str, by: str) -> Any:
    if isinstance(offer, list):
        return [_replaced(part, what, by) for part in offer]
    return by if offer == what else offer


@dataclass(frozen=True)
class _End:
    """One end of a pair, for the selector."""

    pair: _Pair
    is_answer: bool

    @property
    def both(self) -> tuple[_Pair, bool]:
        return self.pair, self.is_answer


class _Cut:
    """A way for one stage of keys and values, which breaks after some bytes; descriptors pass, too.

    It waits for that stage in a thread, and for no longer than some seconds.
    """

    def __init__(self, ours: str, theirs: str, num_bytes: int) -> None:
        self._path, self._theirs, self._left = ours, theirs, num_bytes
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(ours)
        self._listener.listen(4)
        self._listener.settimeout(15)
        threading.Thread(target=self._run, name="cut", daemon=True).start()

    def _run(self) -> None:
        with self._listener, suppress(OSError):
            ours, _ = self._listener.accept()
            with ours, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as theirs:
                theirs.connect(self._theirs)
                self._pump(ours, theirs)
        Path(self._path).unlink(missing_ok=True)

    def _pump(self, ours: socket.socket, theirs: socket.socket) -> None:
        exact = 4096  # bytes that go one by one: descriptors belong to the one they came with
        while self._left > 0:
            ready, _, _ = select.select([ours, theirs], [], [], 15)
            if not ready:
                return
            for one in ready:
                most = 1 if exact > 0 else min(self._left, 1 << 16)
                data, descriptors, _, _ = socket.recv_fds(one, most, 253)
                if not data:
                    return
                socket.send_fds(theirs if one is ours else ours, [data], descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                self._left -= len(data)
                exact -= len(data)


@contextmanager
def in_the_middle() -> Iterator[Middle]:
    """Clusters that are made meanwhile reach their instances through it."""
    middle = Middle()

    class Overheard(Router):
        def join(self, member: Member, connection: socket.socket) -> None:
            super().join(member, middle.between(member.id, connection, member.pid))

    try:
        with mock.patch.object(cluster_module, "Router", Overheard):
            yield middle
    finally:
        middle.close()
