"""What becomes of requests where a policy, which may be a user's own, fails."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from vkv import SamplingParams
from vkv.runtime.cluster.decisions import Decisions
from vkv.runtime.cluster.members import Members
from vkv.runtime.cluster.policies import RoundRobin
from vkv.runtime.cluster.snapshot import ClusterSnapshot, Newcomer
from vkv.runtime.cluster.stats import Member
from vkv.runtime.engine.messages import Resume
from vkv.runtime.engine.migration.arbiter import Arbiter
from vkv.runtime.request.spec import RequestSpec


class _Wrong(RoundRobin):
    """Gives everything to one instance, or fails.

    Args:
        to: which; None to fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to: int | None = None

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        if self.to is None:
            raise RuntimeError("a mistake")
        return self.to


class _NoLink:
    def close(self) -> None: ...


@pytest.fixture
def cluster() -> tuple[_Wrong, Arbiter, Members, Decisions]:
    policy, arbiter = _Wrong(), Arbiter()
    members = Members(arbiter)
    for number in range(2):
        face: Any = SimpleNamespace(capacity_tokens=100, token_bytes=1, max_seqs=4)
        link: Any = _NoLink()
        members.add(Member(id=number, role="both", pid=0, face=face), link)
    return policy, arbiter, members, Decisions(policy, arbiter, members, max_moves=4)


def _spec(name: str) -> RequestSpec:
    return RequestSpec(
        request_id=name,
        prompt_token_ids=[1, 2],
        params=SamplingParams(max_tokens=4),
    )


def test_what_nobody_has_goes_on_though_the_policy_fails(
    cluster: tuple[_Wrong, Arbiter, Members, Decisions],
) -> None:
    policy, arbiter, members, decisions = cluster
    policy.to = 0
    decisions.held += [_spec("a"), _spec("b")]
    decisions.dispatch(lambda request_id: True)
    arbiter.take()
    policy.to = None
    members.remove(0, "died")
    arbiter.died("0")
    decisions.place_orphans()
    resumed = [message for to, message in arbiter.take() if to == "1"]
    assert [one.continuation.key[0] for one in resumed if isinstance(one, Resume)] == ["a", "b"]


def test_who_is_not_there_gets_nothing(
    cluster: tuple[_Wrong, Arbiter, Members, Decisions], caplog: pytest.LogCaptureFixture
) -> None:
    policy, arbiter, members, decisions = cluster
    policy.to = 7
    decisions.held.append(_spec("a"))
    decisions.dispatch(lambda request_id: True)
    assert not arbiter.has_some
    assert "7, which is not there" in caplog.text
    policy.to = 1
    decisions.dispatch(lambda request_id: True)
    assert arbiter.owner(("a", 0)) == "1"
    policy.to = 7
    members.remove(1, "died")
    arbiter.died("1")
    decisions.place_orphans()
    assert arbiter.owner(("a", 0)) == "0"


def test_what_fails_at_once_is_tried_again_after_a_while(
    cluster: tuple[_Wrong, Arbiter, Members, Decisions], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _, _, decisions = cluster
    monkeypatch.setattr(policy, "scale", lambda snapshot: 3)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    asked: list[int] = []
    decisions.on_scale = asked.append
    decisions.has_scaled()
    decisions.rebalance()
    decisions.rebalance()  # it is under way
    assert asked == [3]
    decisions.has_scaled(done=False)
    decisions.rebalance()
    assert asked == [3]
    now += 6
    decisions.rebalance()
    assert asked == [3, 3]
    decisions.has_scaled()
    decisions.rebalance()
    assert asked == [3, 3, 3]
