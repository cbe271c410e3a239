"""Engines in one process that lend each other memory, turn by turn, as they are told."""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import moved
import msgspec
import zoo
from transformers import PreTrainedModel
from vkv import LLM
from vkv.runtime.engine.engine import Engine
from vkv.runtime.engine.memory.segments import connect_creditor, segment_server
from vkv.runtime.model.segments import RemoteHolder, SegmentServer
from vkv.runtime.request.request import Request
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.scheduling.lending import Loans

PAGE_BYTES = 8192  # 32 tokens of the tiny llama
POOL = 65 * PAGE_BYTES  # 2,080 tokens: a long request has 1,024 of them in its slot
MAX_LEN = 8192
SHORTAGE_WAIT_S = 0.3


def model(**changes: Any) -> PreTrainedModel:
    """One as tiny as possible, with room for long requests."""
    return zoo.tiny_model("llama", max_position_embeddings=MAX_LEN, **changes)


def make(model: PreTrainedModel, **options: Any) -> LLM:
    """An engine with the options of all."""
    given = {"max_len": MAX_LEN, "page_bytes": PAGE_BYTES, "max_seqs": 8}
    options = {"shortage_wait_s": SHORTAGE_WAIT_S, **given, **options}
    return LLM(model, device="cpu", **zoo.with_defaults(options))


def specs_of(lengths: Sequence[int], *max_tokens: int) -> list[RequestSpec]:
    """Greedy ones of these lengths, with so many tokens; the last number is for the rest."""
    specs = moved.specs(zoo.random_prompts(lengths), mixed=False)
    most = [*max_tokens, *[max_tokens[-1]] * (len(lengths) - len(max_tokens))]
    return [
        msgspec.structs.replace(spec, params=replace(spec.params, max_tokens=count))
        for spec, count in zip(specs, most, strict=True)
    ]


class Lent:
    """The first engine borrows from the others, called "1", "2", …, as it is told."""

    def __init__(self, model: PreTrainedModel, count: int = 3, **options: Any) -> None:
        self.llms = [make(model, kv_memory=POOL, **options) for _ in range(count)]
        self.engines: list[Engine] = [llm.engine for llm in self.llms]
        self.servers: dict[str, SegmentServer] = {}
        self.holders: list[RemoteHolder] = []
        admission = self.engines[0].admission
        self.own_longest, most = admission.longest, MAX_LEN - 1
        self.engines[0].admission = replace(admission, longest=most, was_longer=most)
        for number, llm in enumerate(self.llms[1:], start=1):
            server = segment_server(llm.loaded, llm.engine)
            assert server is not None
            self.servers[str(number)] = server
            self.meet(str(number))

    def meet(self, name: str) -> None:
        """Connect the first engine to another one, for the first time or again."""
        theirs, ours = socket.socketpair()
        self.servers[name].serve(theirs)
        holder = RemoteHolder(name, ours, timeout_s=10)
        connect_creditor(self.engines[0], holder)
        self.holders.append(holder)

    @property
    def loans(self) -> Loans:
        segments = self.engines[0].scheduler.tiers.segments
        assert segments is not None
        return segments.loans

    def place(self, called: Sequence[str] = (), give_up: bool = False, **limits: int) -> None:
        """As a ledger does; `at_1` is the most at "1"."""
        named = {name.removeprefix("at_"): limit for name, limit in limits.items()}
        self.loans.place(named, called, has_lenders=True, has_to_give_up=give_up)

    def __enter__(self) -> "Lent":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self.check_nothing_left()
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

    def check_nothing_left(self) -> None:
        """Nothing is lent, and all that is held is parked."""
        until_s = time.monotonic() + 5
        while any(server.loans for server in self.servers.values()) and time.monotonic() < until_s:
            time.sleep(0.01)
        assert not any(server.loans for server in self.servers.values())
        assert not any(self.loans.num_lent(name) for name in self.servers)
        for engine in self.engines:
            if engine.scheduler.tiers.swapping is not None:
                engine.scheduler.tiers.swapping.tier.trim()  # which waits for copies
            engine.cache.check_invariants()
            assert engine.cache.stats().pages_held == 0


def expected_of(
    model: PreTrainedModel, specs: Sequence[RequestSpec], **options: Any
) -> list[list[int]]:
    """Tokens that one engine with room for all gives them."""
    with make(model, **options) as llm:
        requests = [llm.engine.add(spec)[0] for spec in specs]
        while llm.engine.has_work:
            llm.engine.step()
        return [request.output_token_ids for request in requests]


def tokens_of(requests: Sequence[Request]) -> list[list[int]]:
    """What they have generated."""
    return [request.output_token_ids for request in requests]
