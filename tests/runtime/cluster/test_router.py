"""The way to instances, which are played here: what it does of what they answer."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import standin.process
from vkv import SamplingParams
from vkv.runtime.cluster.policies import RoundRobin
from vkv.runtime.cluster.router import Router
from vkv.runtime.cluster.stats import Member
from vkv.runtime.engine.messages import Add, Message, Resume, SetPriority
from vkv.runtime.engine.migration.messages import Begin, Cancel, Cancelled, Ended, GoOn, WentOn
from vkv.runtime.link.face import Face
from vkv.runtime.link.messages import Answer, Ask, Outputs, Pulse, Welcome, decode_to_engine, encode
from vkv.runtime.link.wire import Frames
from vkv.runtime.request.continuation import Continuation
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.request.step_output import StepOutput
from vkv.vmem.errors import EngineDied, ForkedProcess, InvalidOperation, VkvError

_KEY = ("a", 0)


class _Played:
    """An instance that says what it is told to.

    Args:
        answer: what it says to a message.
    """

    def __init__(self, path: Path, answer: Callable[[Any], Sequence[Any]]) -> None:
        self.heard: list[Any] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        frames = Frames(connection)
        connection.setblocking(True)
        face: Any = Face(
            name="",
            tokenizer=None,
            sampling_defaults={},
            admission=None,  # type: ignore[arg-type]
            dtype="float32",
            device="cpu",
            max_seqs=8,
            page_bytes=4096,
            token_bytes=1,
            capacity_tokens=1000,
        )
        frames.write(encode(Welcome(face.pack())))
        while True:
            try:
                messages = [decode_to_engine(packed) for packed in frames.read()]
            except EOFError:
                break
            for message in messages:
                self.heard.append(message)
                for said in self._answer(message):
                    frames.write(encode(said))
        frames.close()
        self._listener.close()

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


class _Sink:
    def __init__(self) -> None:
        params = SamplingParams(temperature=0, max_tokens=4)
        self.spec = RequestSpec(request_id=_KEY[0], prompt_token_ids=[1, 2], params=params)
        self.token_ids: list[int] = []
        self.ended = threading.Event()

    @property
    def is_finished(self) -> bool:
        return self.ended.is_set()

    def accept(self, output: StepOutput) -> Sequence[Message]:
        self.token_ids += output.token_ids
        if output.finish_reason is not None:
            self.ended.set()
        return ()

    def fail(self, error: VkvError) -> None:
        raise error


def _join(router: Router, folder: Path, number: int) -> None:
    """Have an instance that is played there be one of the router's."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(folder / str(number)))
    router.join(Member(id=number, role="both", pid=0), connection)


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router(RoundRobin(), lambda instance: None)
    yield router
    router.close()


def _output(token_id: int, epoch: int, *, ends: bool = False) -> Outputs:
    output = StepOutput(
        request_id=_KEY[0],
        index=_KEY[1],
        epoch=epoch,
        token_ids=(token_id,),
        finish_reason="length" if ends else None,
    )
    return Outputs([output])


def test_what_neither_end_of_a_move_has_goes_on_from_its_tokens(
    router: Router, tmp_path: Path
) -> None:
    """Though no instance has died, which is when such are looked for, too."""

    resumed: list[Continuation] = []

    def answer(message: Any) -> Sequence[Any]:
        if isinstance(message, Add):
            return [_output(7, 0)]
        if isinstance(message, Begin):
            return [Ended(message.key, message.epoch, "it is gone")]
        if isinstance(message, GoOn):
            return [WentOn(message.key, message.epoch, is_here=False)]
        if isinstance(message, Cancel):
            return [Cancelled(message.key, message.epoch)]
        if isinstance(message, Resume):
            resumed.append(message.continuation)
            return [_output(8, message.continuation.epoch, ends=True)]
        return []

    played = [_Played(tmp_path / str(number), answer) for number in range(2)]
    for number in range(2):
        _join(router, tmp_path, number)
    sink = _Sink()
    router.submit([sink])
    while not sink.token_ids:
        sink.ended.wait(0.01)
    source = router.stats().requests[_KEY]
    assert source is not None
    router.migrate(_KEY, 1 - source)
    assert sink.ended.wait(10), router.stats().requests
    assert sink.token_ids == [7, 8]
    assert router.stats().num_recomputed == 1
    assert [list(one.output_token_ids) for one in resumed] == [[7]]
    router.close()
    for instance in played:
        instance.join()


