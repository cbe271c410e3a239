"""The handshake against two ends as plain as can be: all orders of all messages, and all deaths.

A message that was sent once may be delivered at any later time, any number of times or never: so
loss, doubling and reordering are all covered.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import zoo
from vkv.runtime.engine.migration.handshake import Handshake, HandshakeState, Stages
from vkv.runtime.engine.migration.messages import (
    Answer,
    Begin,
    Begun,
    Cancel,
    Cancelled,
    Carried,
    Carry,
    Command,
    Commit,
    Committed,
    Ended,
    Extend,
    GoOn,
    Pause,
    Paused,
    Prepare,
    Ready,
    Refused,
    Release,
    Released,
    WentOn,
)
from vkv.runtime.request.continuation import Continuation
from vkv.runtime.request.spec import RequestSpec

_KEY, _EPOCH = ("r", 0), 1
_MOVE = _KEY, _EPOCH
_CONTINUATION = Continuation(
    spec=RequestSpec(request_id="r", prompt_token_ids=(1, 2), params=zoo.greedy()), epoch=_EPOCH
)
_SOURCE, _TARGET = "source", "target"


@dataclass
class World:
    """A handshake, both ends, and all that was ever sent.

    Attributes:
        source: owns, exposed, away, over (it owns, and the epoch has ended), released, dead.
        target: none, expected, here, barred, dead.
        has_paused: the source has said so, and must wait for word.
    """

    handshake: Handshake
    source: str = "owns"
    target: str = "none"
    has_paused: bool = False
    sent: dict[str, tuple[str, Command | Answer]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        shake = self.handshake
        return (
            *(self.source, self.target, self.has_paused, frozenset(self.sent)),
            *(shake.phase, shake.outcome, shake.was_committed),
            *(frozenset(shake._dead), frozenset(shake._unanswered), shake._is_lost),
            *(shake._num_room, shake._num_carried),
        )

    def copy(self) -> "World":
        shake = copy.copy(self.handshake)
        shake._dead, shake._unanswered = set(shake._dead), set(shake._unanswered)
        return World(shake, self.source, self.target, self.has_paused, dict(self.sent))

    def send(self, receiver: str, message: Command | Answer) -> None:
        number = getattr(message, "stage", getattr(message, "num_room", ""))
        what = getattr(message, "what", getattr(message, "is_here", ""))
        self.sent[f"{type(message).__name__} {number} {what}"] = receiver, message

    def tell(self) -> None:
        for receiver, command in (*self.handshake.commands(), *self.handshake.reminders()):
            self.send(receiver, command)

    def deliver(self, receiver: str, message: Any) -> None:
        if receiver == "arbiter":
            self.handshake.on(message)
        elif getattr(self, receiver) != "dead":
            answer = self._at_source(message) if receiver == _SOURCE else self._at_target(message)
            self.send("arbiter", answer)

    def _at_source(self, command: Any) -> Answer:
        if isinstance(command, GoOn):
            if self.source in ("owns", "exposed", "away"):
                self.source = "over"
            return WentOn(*_MOVE, self.source != "released")
        if isinstance(command, Release):
            assert self.source in ("away", "released", "over"), self.source
            if self.source == "away":
                self.source = "released"
            return Released(*_MOVE)
        if self.source in ("over", "released"):
            return Ended(*_MOVE, "over")
        if isinstance(command, Begin):
            self.source = "exposed" if self.source == "owns" else self.source
            return Begun(*_MOVE, _CONTINUATION, 40, "f")
        assert isinstance(command, Carry | Pause)
        if self.has_paused:
            return Paused(*_MOVE, _CONTINUATION, 44)
        if isinstance(command, Carry) or command.num_room < 44:
            return Carried(*_MOVE, command.stage, 44)
        self.source, self.has_paused = "away", True
        return Paused(*_MOVE, _CONTINUATION, 44)

    def _at_target(self, command: Any) -> Answer:
        if isinstance(command, Cancel):
            self.target = "barred"
            return Cancelled(*_MOVE)
        if isinstance(command, Commit):
            if self.target == "barred":
                return Refused(*_MOVE, "commit", "barred")
            self.target = "here"
            return Committed(*_MOVE)
        if isinstance(command, Extend):
            if self.target != "expected":
                return Refused(*_MOVE, "extend", "not expected")
            return Ready(*_MOVE, b"", 0, command.num_room)
        assert isinstance(command, Prepare)
        if self.target not in ("none", "expected"):
            return Refused(*_MOVE, "prepare", "known")
        self.target = "expected"
        return Ready(*_MOVE, b"", 0, command.num_room)

    def check(self) -> None:
        source_runs = self.source in ("owns", "exposed", "over")
        assert not (source_runs and self.target == "here"), "two owners"
        if not self.handshake.is_done:
            return
        if self.handshake.outcome == "moved":
            assert self.target == "here"
            assert self.source in ("released", "dead")
        elif self.handshake.outcome == "stayed":
            assert self.source == "over"
            assert self.target in ("none", "barred", "dead")
        else:
            assert self.source in ("released", "dead")
            assert self.target in ("none", "barred", "dead")

    def finish(self) -> None:
        """With no more faults it comes to an end."""
        for _ in range(30):
            if self.handshake.is_done:
                return
            for receiver, command in self.handshake.commands():
                self.sent.clear()
                self.deliver(receiver, command)
                for _, answer in list(self.sent.values()):
                    self.handshake.on(answer)  # type: ignore[arg-type]
            self.check()
        raise AssertionError(f"no end from {self.key}")


def _next(world: World) -> Iterator[World]:
    """All that may happen: a delivery, an end by itself, a refusal, a death, impatience."""
    for label in world.sent:
        child = world.copy()
        child.deliver(*child.sent[label])
        yield child
    if world.source in ("exposed", "away") and not world.has_paused:
        child = world.copy()
        child.source = "over"
        child.send("arbiter", Ended(*_MOVE, "by itself"))
        yield child
    if world.target == "none" or (world.target == "expected" and "Commit  " in world.sent):
        child = world.copy()
        child.target = "barred"
        yield child
    if world.target == "expected":  # its lease is over: it must still take a commit
        child = world.copy()
        child.target = "lapsed"
        yield child
    child = world.copy()
    child.handshake.give_up("impatience")
    yield child
    for name in (_SOURCE, _TARGET):
        if getattr(world, name) != "dead" and not world.handshake.is_done:
            child = world.copy()
            setattr(child, name, "dead")
            child.handshake.died(name)
            yield child


@pytest.mark.parametrize("most", [0, 1, 2])
def test_there_is_one_owner_in_every_order_of_messages(most: int) -> None:
    first = World(Handshake(_KEY, _EPOCH, _SOURCE, _TARGET, Stages(most=most, spare_tokens=2)))
    first.tell()
    seen, todo = {first.key}, [first]
    states, outcomes = set(), set()
    while todo:
        world = todo.pop()
        world.check()
        states.add(world.handshake.state)
        outcomes.add(world.handshake.outcome)
        world.copy().finish()
        for child in _next(world):
            child.tell()
            if child.key not in seen:
                seen.add(child.key)
                todo.append(child)
    assert states == set(HandshakeState) - ({HandshakeState.COPYING} if not most else set())
    assert outcomes == {None, "moved", "stayed", "lost"}
    assert len(seen) > 1000
