"""What instances are told of loans: what is new, once; and what the cluster takes meanwhile."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from vkv.runtime.cluster import lending
from vkv.runtime.cluster.lending import LendingDesk, LentAdmission, admission_of
from vkv.runtime.cluster.members import Members
from vkv.runtime.cluster.snapshot import ClusterSnapshot, InstanceSnapshot, RequestSnapshot
from vkv.runtime.cluster.stats import Member
from vkv.runtime.engine.admission import Admission
from vkv.runtime.engine.memory.lending import HeldLoan, LendingOrder, LendingReport
from vkv.runtime.engine.migration.arbiter import Arbiter
from vkv.runtime.link.addresses import Address
from vkv.runtime.request.sampling_params import SamplingParams
from vkv.vmem.errors import EngineDied, RequestTooLarge

REPORT = LendingReport(longest_alone=2000, max_local_tokens=1024, max_lent_tokens=1536)


class _Link:
    """Remembers what it is told, and answers when it is let."""

    silent_s = 0.0

    def __init__(self) -> None:
        self.orders: list[LendingOrder] = []
        self.answers: list[asyncio.Future[object]] = []

    def ask(self, question: str, *about: str) -> "asyncio.Future[object]":
        assert question == "lending"
        self.orders.append(msgspec.json.decode(about[0], type=LendingOrder))
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    def close(self) -> None:
        """Nothing is open."""


class _Face:
    """As much of one as is asked for."""

    def __init__(self) -> None:
        self.token_bytes, self.capacity_tokens, self.max_seqs = 256, 2080, 8
        self.admission = Admission(
            vocab_size=100,
            max_len=9000,
            limit_pages=65,
            longest=2000,
            why_not_longer="nobody lends",
            num_pages=lambda num_tokens: num_tokens // 32,
        )


def _members(count: int = 3) -> tuple[Members, list[_Link]]:
    members, links = Members(Arbiter()), [_Link() for _ in range(count)]
    for id, link in enumerate(links):
        address = Address("here", f"/tmp/{id}.lend")
        member = Member(id=id, role="both", pid=1, lends_at=address, lending=REPORT)
        member.face = _Face()  # type: ignore[assignment]
        members.add(member, link)  # type: ignore[arg-type]
    return members, links


def _with_a_long_one(members: Members) -> ClusterSnapshot:
    """What members say, and a long request on instance 0."""
    snapshot = members.snapshot(num_dispatched=0)
    long = RequestSnapshot(("a", 0), 2300, 1, most_tokens=2400)
    first, *others = snapshot.instances
    first: InstanceSnapshot = msgspec.structs.replace(first, requests=(long,), num_running=1)
    return msgspec.structs.replace(snapshot, instances=(first, *others))


def test_what_is_new_is_told_once() -> None:
    async def told() -> None:
        members, links = _members()
        desk = LendingDesk(members)
        desk.settle(members.snapshot(num_dispatched=0))
        assert [len(link.orders) for link in links] == [1, 1, 1]
        assert links[0].orders[0] == LendingOrder(longest=1024 + 2 * 1536)
        for _ in range(2):
            desk.settle(_with_a_long_one(members))
        assert [len(link.orders) for link in links] == [2, 1, 1]
        (line, *_) = links[0].orders[1].lines
        assert line.creditor == "instance 1"
        assert line.num_tokens >= 2300 - 1024
        assert not desk.has_loans(1)  # it has not heard of it
        links[0].answers[1].set_result(None)
        await asyncio.sleep(0)
        assert desk.has_loans(1)
        assert not desk.has_loans(0)

    asyncio.run(told())


def test_who_was_not_told_is_told_again() -> None:
    async def told() -> None:
        members, links = _members()
        desk = LendingDesk(members)
        desk.settle(members.snapshot(num_dispatched=0))
        links[1].answers[0].set_exception(EngineDied("gone"))
        await asyncio.sleep(0)
        desk.settle(members.snapshot(num_dispatched=0))
        assert [len(link.orders) for link in links] == [1, 2, 1]

    asyncio.run(told())


def test_who_cannot_be_reached_is_not_asked() -> None:
    async def told() -> None:
        members, links = _members()
        desk = LendingDesk(members)
        desk.settle(_with_a_long_one(members))
        assert links[0].orders[0].lines[0].creditor == "instance 1"
        members.of(0).lending = msgspec.structs.replace(
            REPORT, unreachable=("instance 1",), loans=(HeldLoan("instance 2", 512),)
        )
        desk.settle(_with_a_long_one(members))
        assert [line.creditor for line in links[0].orders[1].lines] == ["instance 2"]
        (one,) = desk.stats()
        assert (one.debtor, one.creditor, one.num_tokens, one.is_shunned) == (0, 2, 512, False)
        members.of(0).lending = REPORT
        desk.settle(_with_a_long_one(members))
        assert len(links[0].orders) == 2

    asyncio.run(told())


def test_who_was_lost_and_is_silent_is_not_asked_before_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that is stopped: it seems to take calls, and each costs a borrower its time limit."""
    now = [100.0]
    monkeypatch.setattr(lending, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def told() -> list[str]:
        members, links = _members()
        desk = LendingDesk(members)
        members.of(0).lending = msgspec.structs.replace(REPORT, unreachable=("instance 1",))
        desk.settle(_with_a_long_one(members))
        members.of(0).lending = REPORT
        asked = []
        for after_s, links[1].silent_s in ((0, 1.0), (6, 7.0), (50, 57.0), (0.1, 0.5)):
            now[0] += after_s
            desk.settle(_with_a_long_one(members))
            asked.append(links[0].orders[-1].lines[0].creditor)
        return asked

    assert asyncio.run(told()) == [*["instance 2"] * 3, "instance 1"]


def test_what_is_let_in_follows_who_lends() -> None:
    members, _ = _members()
    admission = LentAdmission.of(lambda: admission_of(members.now()))
    params = SamplingParams(max_tokens=10)
    assert admission.longest == 1024 + 2 * 1536
    assert admission.check([1] * 4000, params) == 10
    members.of(2).is_draining = True
    with pytest.raises(RequestTooLarge, match="2560"):
        admission.check([1] * 4000, params)
    assert admission.check([1] * 2500, params) == 10
    members.of(1).is_draining = True
    assert admission_of(members.now()).longest == 2000
    with pytest.raises(RequestTooLarge, match="nobody lends"):
        admission.check([1] * 2500, params)
    own = admission_of(members.now())
    went_on = replace(own, was_longer=own.max_len - 1)
    assert went_on.check([1] * 2500, params, was_let_in=True) == 10
