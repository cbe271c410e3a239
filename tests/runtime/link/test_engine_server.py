"""An engine's process and those that call it: who is let in, and what follows when they go."""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zoo
from vkv import LLM, SamplingParams
from vkv.allocator.transfer import kv_dir
from vkv.runtime.engine.messages import Add
from vkv.runtime.link.addresses import Address, Listener, Place, listen_near
from vkv.runtime.link.engine_process import EngineServer
from vkv.runtime.link.face import Face
from vkv.runtime.link.messages import (
    Ask,
    Outputs,
    Welcome,
    decode_from_engine,
    encode,
)
from vkv.runtime.link.wire import Frames
from vkv.runtime.request.spec import RequestSpec

_PLACE = Place(node="here", host="127.0.0.1", secret=b"s" * 32)
_SILENCE_S = 0.5


class _Served:
    """A server that is turned on a thread, until it says that it is deserted."""

    def __init__(self, llm: LLM, listener: Listener, address: Address) -> None:
        self.address = address
        self.is_deserted = threading.Event()
        face = Face.of(llm.loaded, llm.engine, llm.config)
        self._is_over = False
        self._server = EngineServer(
            llm.loop,
            face,
            listener,
            idle_trim_s=None,
            silence_s=_SILENCE_S,
            on_deserted=self.is_deserted.set,
        )
        self._thread = threading.Thread(target=self._turn, daemon=True)
        self._thread.start()

    def _turn(self) -> None:
        while not self._is_over:
            self._server.turn()

    def call(self) -> "_Caller":
        return _Caller(_PLACE.call(self.address, "an instance", 10))

    def close(self) -> None:
        self._is_over = True
        self._server.ask_to_leave()  # wakes it up
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._server.close()


class _Caller:
    """A front process's end."""

    def __init__(self, connection: socket.socket) -> None:
        self.frames = Frames(connection)
        self.num_tokens = 0
        self.is_welcome = self.is_hung_up_on = False

    def until(self, is_so: Callable[["_Caller"], bool], *, pings: bool = False) -> None:
        deadline, pinged_s = time.monotonic() + 20, 0.0
        while not is_so(self):
            assert time.monotonic() < deadline
            if pings and time.monotonic() - pinged_s > _SILENCE_S / 5:
                pinged_s = time.monotonic()
                self.frames.write(encode(Ask(0, "ping")))
            self._read()
            time.sleep(0.005)

    def _read(self) -> None:
        try:
            messages = [decode_from_engine(message) for message in self.frames.read()]
        except EOFError:
            self.is_hung_up_on = True
            self.frames.close()
            return
        for message in messages:
            self.is_welcome |= isinstance(message, Welcome)
            if isinstance(message, Outputs):
                self.num_tokens += sum(len(output.token_ids) for output in message.outputs)


@pytest.fixture(params=["tcp", "unix"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LLM, _Served]]:
    path = str(tmp_path / "engine")
    if request.param == "tcp":
        gate = _PLACE.open_gate("an instance")
        listener, address = gate, Address("there", "", *gate.getsockname())
    else:
        listener, address = listen_near(path), Address("here", path)
    options = zoo.with_defaults({"max_seqs": 1})
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        served = _Served(llm, listener, address)
        yield llm, served
        served.close()
        listener.close()


def _spec(number: int = 0) -> RequestSpec:
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    return RequestSpec(request_id=str(number), prompt_token_ids=[1, 2, 3], params=params)


def test_a_front_that_hangs_up_deserts_its_engine(served: tuple[LLM, _Served]) -> None:
    llm, server = served
    one, two = server.call(), server.call()
    one.until(lambda caller: caller.is_welcome)
    two.until(lambda caller: caller.is_welcome)
    for number in range(100):
        two.frames.write(encode(Add(_spec(number))))
    two.until(lambda caller: caller.num_tokens > 3)
    two.frames.close()
    assert not server.is_deserted.wait(0.05)  # one is there yet
    one.frames.close()
    assert server.is_deserted.wait(20)
    while llm.loop.has_work:
        time.sleep(0.01)


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_front_that_says_nothing_is_given_up(served: tuple[LLM, _Served], is_busy: bool) -> None:
    """As when its machine has vanished: no system tells."""
    llm, server = served
    caller = server.call()
    caller.until(lambda caller: caller.is_welcome)
    for number in range(100 * is_busy):
        caller.frames.write(encode(Add(_spec(number))))
    began_s = time.monotonic()
    caller.until(lambda _: time.monotonic() - began_s > 2 * _SILENCE_S, pings=True)
    assert not caller.is_hung_up_on
    assert not server.is_deserted.is_set()
    caller.until(lambda caller: caller.is_hung_up_on)
    assert server.is_deserted.wait(20)
    while llm.loop.has_work:
        time.sleep(0.01)


def test_a_front_that_says_what_nobody_says_is_hung_up_on_alone(
    served: tuple[LLM, _Served],
) -> None:
    _, server = served
    other, wrong = server.call(), server.call()
    other.until(lambda caller: caller.is_welcome)
    other.frames.write(encode(Add(_spec())))
    wrong.frames.write(b"\xc1")  # which is no msgpack
    wrong.until(lambda caller: caller.is_hung_up_on)
    other.until(lambda caller: caller.num_tokens == 100, pings=True)
    other.frames.close()
    assert server.is_deserted.wait(20)


def test_without_a_descriptor_to_spare_fronts_are_let_in_later(
    served: tuple[LLM, _Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, errors = socket.socket.accept, [errno.EMFILE, errno.ENFILE]

    def fail_first(listener: socket.socket) -> tuple[socket.socket, object]:
        if errors:
            raise OSError(errors.pop(), "injected")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", fail_first)
    _, server = served
    caller = server.call()
    caller.until(lambda caller: caller.is_welcome)
    assert not errors
    caller.frames.close()
    assert server.is_deserted.wait(20)


def test_at_rest_it_notices_what_was_copied_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or pages of finished requests would stay pinned until the next one comes."""
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)
    path = str(tmp_path / "engine")
    listener, address = listen_near(path), Address("here", path)
    options = zoo.with_defaults({"swap_memory": "1MiB", "kv_dir": tmp_path / "kv"})
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        served = _Served(llm, listener, address)
        caller = served.call()
        caller.frames.write(encode(Add(_spec())))
        caller.until(lambda caller: caller.num_tokens == 100, pings=True)
        caller.until(lambda _: not llm.engine.cache.stats().pages_held, pings=True)
        assert llm.engine.cache.stats().pages_parked
        assert llm.engine.scheduler.tiers.is_settled
        caller.frames.close()
        served.close()
        listener.close()


def test_what_strangers_say_is_never_read() -> None:
    """A message that an engine would take, from who has proved nothing."""
    gate = _PLACE.open_gate("an instance")
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        served = _Served(llm, gate, Address("there", "", *gate.getsockname()))
        with socket.create_connection(gate.getsockname(), timeout=10) as stranger:
            Frames(stranger).write(encode(Add(_spec())))
            friend = served.call()
            friend.until(lambda caller: caller.is_welcome)
            time.sleep(0.1)
            assert not llm.loop.has_work
        assert not served.is_deserted.is_set()
        friend.frames.close()
        served.close()
        gate.close()
