"""An engine's process, whose thread is the test's: what it answers to commands of migrations."""

import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vkv import LLM, SamplingParams, StructuredOutputsParams
from vkv.runtime.engine.messages import Add
from vkv.runtime.engine.migration.messages import (
    Begin,
    Begun,
    Cancel,
    Cancelled,
    Commit,
    Ended,
    GoOn,
    WentOn,
)
from vkv.runtime.execution.grammars import Grammars
from vkv.runtime.link.carrier import SocketCarrier
from vkv.runtime.link.engine_process import EngineServer
from vkv.runtime.link.face import Face
from vkv.runtime.link.messages import Outputs, decode_from_engine, encode
from vkv.runtime.link.wire import Frames
from vkv.runtime.request.continuation import Continuation
from vkv.runtime.request.spec import RequestSpec

_KEY = ("a", 0)


class _Front:
    """The server, turned by its caller, and a front's connection to it."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        path = str(folder / "engine")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        face = Face.of(llm.loaded, llm.engine, llm.config)
        carrier = SocketCarrier(f"{path}.kv")
        self.server = EngineServer(llm.loop, face, listener, idle_trim_s=None, carrier=carrier)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        self._frames = Frames(connection)
        self._listener = listener
        self.heard: list[Any] = []

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._frames.write(encode(message))

    def wait_for(self, kind: type) -> Any:
        """Turn the server until it says something of a kind; what it says."""
        for _ in range(2000):
            found = [message for message in self.heard if isinstance(message, kind)]
            if found:
                return found[-1]
            if (
                self.server._loop.has_work
                or select.select([self.server._selector], [], [], 0.05)[0]
            ):
                self.server.turn()
            self.heard += [decode_from_engine(packed) for packed in self._frames.read()]
        raise AssertionError(f"no {kind}: {self.heard}")

    def close(self) -> None:
        self._frames.close()
        self.server.close()
        self._listener.close()


@pytest.fixture
def front(tmp_path: Path) -> Iterator[_Front]:
    with LLM(device="cpu", dtype="float32", max_seqs=2, max_len=256) as llm:
        front = _Front(llm, tmp_path)
        yield front
        front.close()


def _add(**params: Any) -> Add:
    given = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params}
    return Add(
        RequestSpec(request_id="a", prompt_token_ids=[5, 6, 7], params=SamplingParams(**given))
    )


def test_what_was_sent_before_a_command_is_done_before_it(front: _Front) -> None:
    front.send(_add(), Begin(_KEY, 1))
    assert front.wait_for(Begun).continuation.key == _KEY
    assert not [message for message in front.heard if isinstance(message, Ended)]


def test_a_request_whose_grammar_is_compiled_stays_and_is_not_lost(
    front: _Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, prepare = threading.Event(), Grammars.prepare

    def slowly(self: Grammars, outputs: StructuredOutputsParams) -> None:
        assert may_end.wait(20)
        prepare(self, outputs)

    monkeypatch.setattr(Grammars, "prepare", slowly)
    front.send(_add(structured_outputs=StructuredOutputsParams(regex="[ab]{5}")), Begin(_KEY, 1))
    front.wait_for(Ended)
    front.send(GoOn(_KEY, 1))
    assert front.wait_for(WentOn).is_here
    may_end.set()
    assert front.wait_for(Outputs)


def test_commands_that_come_late_leave_nothing_that_is_waited_for(front: _Front) -> None:
    spec = _add().spec
    commit = Commit(_KEY, 1, Continuation(spec=spec, epoch=1), 0)
    front.send(commit)
    while not front.wait_for(Outputs).outputs[-1].finish_reason:
        front.heard = [message for message in front.heard if not isinstance(message, Outputs)]
    for late in (commit, GoOn(_KEY, 1), Cancel(_KEY, 1)):
        front.send(late)
    front.wait_for(Cancelled)
    (record,) = front.server._all_fronts
    assert not record.unfinished
    assert not front.server._fronts


def test_what_is_taken_back_is_waited_for_no_more_and_what_goes_on_is(front: _Front) -> None:
    spec = _add(max_tokens=200).spec
    front.send(Commit(_KEY, 1, Continuation(spec=spec, epoch=1), 0))
    front.wait_for(Outputs)
    front.send(Begin(_KEY, 2))
    front.wait_for(Begun)
    front.send(Commit(_KEY, 1, Continuation(spec=spec, epoch=1), 0), GoOn(_KEY, 2))
    assert front.wait_for(WentOn).is_here
    front.heard.clear()
    front.wait_for(Outputs)
    front.send(Cancel(_KEY, 1))
    front.wait_for(Cancelled)
    assert not front.server._fronts
