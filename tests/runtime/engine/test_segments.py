"""Requests longer than the pool: their first tokens lie in the tier, their tokens are the same."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import moved
import msgspec
import pytest
import segment_peer
import torch
import zoo
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.allocator import KVCache, Slot
from vkv.allocator.transfer import copier
from vkv.allocator.transfer.channels import wire
from vkv.attention_backends import PastBatch, choose_backend, partial_attention
from vkv.runtime.engine.devices import CudaProfile
from vkv.runtime.engine.engine import Engine
from vkv.runtime.engine.memory.segments import add_creditor, add_segments
from vkv.runtime.engine.stats import EngineStats
from vkv.runtime.model.segments import Answer, HolderLost, RemoteHolder, SegmentServer
from vkv.runtime.request.request import Request, RequestState
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import (
    InvalidOperation,
    OutOfPages,
    OutOfSlots,
    RequestTooLarge,
    RequestTooLong,
)

_PAGE_BYTES = 8192  # 32 tokens of the tiny llama
_POOL = 65 * _PAGE_BYTES  # 2,080 tokens: a long request has 1,024 of them in its slot
_TIER = 16 << 20
_LONGEST = 12288


def _model(name: str = "llama", **changes: Any) -> PreTrainedModel:
    return zoo.tiny_model(name, max_position_embeddings=_LONGEST, **changes)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return _model()


def _specs(lengths: Sequence[int], **options: Any) -> list[RequestSpec]:
    return moved.specs(zoo.random_prompts(lengths), **options)


def _options(**options: Any) -> dict[str, Any]:
    return {"max_len": _LONGEST, "page_bytes": _PAGE_BYTES, "max_seqs": 8, **options}


def _llm(model: PreTrainedModel, **options: Any) -> LLM:
    return LLM(model, device="cpu", **zoo.with_defaults(_options(**options)))


def _drive(engine: Engine, most_steps: int = 3000) -> None:
    """Step to the end, which must come."""
    for _ in range(most_steps):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work, engine.requests
    failures = [output for output in engine.take_outputs() if output.failure is not None]
    assert not failures, failures


def _check_nothing_left(engine: Engine) -> None:
    """All that is held is parked, in the cache and in the tier."""
    if engine.scheduler.tiers.swapping is not None:
        engine.scheduler.tiers.swapping.tier.trim()  # which waits for copies
    engine.cache.check_invariants()
    assert engine.cache.stats().pages_held == 0
    if engine.scheduler.tiers.swapping is not None:
        far = engine.scheduler.tiers.swapping.tier.far
        far.check_invariants()
        assert far.stats().pages_held == 0
        assert far.stats().physical_bytes == 0


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(500):
        if is_true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


Tokens = dict[tuple[str, int], list[int]]


def _run(
    model: PreTrainedModel, specs: Sequence[RequestSpec], **options: Any
) -> tuple[Tokens, EngineStats]:
    """Tokens of all requests, run together, and the engine's stats."""
    with _llm(model, **options) as llm:
        requests = [request for spec in specs for request in llm.engine.add(spec)]
        _drive(llm.engine)
        stats = llm.engine.stats()
        _check_nothing_left(llm.engine)
        return {r.key: r.output_token_ids for r in requests}, stats


def _compare(
    model: PreTrainedModel, specs: Sequence[RequestSpec], *, pool: int = _POOL, **options: Any
) -> EngineStats:
    """Run with a large pool and with a small one; the tokens are the same."""
    expected, _ = _run(model, specs, **options)
    tokens, stats = _run(model, specs, kv_memory=pool, swap_memory=_TIER, **options)
    assert tokens == expected
    assert stats.segments is not None
    assert stats.segments.moved.num_tokens > 0
    return stats


