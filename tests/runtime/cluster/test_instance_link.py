"""The way to one instance, which is played here: what it says wrong, and who does not heed it."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vkv.runtime.cluster.instances import instance_link
from vkv.runtime.cluster.instances.instance_link import InstanceLink
from vkv.runtime.link.messages import Answer, Outputs, decode_to_engine, encode
from vkv.runtime.link.wire import Frames
from vkv.runtime.request.step_output import StepOutput


class _Listener:
    """Hears what comes, and fails at the first outputs."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.gone: list[str] = []
        self.has_failed = False

    def on_outputs(self, instance: int, outputs: list[StepOutput]) -> None:
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("a policy of a user's own")
        self.token_ids += [token for output in outputs for token in output.token_ids]

    def on_gone(self, instance: int, why: str) -> None:
        self.gone.append(why)

    def on_answer(self, instance: int, answer: Any) -> None: ...
    def on_pulse(self, instance: int, pulse: Any) -> None: ...
    def on_face(self, instance: int, face: Any) -> None: ...


def _output(token_id: int) -> bytes:
    return encode(Outputs([StepOutput(request_id="a", index=0, token_ids=(token_id,))]))


@contextmanager
def _linked(listener: _Listener, liveness_s: float) -> Iterator[Frames]:
    """An instance's end of a link to a listener, of a loop that runs."""
    here, there = socket.socketpair()
    with there:
        link = InstanceLink(7, here, listener, liveness_s=liveness_s)
        yield Frames(there)
        link.close()


def _hear(*messages: bytes) -> _Listener:
    """What a listener has heard of messages that come at once."""
    listener = _Listener()

    async def run() -> None:
        with _linked(listener, 60.0) as frames:
            for message in messages:
                frames.write(message)
            for _ in range(20):
                await asyncio.sleep(0.005)

    asyncio.run(run())
    return listener


def test_what_comes_behind_something_that_fails_is_not_lost() -> None:
    listener = _hear(_output(1), _output(2), _output(3))
    assert listener.has_failed
    assert (listener.token_ids, listener.gone) == ([2, 3], [])


def test_an_instance_that_says_what_nobody_says_is_gone() -> None:
    listener = _hear(_output(1), _output(2), b"\xc1", _output(3))
    assert listener.token_ids == [2]
    (why,) = listener.gone
    assert "use one vkv on all nodes" in why


@pytest.mark.parametrize("answers", [True, False])
def test_only_an_instance_that_is_silent_while_it_is_listened_to_is_gone(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """All is frozen for a while between a ping and its answer."""
    monkeypatch.setattr(instance_link, "_PING_S", 0.05)
    listener = _Listener()

    async def run() -> None:
        with _linked(listener, 0.4) as frames:
            heard: list[Any] = []
            while not heard:
                await asyncio.sleep(0.005)
                heard = [decode_to_engine(message) for message in frames.read()]
            time.sleep(1.0)
            await asyncio.sleep(0.1)
            if answers:
                frames.write(encode(Answer(heard[0].number)))
                await asyncio.sleep(0.2)
            async with asyncio.timeout(20):
                while not (answers or listener.gone):
                    await asyncio.sleep(0.005)

    asyncio.run(run())
    assert len(listener.gone) == (not answers)
