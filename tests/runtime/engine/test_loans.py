"""Loans that are placed: they go where they may be, and come home; what is lent lets more run."""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import moved
import msgspec
import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM
from vkv.runtime.engine.engine import Engine
from vkv.runtime.engine.memory.segments import connect_creditor, segment_server
from vkv.runtime.model.segments import RemoteHolder, SegmentServer
from vkv.runtime.request.request import Request
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.scheduling.lending import Loans

_PAGE_BYTES = 8192  # 32 tokens of the tiny llama
_POOL = 65 * _PAGE_BYTES  # 2,080 tokens: a long request has 1,024 of them in its slot
_MAX_LEN = 8192


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return zoo.tiny_model("llama", max_position_embeddings=_MAX_LEN)


def _llm(model: PreTrainedModel, **options: Any) -> LLM:
    given = {"max_len": _MAX_LEN, "page_bytes": _PAGE_BYTES, "max_seqs": 8}
    options = {"shortage_wait_s": 0.3, **given, **options}
    return LLM(model, device="cpu", **zoo.with_defaults(options))


def _specs(lengths: Sequence[int], *max_tokens: int) -> list[RequestSpec]:
    """Of these lengths, with as many tokens each as is said; the last number is for the rest."""
    specs = moved.specs(zoo.random_prompts(lengths), mixed=False)
    most = [*max_tokens, *[max_tokens[-1]] * (len(lengths) - len(max_tokens))]
    return [
        msgspec.structs.replace(spec, params=replace(spec.params, max_tokens=count))
        for spec, count in zip(specs, most, strict=True)
    ]


class Lent:
    """The first engine borrows from the others, called "1", "2", …, as it is told."""

    def __init__(self, model: PreTrainedModel, count: int = 3) -> None:
        self.llms = [_llm(model, kv_memory=_POOL) for _ in range(count)]
        self.engines: list[Engine] = [llm.engine for llm in self.llms]
        self.servers: dict[str, SegmentServer] = {}
        self.holders: list[RemoteHolder] = []
        admission = self.engines[0].admission
        self.own_longest, most = admission.longest, _MAX_LEN - 1
        self.engines[0].admission = replace(admission, longest=most, was_longer=most)
        for number, llm in enumerate(self.llms[1:], start=1):
            server = segment_server(llm.loaded, llm.engine)
            assert server is not None
            theirs, ours = socket.socketpair()
            server.serve(theirs)
            holder = RemoteHolder(str(number), ours, timeout_s=10)
            connect_creditor(self.engines[0], holder)
            self.servers[holder.name] = server
            self.holders.append(holder)

    @property
    def loans(self) -> Loans:
        segments = self.engines[0].scheduler.tiers.segments
        assert segments is not None
        return segments.loans

    def place(self, called: Sequence[str] = (), give_up: bool = False, **limits: int) -> None:
        named = {name.removeprefix("at_"): limit for name, limit in limits.items()}
        self.loans.place(named, called, has_lenders=True, has_to_give_up=give_up)

    def __enter__(self) -> "Lent":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._check_nothing_left()
        finally:
            for holder in self.holders:
                holder.close()
            for server in self.servers.values():
                server.close()
            for llm in self.llms:
                llm.close()

    def drive(self, until: Callable[[], bool] = lambda: False) -> None:
        """Turn by turn, to the end or until something is so."""
        for _ in range(4000):
            if until() or not any(engine.has_work for engine in self.engines):
                break
            for engine in self.engines:
                engine.step()
        else:
            raise AssertionError("it goes on and on")
        failures = [o for e in self.engines for o in e.take_outputs() if o.failure is not None]
        assert not failures, failures

    def _check_nothing_left(self) -> None:
        until_s = time.monotonic() + 5
        while any(server.loans for server in self.servers.values()) and time.monotonic() < until_s:
            time.sleep(0.01)
        assert not any(server.loans for server in self.servers.values())
        assert not any(self.loans.num_lent(name) for name in self.servers)
        for engine in self.engines:
            engine.cache.check_invariants()
            assert engine.cache.stats().pages_held == 0


def _expected(model: PreTrainedModel, specs: Sequence[RequestSpec]) -> list[list[int]]:
    with _llm(model) as llm:
        requests = [llm.engine.add(spec)[0] for spec in specs]
        while llm.engine.has_work:
            llm.engine.step()
        return [request.output_token_ids for request in requests]


def _tokens(requests: Sequence[Request]) -> list[list[int]]:
    return [request.output_token_ids for request in requests]


# -- more requests at once -----------------------------------------------------------------------


def test_more_run_where_some_of_their_tokens_are_lent(llama: PreTrainedModel) -> None:
    specs = _specs([900, 700, 560, 600, 40], 30)
    expected = _expected(llama, specs)
    most: dict[bool, int] = {}
    for lends in (False, True):
        with Lent(llama) as lent:
            engine, running = lent.engines[0], set[int]()
            lent.place(at_1=1536 * lends, at_2=1536 * lends)
            requests = [engine.add(spec)[0] for spec in specs]
            lent.drive(lambda e=engine, r=running: bool(r.add(len(e.scheduler.running))))
            assert _tokens(requests) == expected
            most[lends] = max(running)
            assert engine.stats().num_preemptions == 0
            assert (lent.loans.lent.num_tokens > 0) == lends
    assert most[True] == len(specs) > most[False]