def test_what_is_in_the_tier_is_its_tenants(llama: PreTrainedModel) -> None:
    """Of one that begins there, and of one that grows into it."""
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        engine = llm.engine
        for spec in _specs([2300, 1020], max_tokens=2000, mixed=False):
            spec = msgspec.structs.replace(spec, tenant="ann", variant="salt")
            (request,) = engine.add(spec)
            while request.segment is None or not request.segment.num_tokens:
                engine.step()
            assert request.segment.slot.owner == spec.owner == ("ann", "salt")
            engine.abort(spec.request_id)


# -- tokens ----------------------------------------------------------------------------------


def test_four_times_the_pool_and_its_neighbours(llama: PreTrainedModel) -> None:
    stats = _compare(llama, _specs([8400, 30, 700, 5, 260], max_tokens=40))
    assert stats.segments is not None
    assert stats.segments.moved.num_tokens >= 8400 - 1024 - 512
    assert stats.kv.pages_limit * stats.page_bytes == _POOL
    assert 4 * _POOL // (2 * _PAGE_BYTES) * 32 < 8400


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("mistral", {}, {}),
        ("mistral", {"sliding_window": 1500}, {}),
        ("gemma2", {}, {}),
        ("gpt_oss", {}, {}),
        ("deepseek_v3", {}, {}),
        ("llama", {}, {"attention": "sdpa"}),
        ("llama", {}, {"overlap": True}),
        ("llama", {}, {"policy": "prefill_first"}),
        ("llama", {}, {"layers_per_range": 1, "split_kv": True, "sanitize": "zero"}),
        ("llama", {}, {"prefix_reuse": False, "max_parked": 0}),
        ("llama", {}, {"movable": True}),
    ],
    ids=[
        *(
            "window",
            "wide window",
            "soft cap",
            "sinks",
            "unequal heads",
            "sdpa",
            "overlap",
            "whole prompts",
        ),
        *("zeroed", "no reuse", "movable"),
    ],
)
def test_kinds_of_models_and_engines(
    name: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    pool = 5 * _POOL if name == "deepseek_v3" else _POOL  # its tokens are larger
    _compare(_model(name, **changes), _specs([2900, 40, 700], max_tokens=12), pool=pool, **options)


def test_bfloat16_to_the_bit_too() -> None:
    model = _model(hidden_size=64, head_dim=16, dtype=torch.bfloat16)
    _compare(model, _specs([2600, 40], max_tokens=20), repeatable=True, pool=_POOL)


def test_a_short_prompt_whose_output_outgrows_the_pool(llama: PreTrainedModel) -> None:
    specs = _specs([1900, 50], max_tokens=300, mixed=False)
    _compare(llama, specs)


@pytest.mark.parametrize("asynchronous", [True, False], ids=["beside steps", "at once"])
def test_slots_taken_away_at_random_steps(llama: PreTrainedModel, asynchronous: bool) -> None:
    specs = _specs([2500, 2700, 900, 1900, 40], max_tokens=12)
    options = {"max_len": _LONGEST, "page_bytes": _PAGE_BYTES, "max_seqs": 8}
    expected = moved.run(llama, specs, **options).tokens
    outcome = moved.run(
        llama,
        specs,
        num_moves=20,
        asynchronous=asynchronous,
        kv_memory=2 * _POOL,
        swap_memory=_TIER,
        **options,
    )
    assert outcome.num_forced >= 20
    assert outcome.tokens == expected


def test_a_tier_for_one_of_two(llama: PreTrainedModel) -> None:
    """The second waits until the first has ended, or is computed again."""
    specs = _specs([3000, 3300, 20], max_tokens=30)
    expected, _ = _run(llama, specs)
    tokens, _ = _run(llama, specs, kv_memory=_POOL, swap_memory=110 * _PAGE_BYTES)
    assert tokens == expected


def test_what_the_tier_holds_for_others_gives_way(llama: PreTrainedModel) -> None:
    """Copies of requests that wait are pinned there; a long one that runs needs the memory."""
    specs = _specs([3000, 900, 900], max_tokens=30, mixed=False)
    expected, _ = _run(llama, specs)
    with _llm(llama, kv_memory=_POOL, swap_memory=100 * _PAGE_BYTES) as llm:
        others = [llm.engine.add(spec)[0] for spec in specs[1:]]
        while any(request.num_output_tokens < 3 for request in others):
            llm.engine.step()
        llm.engine.scheduler.tiers.swapping.always = True
        (long,) = llm.engine.add(specs[0])
        for request in others:
            llm.engine.scheduler.preempt(request)
        llm.engine.scheduler.waiting.remove(long)
        llm.engine.scheduler.waiting.add_first(long)
        tier = llm.engine.scheduler.tiers.swapping.tier
        wait_until(lambda: not tier.wait() and not tier.is_storing)
        _drive(llm.engine)
        assert [r.output_token_ids for r in (long, *others)] == list(expected.values())


def test_prompt_logprobs_of_a_long_prompt(llama: PreTrainedModel) -> None:
    (prompt,) = zoo.random_prompts([2500])
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1, ignore_eos=True)
    scores = []
    for options in ({}, {"kv_memory": _POOL, "swap_memory": _TIER}):
        with _llm(llama, **options) as llm:
            (output,) = llm.generate([prompt], params)
            assert output.prompt_logprobs is not None
            scores.append([next(iter(e.values())).logprob for e in output.prompt_logprobs[1:]])
    assert scores[0] == scores[1]


