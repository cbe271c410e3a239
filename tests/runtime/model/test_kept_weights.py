"""Weights under a limit: counted before they are read, and read while others use the limit."""

import errno
import threading

import pytest
from vkv.allocator import MemoryLimit
from vkv.runtime.model.extras.kept_weights import KeptWeights, bring_each
from vkv.vmem.errors import BadCheckpoint, DriverError, OutOfPages, StepFailed, VkvError


@pytest.fixture
def kept() -> KeptWeights[str, str]:
    return KeptWeights(MemoryLimit(100))


def _bring(
    kept: KeptWeights[str, str], key: str, num_bytes: int, needed: int | None = None
) -> None:
    kept.bring(key, num_bytes, lambda: (key.upper(), needed or num_bytes), key)


def test_others_use_the_limit_while_weights_are_read(kept: KeptWeights[str, str]) -> None:
    limit = kept._limit
    is_reading, may_end = threading.Event(), threading.Event()

    def make() -> tuple[str, int]:
        is_reading.set()
        assert may_end.wait(10)
        return "A", 60

    _bring(kept, "b", 30)
    kept.pin(["a"])
    thread = threading.Thread(target=kept.bring, args=("a", 50, make, "a"))
    thread.start()
    assert is_reading.wait(10)
    assert limit.lock.acquire(timeout=5)
    try:
        assert limit.taken_bytes == 80
        assert "a" not in kept
        kept.give_up(20)  # a cache that runs short
        assert limit.take(20)
    finally:
        limit.lock.release()
        may_end.set()
        thread.join(10)
    assert (kept["a"], kept.num_bytes("a"), limit.taken_bytes) == ("A", 60, 80)
    assert "b" not in kept


def test_what_fails_is_not_counted(kept: KeptWeights[str, str]) -> None:
    limit = kept._limit

    def make(error: BaseException) -> tuple[str, int]:
        raise error

    without_memory = BadCheckpoint("cannot read it")  # as `reading` has it
    without_memory.__cause__ = MemoryError("none left")
    for error, told in [
        (OSError(errno.ENOMEM, "none left"), OutOfPages),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OutOfPages),
        (without_memory, OutOfPages),
        (FileNotFoundError("gone"), FileNotFoundError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ]:
        with pytest.raises(told):
            kept.bring("a", 40, lambda error=error: make(error), "a")
        assert limit.taken_bytes == 0
    with pytest.raises(OutOfPages, match="a needs"):
        _bring(kept, "a", 40, 120)
    assert limit.taken_bytes == 0
    _bring(kept, "a", 40, 30)
    _bring(kept, "b", 60, 70)  # for which the first one goes, if there is no room for both
    assert (list(kept), limit.taken_bytes) == (["a", "b"], 100)
    _bring(kept, "c", 10)
    assert (list(kept), limit.taken_bytes) == (["b", "c"], 80)


def test_one_that_cannot_be_had_keeps_nobody_from_the_others() -> None:
    errors: dict[str, Exception] = {
        "driver": DriverError("not unmapped"),
        "file": BadCheckpoint("damaged"),
        "bug": ZeroDivisionError("by zero"),
    }
    brought: list[str] = []

    def bring(key: str) -> None:
        if key in errors:
            raise errors[key]
        brought.append(key)

    lacking = bring_each(["a", *errors, "b"], bring)
    assert brought == ["a", "b"]
    kinds: dict[str, type[VkvError]] = {
        "driver": OutOfPages,
        "file": BadCheckpoint,
        "bug": StepFailed,
    }
    assert {key: type(error) for key, error in lacking.items()} == kinds
    assert "ZeroDivisionError: by zero" in str(lacking["bug"])
