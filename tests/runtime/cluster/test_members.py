"""Counts and maps of several engines, put together."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import lora
import msgspec
import pytest
import zoo
from vkv import LLM, SamplingParams
from vkv.allocator.transfer import MoveStats
from vkv.runtime.cluster.decisions import Decisions
from vkv.runtime.cluster.instances.instance_link import InstanceLink
from vkv.runtime.cluster.lending import longest_of
from vkv.runtime.cluster.members import Ending, Members, resident_name
from vkv.runtime.cluster.policies import CLUSTER_POLICIES, Disaggregated
from vkv.runtime.cluster.snapshot import InstanceSnapshot, Role
from vkv.runtime.cluster.stats import Member
from vkv.runtime.engine.admission import Admission
from vkv.runtime.engine.memory.lending import LendingReport
from vkv.runtime.engine.memory.memory_map import side_by_side
from vkv.runtime.engine.migration.arbiter import Arbiter
from vkv.runtime.engine.stats import SegmentStats, together
from vkv.runtime.link.face import Face
from vkv.runtime.link.messages import Pulse
from vkv.runtime.request.spec import RequestSpec


def test_several_engines_are_summed_and_shown_side_by_side() -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = {"device": "cpu", "max_seqs": 2, "swap_memory": "8MiB"}
    with LLM(**options) as one, LLM(**options) as other:
        one.generate(["hello", "there"], params, tenant="a")
        other.generate("hello", params, tenant=["a"])
        other.generate("hello", params, tenant="b")
        stats = [llm.loop.stats(fresh=True) for llm in (one, other)]
        both = together(stats)
        assert both.num_output_tokens == 16
        assert both.page_bytes == stats[0].page_bytes
        assert both.kv.pages_limit == sum(s.kv.pages_limit for s in stats)
        assert both.kv.driver_calls["map"] == sum(s.kv.driver_calls["map"] for s in stats)
        assert {t.tenant: t.output_tokens for t in both.tenants} == {"a": 12, "b": 4}
        assert both.swap is not None
        assert both.swap.limit_bytes == 2 * stats[0].swap.limit_bytes  # type: ignore[union-attr]
        assert together(stats[:1]) == stats[0]
        maps = [llm.loop.memory_map() for llm in (one, other)]
        shown = side_by_side(maps)
        assert shown.num_slots == 2 * maps[0].num_slots
        assert len(shown.strips) == sum(len(m.strips) for m in maps)
        slots = [strip.slot for strip in shown.strips]
        assert len(set(slots)) == len(slots)
        assert max(slots) >= maps[0].num_slots
        assert shown.totals.physical == sum(m.totals.physical for m in maps)
        assert shown.counters.output_tokens == 16


def _specs(count: int) -> list[RequestSpec]:
    """With one to three outputs each."""
    return [
        RequestSpec(
            request_id=f"r-{number}",
            prompt_token_ids=[1] * (1 + number % 7),
            params=SamplingParams(max_tokens=4, n=1 + number % 3),
            priority=number % 2,
        )
        for number in range(count)
    ]


def _plain(instances: tuple[InstanceSnapshot, ...]) -> list[InstanceSnapshot]:
    """Without how long it is that requests came."""
    return [
        msgspec.structs.replace(
            one, requests=tuple(msgspec.structs.replace(r, waited_s=0.0) for r in one.requests)
        )
        for one in instances
    ]


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "llumnix"])
def test_many_newcomers_are_given_out_as_if_all_was_drawn_anew_for_each(policy: str) -> None:
    arbiter = Arbiter()
    members = Members(arbiter)
    link: Any = _NoLink()
    for number in range(3):
        members.add(Member(id=number, role="both", pid=number), link)
    decisions = Decisions(CLUSTER_POLICIES[policy](), arbiter, members, max_moves=1)
    with LLM(device="cpu", max_seqs=2) as llm:
        face = Face.of(llm.loaded, llm.engine, llm.config)
    for number in range(3):
        members.meet(number, face)
    decisions.held += _specs(40)
    decisions.dispatch(lambda request_id: True)
    assert not decisions.held
    kept = decisions.picture().instances
    members.changed()
    assert _plain(decisions.picture().instances) == _plain(kept)
    assert sum(one.num_requests for one in kept) == sum(1 + n % 3 for n in range(40))


_FACE = Face(
    name="none",
    tokenizer=None,
    sampling_defaults={},
    admission=cast(Admission, None),
    dtype="float32",
    device="cpu",
    max_seqs=2,
    page_bytes=4096,
    token_bytes=64,
    capacity_tokens=1000,
)


class _NoLink:
    def close(self) -> None:
        """Nothing to hang up."""


def _admission(longest: int) -> Admission:
    return Admission(
        vocab_size=9,
        max_len=90_000,
        limit_pages=1,
        longest=longest,
        why_not_longer="",
        num_pages=lambda tokens: tokens,
    )


def _member(id: int, longest: int) -> Member:
    face = replace(_FACE, admission=_admission(longest))
    return Member(id=id, role="both", pid=0, face=face)


def test_what_several_hold_together() -> None:
    members = [_member(id, longest) for id, longest in enumerate((2080, 2080, 4100))]
    assert longest_of(members) == 4100  # nobody lends
    for member, longest in zip(members, (2080, 2080, 4100), strict=True):
        member.lending = LendingReport(
            longest_alone=longest, max_local_tokens=1024, max_lent_tokens=longest // 512 * 512 - 512
        )
    assert longest_of([members[0], members[2]]) == 1024 + 3584  # half of its own, others' room
    assert longest_of(members[:2]) == 1024 + 1536
    assert longest_of(members[:1]) == 2080
    assert longest_of([]) == 0


def test_what_is_not_all_in_its_instance_does_not_move() -> None:
    arbiter = Arbiter()
    members = Members(arbiter)
    members.add(Member(id=1, role="both", pid=0), cast(Any, _NoLink()))
    members.meet(1, _FACE)
    specs = _specs(2)
    for spec in specs:
        arbiter.add(spec, "1")
    long = specs[1].request_id, 1
    segments = SegmentStats(
        num_requests=1, num_tokens=9, moved=MoveStats(), lent=MoveStats(), keys=(long,)
    )
    with LLM(device="cpu", max_seqs=2) as llm:
        members.note(1, Pulse(replace(llm.loop.stats(), segments=segments)))
    pictures = {
        r.key: r for one in members.snapshot(num_dispatched=0).instances for r in one.requests
    }
    assert [key for key, one in pictures.items() if not one.is_migratable] == [long]


def test_who_takes_nothing_in_is_full_while_somebody_says_so() -> None:
    arbiter = Arbiter()
    members = Members(arbiter)
    report = LendingReport(longest_alone=2080, max_local_tokens=1024, max_lent_tokens=1536)
    for id in (1, 2):
        member = Member(id=id, role="both", pid=0)
        members.add(member, cast(Any, _NoLink()))
        members.meet(id, _FACE)
        member.lending = report
    full = members.of(2)
    members.of(1).lending = msgspec.structs.replace(report, refusing=(full.name,))

    def most_lent() -> list[int]:
        members.changed()
        return [one.max_lent_tokens for one in members.snapshot(num_dispatched=0).instances]

    assert most_lent() == [1536, 1536]  # who said so is idle since, and says nothing new
    arbiter.add(_specs(1)[0], "1")
    assert most_lent() == [1536, 0]
    assert full.lending == report


def test_who_did_both_while_others_were_missing_remembers_its_role() -> None:
    members = Members(Arbiter())
    roles: list[Role] = ["prefill", "decode"]
    for id, role in enumerate(roles):
        members.add(Member(id=id, role=role, pid=0), cast(InstanceLink, _NoLink()))
    for id in (0, 1):
        members.meet(id, _FACE)
    assert _switch(members) == {}
    members.remove(1, "died")
    assert _switch(members) == {0: "both"}
    assert _switch(members) == {}
    members.add(Member(id=2, role="decode", pid=0), cast(InstanceLink, _NoLink()))
    members.meet(2, _FACE)
    assert _switch(members) == {0: "prefill"}
    assert (members.of(0).home, members.switched_s) == (None, 1.0)


def test_instances_are_counted_by_why_they_ended() -> None:
    members = Members(Arbiter())
    for id, why in enumerate(get_args(Ending)):
        members.add(Member(id=id, role="both", pid=0), cast(InstanceLink, _NoLink()))
        members.remove(id, why)
        members.remove(id, why)  # twice is once
    _, done = members.report()
    assert (done.num_died, done.num_drained) == (1, 1)


def _switch(members: Members) -> dict[int, Role]:
    """Carry out what the policy says of roles."""
    changes = dict(Disaggregated().roles(members.snapshot(num_dispatched=0)))
    for id, role in changes.items():
        members.switch(id, role, 1.0)
    return changes


def test_requests_go_where_their_adapter_is_or_comes(tmp_path: Path) -> None:
    """The picture has what instances said, and what they were given since."""
    arbiter = Arbiter()
    members = Members(arbiter)
    for number in range(2):
        members.add(Member(id=number, role="both", pid=number), cast(InstanceLink, _NoLink()))
        members.meet(number, _FACE)
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        for name in "ab":
            folder = lora.save_adapter(tmp_path / name, zoo.tiny_model("llama"), seed=ord(name))
            llm.load_adapter(name, folder)
        before = llm.stats()
        llm.generate([[1, 2, 3]], zoo.greedy(2), adapter="b")
        after = llm.stats()
    a, b = (one.key for one in after.adapters)
    names = {key: resident_name(key) for key in (a, b)}
    members.note(0, Pulse(before))
    members.note(1, Pulse(after))
    first, second = members.snapshot(num_dispatched=0).instances
    assert (first.residents, second.residents) == (set(), {names[b]})
    costs = members.snapshot(num_dispatched=0).costs
    assert costs.tokens_per_s > 0
    assert costs.load_bytes_per_s > 0
    decisions = Decisions(CLUSTER_POLICIES["least_loaded"](), arbiter, members, max_moves=1)
    for number, adapter in enumerate([b, a, b, a]):
        params = SamplingParams(max_tokens=4)
        spec = RequestSpec(
            request_id=str(number), prompt_token_ids=[1], params=params, adapter=adapter
        )
        assert members.needs(spec) == {names[adapter]: before.adapters[0].num_bytes}
        decisions.held.append(spec)
    decisions.dispatch(lambda request_id: True)
    owners = {s.spec.request_id: s.owner for s in arbiter.unfinished}
    assert owners == {"0": "1", "1": "0", "2": "1", "3": "0"}
    members.changed()
    first, second = members.snapshot(num_dispatched=4).instances
    assert (first.residents, second.residents) == ({names[a]}, {names[b]})