# -- what is found again -----------------------------------------------------------------------


def test_the_next_turn_begins_with_what_the_tier_has(llama: PreTrainedModel) -> None:
    (prompt,) = zoo.random_prompts([3000])
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with _llm(llama) as llm:
        (first,) = llm.generate([prompt], params)
        longer = [*prompt, *first.outputs[0].token_ids, 5, 6, 7]
        (expected,) = llm.generate([longer], params)
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        assert llm.generate([prompt], params)[0].outputs[0].token_ids == first.outputs[0].token_ids
        (output,) = llm.generate([longer], params)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.num_cached_tokens == 2560  # whole parts of 512
        other = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        salted = llm.generate([{"prompt_token_ids": longer, "cache_salt": "other"}], other)
        assert salted[0].num_cached_tokens == 0


def test_a_file_is_attended_where_it_is(llama: PreTrainedModel, tmp_path: Path) -> None:
    """A prompt that begins with a session: its file's pages are mapped, and take no memory."""
    (prompt,) = zoo.random_prompts([4200])
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with _llm(llama) as llm:
        llm.save_session(tmp_path / "one.kv", prompt[:4000])
        (expected,) = llm.generate([prompt], params)
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        llm.open_session(tmp_path / "one.kv")
        output = llm.generate([prompt], params)[0]
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.num_cached_tokens == 3584
        far = llm.engine.scheduler.tiers.swapping.tier.far.stats()
        assert far.pages_of_files == 3584 // 32
        assert far.physical_bytes < 2 * 1024 * 256 + 4 * _PAGE_BYTES


# -- ends, changes and faults ------------------------------------------------------------------


def _long_one(engine: Engine, **options: Any) -> Request:
    """One that has a segment, and goes on."""
    (request,) = engine.add(_specs([2500], max_tokens=24, **options)[0])
    while request.num_output_tokens < 3:
        engine.step()
    assert request.segment is not None
    return request


def test_an_aborted_one_leaves_nothing(llama: PreTrainedModel) -> None:
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        request = _long_one(llm.engine)
        stats = llm.engine.stats().segments
        assert stats is not None
        assert (stats.num_requests, stats.num_tokens) == (1, request.slot_start)
        llm.engine.abort(request.key[0])
        assert request.segment is None
        _check_nothing_left(llm.engine)