def test_nothing_is_lent_that_costs_more_than_it_brings(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteHolder, "answer_s", 1.0)  # and steps of a tiny model
    specs = _specs([900, 700, 600], 10)
    with Lent(llama, 2) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive()
        assert _tokens(requests) == _expected(llama, specs)
        assert not lent.loans.lent.num_tokens


def test_what_was_lent_comes_home_when_there_is_room(llama: PreTrainedModel) -> None:
    specs = _specs([600, 560, 1000], 60, 60, 4)
    expected = _expected(llama, specs)
    with Lent(llama, 2) as lent:
        engine = lent.engines[0]
        lent.place(at_1=1536)
        requests = [engine.add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[2].is_finished)
        assert lent.loans.num_lent("1")
        lent.place(at_1=0)
        lent.drive(lambda: lent.loans.num_lent("1") == 0)
        assert not any(request.is_spread for request in requests)
        assert not requests[0].is_finished
        assert lent.loans.came_home.num_tokens >= 512
        lent.drive()
        assert _tokens(requests) == expected
        assert engine.stats().num_preemptions == 0


# -- loans that are called -------------------------------------------------------------------


def test_a_loan_moves_on_to_another(llama: PreTrainedModel) -> None:
    specs = _specs([2300, 30], 40)
    expected = _expected(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        assert lent.loans.num_lent("1") >= 1024
        lent.place(["1"], at_1=512, at_2=1536)
        lent.drive(lambda: lent.loans.num_lent("1") <= 512)
        assert lent.loans.moved_on.num_tokens
        lent.place(["1"], at_1=0, at_2=1536)
        lent.drive()
        assert _tokens(requests) == expected
        assert lent.engines[0].stats().num_preemptions == 0
        assert lent.loans.num_called


def test_without_another_its_request_is_computed_again(llama: PreTrainedModel) -> None:
    specs = _specs([2300, 30], 40)
    expected = _expected(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        lent.place(["1"], at_1=0)
        lent.drive(lambda: lent.loans.num_lent("1") == 0)
        assert lent.engines[0].stats().num_preemptions == 1
        assert requests[0].slot is None  # it waits, and its neighbour goes on
        lent.drive(lambda: requests[1].is_finished)
        assert requests[0].slot is None
        lent.place(at_2=1536)
        lent.drive()
        assert _tokens(requests) == expected


def test_a_creditor_in_need_gives_time_to_move(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vkv.runtime.engine.memory.segments.NOTICE_S", 60.0)  # however slow this is
    specs = _specs([2300, 1900], 30)
    expected = _expected(llama, specs)
    with Lent(llama, 4) as lent:
        lent.place(at_1=1536, at_2=1536, at_3=1536)
        (long,) = lent.engines[0].add(specs[0])
        lent.drive(lambda: long.num_output_tokens > 3)
        (own,) = lent.engines[1].add(specs[1])
        lent.drive()
        assert _tokens([long, own]) == expected
        assert lent.engines[0].stats().num_preemptions == 0
        assert lent.engines[1].stats().num_preemptions == 0
        assert lent.loans.moved_on.num_tokens


# -- too little for all ------------------------------------------------------------------------


def test_two_that_want_more_than_there_is_run_one_after_the_other(llama: PreTrainedModel) -> None:
    specs = _specs([2900, 2900, 50], 150)
    expected = _expected(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1024, at_2=1024)
        engine = lent.engines[0]
        requests = [engine.add(spec)[0] for spec in specs]
        lent.drive()
        assert _tokens(requests) == expected


def test_those_that_outgrow_what_there_is_give_way(llama: PreTrainedModel) -> None:
    """Both begin, as there is room for their prompts; for what they generate there is not."""
    specs = _specs([1530, 1530, 50], 600)
    expected = _expected(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1024, at_2=512)
        engine = lent.engines[0]
        requests = [engine.add(spec)[0] for spec in specs]
        lent.drive()
        assert _tokens(requests) == expected
        assert engine.stats().num_preemptions


def test_one_that_has_to_gives_up(llama: PreTrainedModel) -> None:
    specs = _specs([2300, 30], 40)
    expected = _expected(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        lent.place(give_up=True)
        lent.drive(lambda: requests[1].is_finished)
        assert requests[0].slot is None
        lent.place(at_1=1536)
        lent.drive()
        assert _tokens(requests) == expected


def test_what_nobody_can_hold_any_more_says_so(llama: PreTrainedModel) -> None:
    specs = _specs([1500], 1500)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        loop = lent.llms[0].loop
        (request,) = lent.engines[0].add(specs[0])
        lent.drive(lambda: request.num_output_tokens > 3)
        lent.loans.place({}, ["1"], has_lenders=False)
        engine = lent.engines[0]
        engine.admission = replace(engine.admission, longest=lent.own_longest)
        outputs = []
        while engine.has_work:
            outputs += loop.turn()
        assert request.num_output_tokens > 500  # as far as its own memory goes
        (failure,) = [output.failure for output in outputs if output.failure is not None]
        assert "others have left" in str(failure.error())
