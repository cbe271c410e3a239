"""A shield holds signals back, and leaves every handler where it was, whenever they come."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import standin.process
from signals import SignalAt, Timeout, time_out
from vkv.runtime.engine import interrupts
from vkv.runtime.engine.interrupts import Shield

_SIGNALS = (signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """Of three signals, the last of which raises nothing."""

    kept = {number: signal.getsignal(number) for number in _SIGNALS}
    mine = dict(zip(_SIGNALS, (signal.default_int_handler, time_out, lambda *_: None), strict=True))
    for number, handler in mine.items():
        signal.signal(number, handler)
    yield mine
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", _SIGNALS)
def test_a_signal_at_any_line_leaves_all_handlers_as_they_were(
    number: int, handlers: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "valid_signals", lambda: set(_SIGNALS))
    expected = {signal.SIGINT: KeyboardInterrupt, signal.SIGALRM: Timeout}.get(number)

    def work() -> None:
        with Shield() as shield:
            shield.deliver()

    for event in range(1, 200):
        sent = SignalAt([interrupts.__file__], event, number, work)
        assert {n: signal.getsignal(n) for n in _SIGNALS} == handlers, event
        assert Shield._outermost is None
        if not sent.was_sent:
            break
        assert sent.raised is expected, event
    assert 20 < event < 199


def test_what_came_is_delivered_at_the_end_or_when_asked_each_once() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    with Shield() as shield:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert not seen
        shield.deliver()
        assert seen == [signal.SIGUSR1] * 2
        with Shield() as inner:
            signal.raise_signal(signal.SIGUSR1)
            assert len(seen) == 2
            inner.deliver()
            assert len(seen) == 3
            signal.raise_signal(signal.SIGUSR1)
        assert len(seen) == 3
    assert len(seen) == 4


def test_several_that_raise_all_run() -> None:
    def work() -> None:
        with Shield():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGALRM)

    with pytest.raises(Timeout) as raised:
        work()
    assert isinstance(raised.value.__context__, KeyboardInterrupt)


def test_a_handler_that_is_set_meanwhile_stays() -> None:
    other = signal.default_int_handler
    with Shield():
        signal.signal(signal.SIGALRM, other)
    assert signal.getsignal(signal.SIGALRM) is other


def test_a_child_forked_under_a_shield_has_its_handlers() -> None:
    """Forked by another thread, too: that one is the child's main thread, and has no shield."""
    results: list[int] = []

    def child() -> int:
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return 1
        with Shield():
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            return 0
        return 2

    def fork() -> None:
        results.append(standin.process.run_in_fork(child))

    with Shield():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        fork()
    assert results == [0, 0]