def test_nothing_stays_of_instances_that_left(router: Router) -> None:
    asked: list[int] = []
    router.on_leaving = asked.append
    for instance in (3, 3, 4):
        pulse = Pulse(stats=None, is_leaving=True)  # type: ignore[arg-type]
        router._thread.read(lambda i=instance, p=pulse: router.on_pulse(i, p))
    assert asked == [3, 4]
    router.end(3, "drained")
    assert router._leaving == {4}


@pytest.mark.parametrize("drains", [True, False])
def test_who_drains_may_end_while_all_are_asked(
    router: Router, tmp_path: Path, drains: bool
) -> None:
    asked = threading.Event()

    def say_nothing(message: Any) -> Sequence[Any]:
        if isinstance(message, Ask) and message.question == "load_adapter":
            asked.set()
        return []

    def answer(message: Any) -> Sequence[Any]:
        return [Answer(message.number, 7)] if isinstance(message, Ask) else []

    played = [
        _Played(tmp_path / str(number), how) for number, how in enumerate((say_nothing, answer))
    ]
    for number in range(2):
        _join(router, tmp_path, number)
    found: list[Any] = []

    def ask() -> None:
        try:
            found.extend(router.ask("load_adapter", "a", "/there"))
        except EngineDied as error:
            found.append(type(error))

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(10)
    if drains:
        router.begin_drain(0)
    router.end(0, "drained")
    thread.join(10)
    assert found == ([None, 7] if drains else [EngineDied])
    router.close()
    for one in played:
        one.join()


def test_whoever_waits_hears_of_the_end(router: Router, tmp_path: Path) -> None:
    """A drain that never ends, a move that nobody answers, a question: none waits for ever."""
    begun = threading.Event()

    def note(message: Any) -> Sequence[Any]:
        if isinstance(message, Begin):
            begun.set()
        return []

    played = [_Played(tmp_path / str(number), note) for number in range(2)]
    for number in range(2):
        _join(router, tmp_path, number)
    while not all(m.has_arrived for m in router.members()):
        time.sleep(0.01)
    sink = _Sink()
    sink.fail = lambda error: None  # type: ignore[method-assign]
    router.submit([sink])
    while (source := router.stats().requests.get(_KEY)) is None:
        time.sleep(0.01)
    waits: list[Callable[[], Any]] = [
        lambda: router.migrate(_KEY, 1 - source),
        lambda: router.drain(source),
        lambda: router.ask("trim"),
        lambda: router.ask_one(1, "trim"),
    ]
    found: list[type[BaseException]] = []

    def wait(act: Callable[[], Any]) -> None:
        try:
            act()  # which may find no instance any more
        except BaseException as error:  # noqa: BLE001 - to be looked at
            found.append(type(error))

    threads = [threading.Thread(target=wait, args=(act,), daemon=True) for act in waits]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    router.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert set(found) <= {InvalidOperation, EngineDied}
    for late in (router.stats, router.members, lambda: router.drain(0)):
        with pytest.raises(InvalidOperation, match="create another"):
            late()
    for one in played:
        one.join()


def test_a_forked_child_is_refused_what_its_parent_has_a_thread_for(router: Router) -> None:
    acts = (router.stats, router.members, lambda: router.ask("trim"), lambda: router.end(0, "died"))

    def child() -> int:
        signal.alarm(20)  # one that waits is killed by it
        num_refused = 0
        for act in acts:
            with contextlib.suppress(ForkedProcess):
                act()
                num_refused -= 1
            num_refused += 1
        router.close()  # of no effect
        return num_refused

    assert standin.process.run_in_fork(child) == len(acts)
    assert router.stats().instances == ()


def test_who_is_held_back_gets_another_priority_too(router: Router, tmp_path: Path) -> None:
    added: list[Add] = []

    def note(message: Any) -> Sequence[Any]:
        added.extend([message] if isinstance(message, Add) else [])
        return [_output(1, 0, ends=True)] if isinstance(message, Add) else []

    sink = _Sink()
    router.submit([sink])
    router.post(SetPriority("another", 3))
    router.post(SetPriority(_KEY[0], -1))
    played = _Played(tmp_path / "0", note)
    _join(router, tmp_path, 0)
    assert sink.ended.wait(10)
    assert [one.spec.priority for one in added] == [-1]
    router.close()
    played.join()