def test_a_model_that_changes_has_it_computed_again(llama: PreTrainedModel) -> None:
    expected, _ = _run(llama, _specs([2500], max_tokens=24))
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        request = _long_one(llm.engine)
        llm.engine.weights_changed()
        assert request.state is RequestState.WAITING
        assert request.segment is None
        _drive(llm.engine)
        assert request.output_token_ids == expected[request.key]
        _check_nothing_left(llm.engine)


def test_one_that_lost_its_slot_goes_on_from_the_tier(llama: PreTrainedModel) -> None:
    expected, _ = _run(llama, _specs([2500], max_tokens=24))
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        request = _long_one(llm.engine)
        llm.engine.scheduler.preempt(request)
        llm.engine.step()
        assert request.slot_start == 2048  # so many were not computed again
        _drive(llm.engine)
        assert request.output_token_ids == expected[request.key]


@pytest.mark.parametrize("what", ["copies", "the tier's memory", "slots"])
def test_failures_cost_no_token_and_no_page(
    llama: PreTrainedModel, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = _specs([2500, 40, 2100], max_tokens=30)
    expected, _ = _run(llama, specs)
    draw = random.Random(3)

    def fails(name: str) -> bool:
        return what == name and draw.random() < 0.5

    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        far = llm.engine.scheduler.tiers.swapping.tier.far
        copy, grow, open_slot = copier._copy, KVCache.grow, KVCache.open

        def flaky_copy(*args: Any) -> None:
            if fails("copies"):
                raise InvalidOperation("a copy that fails")
            copy(*args)

        def flaky_grow(cache: KVCache, slot: Any, num_tokens: int) -> None:
            if cache is far and fails("the tier's memory"):
                raise OutOfPages("none for now")
            grow(cache, slot, num_tokens)

        def flaky_open(cache: KVCache, *args: Any) -> Any:
            if fails("slots"):
                raise OutOfSlots("none for now")
            return open_slot(cache, *args)

        monkeypatch.setattr(copier, "_copy", flaky_copy)
        monkeypatch.setattr(KVCache, "grow", flaky_grow)
        monkeypatch.setattr(KVCache, "open", flaky_open)
        requests = [request for spec in specs for request in llm.engine.add(spec)]
        _drive(llm.engine)
        assert {r.key: r.output_token_ids for r in requests} == expected
        _check_nothing_left(llm.engine)


class FarHolder:
    """The tier as another process would have it: asked over a socket, which breaks now and then."""

    def __init__(self, llm: LLM, *, breaks_after: Sequence[int] = ()) -> None:
        self._llm = llm
        self._breaks = list(breaks_after)  # asks of each connection
        self._num_asked = 0
        self._server: SegmentServer | None = None
        self._holder: RemoteHolder | None = None
        self._loans: dict[tuple[int, int], int] = {}
        self.num_lost = 0
        self.sent_bytes = self.received_bytes = 0

    def attend(self, layer, query, batch, wanted, results) -> Answer:
        if self._server is None:
            self._connect()
        assert self._server is not None
        assert self._holder is not None
        if self._breaks and self._num_asked == self._breaks[0]:
            self._server.close()
        self._num_asked += 1
        if layer == 0:
            self._asked = replace(batch, slots=tuple(self._loan(s) for s in self._slots(batch)))
        try:
            return self._holder.attend(layer, query, self._asked, wanted, results)
        except HolderLost:
            self._disconnect()
            raise

    def _slots(self, batch: PastBatch) -> list[tuple[Slot, int]]:
        segments = [r.segment for r in self._llm.engine.scheduler.running if r.segment is not None]
        by_index = {segment.slot.index: segment.slot for segment in segments}
        return [(by_index[i], n) for i, n in zip(batch.slots, batch.key_stops, strict=True)]

    def _loan(self, lent: tuple[Slot, int]) -> int:
        slot, num_tokens = lent
        assert self._server is not None
        key = slot.index, num_tokens
        if key not in self._loans:
            self._loans[key] = self._server.lend(slot, 0, num_tokens)
        return self._loans[key]

    def _connect(self) -> None:
        engine, loaded = self._llm.engine, self._llm.loaded
        partial = partial_attention(choose_backend(loaded.needs(paged=False)))
        far = engine.scheduler.tiers.swapping.tier.far
        self._server = SegmentServer(far, partial, loaded.attention, loaded.dtype)
        theirs, ours = socket.socketpair()
        self._server.serve(theirs)
        self._holder, self._num_asked, self._loans = RemoteHolder("tier", ours), 0, {}

    def _disconnect(self) -> None:
        assert self._server is not None
        self.num_lost += 1
        self._breaks.pop(0)
        self.close()

    def close(self) -> None:
        if self._server is not None and self._holder is not None:
            self.sent_bytes += self._holder.sent_bytes
            self.received_bytes += self._holder.received_bytes
            self._holder.close()
            self._server.close()
            self._server = None


@pytest.mark.parametrize("breaks", [(), (3, 31, 20)], ids=["whole", "breaks"])
def test_a_holder_over_a_socket_and_its_end(llama: PreTrainedModel, breaks: Sequence[int]) -> None:
    """What lay there is computed again, and nobody's token is another."""
    specs = _specs([2500, 40, 1900], max_tokens=20)
    expected, _ = _run(llama, specs)
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        holder = FarHolder(llm, breaks_after=breaks)
        assert llm.engine.runner.segmented is not None
        llm.engine.runner.segmented.holders["tier"] = holder
        requests = [request for spec in specs for request in llm.engine.add(spec)]
        _drive(llm.engine)
        holder.close()
        assert {r.key: r.output_token_ids for r in requests} == expected
        assert holder.num_lost == len(breaks) == llm.engine.stats().num_preemptions
        if not breaks:  # a query of 4 heads of 8 floats, a layer, and what comes of it
            assert 0 < holder.sent_bytes <= (2500 + 20 - 1024) * 2 * 4 * 8 * 4
            assert holder.received_bytes <= 4 * holder.sent_bytes
        _check_nothing_left(llm.engine)


# -- several engines ---------------------------------------------------------------------------


class Engines:
    """Engines of one model: the first borrows memory of the others, over sockets."""

    def __init__(self, model: PreTrainedModel, count: int, **options: Any) -> None:
        self.llms = [_llm(model, kv_memory=_POOL, **options) for _ in range(count)]
        self.servers: list[SegmentServer] = []
        self.holders: list[RemoteHolder] = []
        for index, llm in enumerate(self.llms[1:]):
            partial = partial_attention(choose_backend(llm.loaded.needs(paged=False)))
            cache, attention = llm.engine.cache, llm.loaded.attention
            server = SegmentServer(cache, partial, attention, llm.loaded.dtype)
            llm.engine.scheduler.tiers.guests.append(server)
            theirs, ours = socket.socketpair()
            server.serve(theirs)
            holder = RemoteHolder(f"engine {index}", ours)
            add_creditor(self.engines[0], holder, 2048)
            self.servers.append(server)
            self.holders.append(holder)

    @property
    def engines(self) -> list[Engine]:
        return [llm.engine for llm in self.llms]

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for holder in self.holders:
            holder.close()
        for server in self.servers:
            server.close()
        for llm in self.llms:
            llm.close()

    def drive(self, until: Callable[[], bool] = lambda: False) -> None:
        """Turn by turn, to the end or until something is so."""
        for _ in range(2000):
            if until() or not any(engine.has_work for engine in self.engines):
                break
            for engine in self.engines:
                engine.step()
        failures = [o for e in self.engines for o in e.take_outputs() if o.failure is not None]
        assert not failures, failures


def _expected(model: PreTrainedModel, specs: Sequence[RequestSpec]) -> list[list[int]]:
    tokens, _ = _run(model, specs)
    return list(tokens.values())


def test_four_pools_of_others_hold_what_four_times_ones_own_cannot(llama: PreTrainedModel) -> None:
    specs = _specs([8400, 30, 300, 200, 100, 60], max_tokens=20, mixed=False)
    expected = _expected(llama, specs)
    with Engines(llama, 5) as engines:
        owner = engines.engines[0]
        placed = [owner, owner, *engines.engines[1:]]
        requests = [e.add(spec)[0] for e, spec in zip(placed, specs, strict=True)]
        engines.drive()
        assert [r.output_token_ids for r in requests] == expected
        stats = owner.stats().segments
        assert stats is not None
        assert stats.lent.num_tokens >= 8400 - 1024 - 512
        lent_bytes = stats.lent.num_bytes
        asked = sum(h.sent_bytes for h in engines.holders)
        assert asked < lent_bytes * 4  # queries of all chunks; of a tiny model as large as keys
        wait_until(lambda: not any(server.loans for server in engines.servers))
        for engine in engines.engines:
            _check_nothing_left(engine)


def test_memory_that_is_called_back(llama: PreTrainedModel) -> None:
    """A creditor's own request comes first; what it had is computed again, for elsewhere."""
    specs = _specs([3500, 1900], max_tokens=20, mixed=False)
    expected = _expected(llama, specs)
    with Engines(llama, 4) as engines:
        (long,) = engines.engines[0].add(specs[0])
        engines.drive(until=lambda: long.num_output_tokens > 2)
        assert engines.servers[0].loans
        (other,) = engines.engines[1].add(specs[1])
        engines.drive(until=lambda: other.num_output_tokens > 2)
        assert not engines.servers[0].loans
        engines.drive()
        assert [long.output_token_ids, other.output_token_ids] == expected
        assert engines.engines[1].stats().num_preemptions == 0
        stats = engines.engines[0].stats()
        assert (stats.num_preemptions, stats.segments.redone_tokens) == (0, 0)
        assert 0 < stats.segments.mended_tokens <= 2048


def test_creditors_that_go_one_after_the_other(llama: PreTrainedModel) -> None:
    specs = _specs([2900, 40], max_tokens=30, mixed=False)
    expected = _expected(llama, specs)
    with Engines(llama, 4) as engines:
        owner = engines.engines[0]
        requests = [owner.add(spec)[0] for spec in specs]
        for server, num_output in zip(engines.servers[:2], (3, 9), strict=True):
            engines.drive(until=lambda n=num_output: requests[0].num_output_tokens > n)
            server.close()
        engines.drive()
        assert [r.output_token_ids for r in requests] == expected
        assert list(owner.scheduler.tiers.segments.loans.creditors) == ["engine 2"]
        assert requests[1].num_output_tokens == 30


# -- several processes -------------------------------------------------------------------------


class Peer:
    """An engine in another process, which runs a request of its own again and again."""

    def __init__(self, name: str) -> None:
        theirs, ours = socket.socketpair()
        told = {
            "options": _options(kv_memory=_POOL),
            "model": {"max_position_embeddings": _LONGEST},
            "descriptor": theirs.fileno(),
            "length": 300,
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, segment_peer.__file__, json.dumps(told)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.path.dirname(segment_peer.__file__)},
            )
        self.holder = RemoteHolder(name, ours, timeout_s=10)
        self._sock = ours

    def patience(self, timeout_s: float) -> None:
        """For how long its answers are waited for from now on."""
        wire.prepare(self._sock, timeout_s)

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def stop(self) -> dict[str, Any]:
        """Have it end in good order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.hear()

    def close(self) -> None:
        self.holder.close()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def _lend(llama: PreTrainedModel, peers: Sequence[Peer], how: signal.Signals | None) -> Peer | None:
    """One long request and a short one, while the peer that lends first gets a signal; that peer,
    if any does."""
    specs = _specs([2900, 40], max_tokens=30, mixed=False)
    dead = None
    with _llm(llama, kv_memory=_POOL) as llm:
        for peer in peers:
            add_creditor(llm.engine, peer.holder, 2048)
        requests = [llm.engine.add(spec)[0] for spec in specs]
        while requests[0].num_output_tokens < 4:
            llm.engine.step()
        if how is not None:
            (dead,) = (p for p in peers if p.holder.name == requests[0].lent[0].holder)
            dead.process.send_signal(how)
            dead.patience(0.5)
        _drive(llm.engine)
        assert [r.output_token_ids for r in requests] == _expected(llama, specs)
        stats = llm.engine.stats()
        assert stats.num_preemptions == 0
        assert (stats.segments.mended_tokens > 0) == (how is not None)
        _check_nothing_left(llm.engine)
    return dead


def test_engines_in_other_processes_lend_until_they_die(llama: PreTrainedModel) -> None:
    """None of four does; then one of them is killed, and of the other three one is stopped."""
    (own,) = _expected(llama, _specs([300], max_tokens=8, mixed=False))
    peers = [Peer(f"process {i}") for i in range(4)]
    living = list(peers)
    try:
        assert all(peer.hear()["ready"] for peer in peers)
        for how in (None, signal.SIGKILL, signal.SIGSTOP):
            dead = _lend(llama, living, how)
            living = [peer for peer in living if peer is not dead]
        for peer in living:
            peer.holder.close()
            assert peer.stop()["tokens"] == own
    finally:
        for peer in peers:
            peer.close()


# -- refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_longer_than_the_pool_says_why(llama: PreTrainedModel) -> None:
    (prompt,) = zoo.random_prompts([5000])
    params = SamplingParams(temperature=0, max_tokens=4)
    cases: list[tuple[PreTrainedModel, dict[str, Any], str]] = [
        (llama, {"kv_memory": _POOL}, "without swap_memory"),
        (llama, {"kv_memory": _POOL // 2, "swap_memory": _TIER}, "must hold 2048 tokens"),
        (
            llama,
            {"kv": "paged", "attention": "paged_sdpa", "kv_memory": _POOL, "swap_memory": _TIER},
            "paged baseline",
        ),
        (
            _model("qwen3_next"),
            {"kv_memory": _POOL, "swap_memory": _TIER},
            "recurrent or convolution state",
        ),
    ]
    for model, options, reason in cases:
        with _llm(model, **options) as llm, pytest.raises(RequestTooLarge, match=reason):
            llm.generate([prompt], params)


def test_a_gpu_is_refused_until_it_is_proven(llama: PreTrainedModel) -> None:
    assert not CudaProfile.shares_attention
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        runner, tiers = llm.engine.runner, llm.engine.scheduler.tiers
        parts = llm.loaded, runner.backend, runner.cache, runner, tiers
        reason = add_segments(*parts, shares_attention=CudaProfile.shares_attention)
        assert reason is not None
        assert "not proven" in reason


def test_what_neither_holds_is_refused(llama: PreTrainedModel) -> None:
    (prompt,) = zoo.random_prompts([5000])
    with _llm(llama, kv_memory=_POOL, swap_memory=100 * _PAGE_BYTES) as llm:
        with pytest.raises(RequestTooLarge, match=r"3200 that the tier.*swap_memory"):
            llm.generate([prompt], SamplingParams(max_tokens=4))
        with pytest.raises(RequestTooLong):
            llm.generate([[3] * _LONGEST], SamplingParams(max_tokens=4))


def test_it_neither_moves_to_another_engine_nor_is_saved(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    with _llm(llama, kv_memory=_POOL, swap_memory=_TIER) as llm:
        request = _long_one(llm.engine)
        with pytest.raises(InvalidOperation, match="longer than the pool"):
            llm.loop.departures.begin(request.key, 1)
        _drive(llm.engine)
        with pytest.raises(RequestTooLarge, match="a session is written"):
            llm.save_session(tmp_path / "long.kv", zoo.random_prompts([2500])[0])
