"""Changes of how many instances there are: none waits for another instance to be empty."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vkv.runtime.cluster.fleet import Fleet
from vkv.runtime.cluster.snapshot import ClusterSnapshot, InstanceSnapshot
from vkv.runtime.cluster.stats import Member
from vkv.vmem.errors import InvalidOperation


class _Router:
    """Instances that drain until they are `empty`."""

    is_closed = False

    def __init__(self) -> None:
        self.there: dict[int, Member] = {}
        self.ended: list[tuple[int, str]] = []
        self.asked: list[tuple[str, ...]] = []
        self.empty = threading.Event()
        self.num_scaled = 0
        self.scaling_failed = False
        self.decisions = SimpleNamespace(on_scale=None)
        self.on_leaving: Callable[[int], None] = lambda instance: None

    def join(self, member: Member, connection: object) -> None:
        member.face = SimpleNamespace()  # type: ignore[assignment]
        self.there[member.id] = member

    def members(self) -> list[Member]:
        return list(self.there.values())

    def snapshot(self) -> ClusterSnapshot:
        pictures = [
            InstanceSnapshot(id=m.id, capacity_tokens=100, is_draining=m.is_draining)
            for m in self.there.values()
        ]
        return ClusterSnapshot(time_s=0.0, instances=tuple(pictures))

    def check_open(self) -> None:
        """It is."""

    def begin_drain(self, instance: int) -> None:
        self.there[instance].is_draining = True

    def drain(self, instance: int, timeout_s: float | None = None) -> None:
        assert self.empty.wait(10)

    def end(self, instance: int, why: str) -> None:
        self.ended.append((instance, why))
        self.there.pop(instance, None)

    def ask(self, *question: str) -> None:
        self.asked.append(question)

    def scaled(self, *, done: bool = True) -> None:
        self.num_scaled += 1
        self.scaling_failed = not done


class _Launcher:
    """Starts at once, but for the one that fails."""

    fails: int | None = None

    def begin(self, instance: int, **order: Any) -> None:
        """It is there."""

    def wait(self, instance: int) -> Any:
        if instance == self.fails:
            raise InvalidOperation("an instance did not start")
        return SimpleNamespace(pid=1, node="", lends_at=None)

    def connect(self, instance: int) -> None:
        """Nobody listens."""


@pytest.fixture
def router() -> _Router:
    return _Router()


@pytest.fixture
def fleet(router: _Router) -> Fleet:
    order = {"options": {"adapters": {}}}
    fleet = Fleet(_Launcher(), router, order)  # type: ignore[arg-type]
    fleet.start(["both"] * 3)
    return fleet


def _beside(act: Callable[..., None], *about: int) -> threading.Thread:
    thread = threading.Thread(target=act, args=about, daemon=True)
    thread.start()
    return thread


def _until(is_so: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline_s, "it does not come to that"
        time.sleep(0.001)


def _in_time(act: Callable[..., None], *about: Any) -> None:
    thread = _beside(act, *about)
    thread.join(5)
    assert not thread.is_alive(), "it waits for a drain"


def test_changes_do_not_wait_for_an_instance_to_be_empty(fleet: Fleet, router: _Router) -> None:
    draining = _beside(fleet.drain, 0)
    _until(lambda: router.there[0].is_draining)
    _in_time(fleet.load_adapter, "one", "/there")
    _in_time(fleet.scale, 3)
    assert set(router.there) == {0, 1, 2, 3}
    others = [_beside(fleet.drain, 1), _beside(fleet.scale, 1)]
    _until(lambda: len([m for m in router.members() if not m.is_draining]) == 1)
    (last,) = [m.id for m in router.members() if not m.is_draining]
    with pytest.raises(InvalidOperation, match="the only one"):
        fleet.drain(last)
    router.empty.set()
    for thread in (draining, *others):
        thread.join(10)
    assert set(router.there) == {last}
    assert {why for _, why in router.ended} == {"drained"}


def test_the_policy_may_ask_for_more_while_some_drain(fleet: Fleet, router: _Router) -> None:
    on_scale: Any = router.decisions.on_scale
    on_scale(2)
    _until(lambda: router.num_scaled)
    assert [m.is_draining for m in router.members()].count(True) == 1
    on_scale(4)
    _until(lambda: router.num_scaled == 2)
    assert len(router.there) == 5
    router.empty.set()
    _until(lambda: len(router.there) == 4)


def test_those_that_start_with_one_that_fails_were_not_drained(
    fleet: Fleet, router: _Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Launcher, "fails", 4)
    with pytest.raises(InvalidOperation, match="did not start"):
        fleet.start(["both", "both"])
    assert router.ended == [(3, "failed"), (4, "failed")]
    assert set(router.there) == {0, 1, 2}


@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_hears_whether_it_could_be(
    fails: bool, fleet: Fleet, router: _Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fails:
        monkeypatch.setattr(_Launcher, "fails", 3)
    on_scale: Any = router.decisions.on_scale
    on_scale(4)
    _until(lambda: router.num_scaled)
    assert router.scaling_failed == fails
