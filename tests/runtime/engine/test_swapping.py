"""Keys and values that leave for the tier behind and come back: the tokens are the same."""

import threading
from typing import Any

import moved
import pytest
import torch
import zoo
from transformers import PreTrainedModel
from vkv import LLM
from vkv.allocator.transfer import copier
from vkv.runtime.request.request import RequestState
from vkv.vmem.errors import InvalidConfig, InvalidOperation

_PAGE_BYTES = 4096  # 16 tokens of the tiny llama
_SWAP = 8 << 20


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return zoo.tiny_model("llama")


def _prompts() -> list[list[int]]:
    """Sixteen, of which some begin alike."""
    prompts = zoo.random_prompts([30, 5, 44, 18, 9, 27, 33, 61, 12, 40, 7, 22])
    return [*prompts, *([*prompts[7][:48], 3 + i] for i in range(4))]


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False], ids=["beside steps", "at once"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"policy": "prefill_first"}),
        ("llama", {"kv": "paged", "attention": "paged_sdpa", "block_tokens": 16}),
        ("llama", {"max_parked": 0}),
        ("llama", {"sanitize": "zero", "layers_per_range": 2, "split_kv": True}),
        ("llama", {"overlap": True}),
        ("mistral", {}),
        ("qwen3_next", {}),
    ],
    ids=["llama", "whole prompts", "paged", "none parked", "zeroed", "overlap", "window", "hybrid"],
)
def test_forced_moves_change_no_token(
    name: str, options: dict[str, Any], asynchronous: bool
) -> None:
    model = zoo.tiny_model(name)
    specs = moved.specs(_prompts())
    undisturbed = moved.run(model, specs, max_seqs=16)
    outcome = moved.run(
        model,
        specs,
        num_moves=60,
        max_seqs=16,
        swap_memory=_SWAP,
        asynchronous=asynchronous,
        **options,
    )
    assert outcome.num_forced >= 60
    assert outcome.swap is not None
    assert outcome.swap.fetched.num_moves >= 5
    assert outcome.tokens == undisturbed.tokens


def test_moves_under_pressure_change_no_token(llama: PreTrainedModel) -> None:
    """Memory for a few of sixteen, so that requests push each other out."""
    specs = moved.specs(_prompts(), max_tokens=40)
    undisturbed = moved.run(llama, specs, max_seqs=16)
    for asynchronous in (True, False):
        outcome = moved.run(
            llama,
            specs,
            max_seqs=16,
            kv_memory=24 * _PAGE_BYTES,
            swap_memory=_SWAP,
            asynchronous=asynchronous,
        )
        assert outcome.swap is not None
        assert outcome.swap.stored.num_moves >= 10
        assert outcome.swap.fetched.num_moves >= 3
        assert outcome.tokens == undisturbed.tokens


def test_a_tier_too_small_is_of_no_harm(llama: PreTrainedModel) -> None:
    specs = moved.specs(_prompts())
    undisturbed = moved.run(llama, specs, max_seqs=16)
    outcome = moved.run(llama, specs, num_moves=40, max_seqs=16, swap_memory=6 * _PAGE_BYTES)
    assert outcome.swap is not None
    assert outcome.swap.stored.num_failed > 0
    assert outcome.tokens == undisturbed.tokens


@pytest.mark.parametrize("where", ["stored", "fetched"])
def test_failing_copies_change_no_token(
    llama: PreTrainedModel, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = copier._copy, iter(range(10**9))

    def flaky(*args: Any) -> None:
        if next(calls) % 3 == 2:
            raise InvalidOperation("a copy that fails")
        copy(*args)

    monkeypatch.setattr(copier, "_copy", flaky)
    specs = moved.specs(_prompts())
    undisturbed = moved.run(llama, specs, max_seqs=16)
    outcome = moved.run(llama, specs, num_moves=60, max_seqs=16, swap_memory=_SWAP)
    assert outcome.swap is not None
    assert getattr(outcome.swap, where).num_failed > 0
    assert outcome.tokens == undisturbed.tokens


# -- what is copied ------------------------------------------------------------------------------


def test_a_second_turn_copies_its_increment(llama: PreTrainedModel) -> None:
    (prompt,) = zoo.random_prompts([60])
    with LLM(llama, device="cpu", **zoo.with_defaults({"swap_memory": _SWAP})) as llm:
        swapping = llm.engine.scheduler.tiers.swapping
        assert swapping is not None
        swapping.always = True
        (first,) = llm.generate([prompt], zoo.greedy(20))
        swapping.wait()
        llm.engine.cache.trim()
        before = llm.stats().swap
        answer = first.outputs[0].token_ids
        (second,) = llm.generate([[*prompt, *answer, 5, 6, 7]], zoo.greedy(20))
        swapping.wait()
        after = llm.loop.stats(fresh=True).swap
        assert before is not None
        assert after is not None
        # The last token of an answer is not computed.
        assert after.fetched.num_tokens == second.num_cached_tokens == 60 + 20 - 1
        assert after.fetched.num_copies == llm.engine.cache.geometry.num_ranges
        assert after.stored.num_tokens - before.stored.num_tokens == 1 + 3 + 20 - 1
        token_bytes = llm.engine.cache.geometry.token_format.token_bytes
        assert after.stored.num_bytes == after.stored.num_tokens * token_bytes


def test_what_is_faster_computed_is_computed(llama: PreTrainedModel) -> None:
    (prompt,) = zoo.random_prompts([60])
    with LLM(llama, device="cpu", **zoo.with_defaults({"swap_memory": _SWAP})) as llm:
        swapping = llm.engine.scheduler.tiers.swapping
        assert swapping is not None
        llm.generate([prompt], zoo.greedy(20))
        swapping.wait()
        llm.engine.cache.trim()
        swapping.computing.add(1e12, 1.0)
        llm.generate([prompt], zoo.greedy(20))
        swap = llm.stats().swap
        assert swap is not None
        assert (swap.fetched.num_moves, swap.num_computed_instead) == (0, 1)


# -- lives that end early ------------------------------------------------------------------------


def test_requests_may_end_while_they_move(llama: PreTrainedModel) -> None:
    """Aborted before, during and after the copy, there and back; nothing stays pinned."""
    options = zoo.with_defaults({"swap_memory": _SWAP, "max_seqs": 4})
    with LLM(llama, device="cpu", **options) as llm:
        engine, swapping = llm.engine, llm.engine.scheduler.tiers.swapping
        assert swapping is not None
        swapping.always = True
        for wait, num_steps in ((False, 0), (True, 0), (True, 1), (True, 2), (False, 2)):
            for spec in moved.specs(_prompts()[:6]):
                engine.add(spec)
            for _ in range(6):
                engine.step()
            for request in list(engine.scheduler.running):
                engine.scheduler.preempt(request)
            if wait:
                while swapping.is_leaving:
                    swapping.wait()
                engine.cache.trim()
            for _ in range(num_steps):
                engine.step()
            for request in engine.requests:
                if request.state is not RequestState.FINISHED:
                    engine.abort(request.key[0])
            while swapping.is_leaving:
                swapping.wait()
            engine.cache.check_invariants()
            stats = engine.cache.stats()
            assert stats.slots_open == 0
            assert not any(slot.num_pins for slot in engine.cache._table.parked)
            assert not any(slot.num_pins for slot in swapping.tier.far._table.parked)


def test_sleep_and_a_changed_model_leave_nothing_behind(llama: PreTrainedModel) -> None:
    model = zoo.tiny_model("llama")
    (prompt,) = zoo.random_prompts([60])
    with LLM(model, device="cpu", **zoo.with_defaults({"swap_memory": _SWAP})) as llm:
        swapping = llm.engine.scheduler.tiers.swapping
        assert swapping is not None
        swapping.always = True
        llm.generate([prompt], zoo.greedy(4))
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        llm.weights_changed()
        assert swapping.tier.longest_prefix(prompt) == 0
        changed = llm.generate([prompt], zoo.greedy(4))[0].outputs[0].token_ids
        reference = zoo.tiny_model("llama", attention="sdpa")
        with torch.no_grad():
            reference.get_input_embeddings().weight.mul_(1.5)
        assert list(changed) == zoo.generate_alone(reference, prompt, 4)
        llm.sleep()
        assert swapping.tier.far.stats().physical_bytes == 0
        llm.wake()
        assert llm.generate([prompt], zoo.greedy(4))[0].outputs[0].token_ids == changed


def test_what_another_engine_reads_of_the_tier_goes_with_the_model(llama: PreTrainedModel) -> None:
    """A request waits, and its tokens in the tier are pinned, to be read by another engine."""
    with LLM(llama, device="cpu", **zoo.with_defaults({"swap_memory": _SWAP})) as llm:
        engine, departures = llm.engine, llm._driver._loop.departures
        swapping = engine.scheduler.tiers.swapping
        assert swapping is not None
        swapping.always = True
        (request,) = engine.add(moved.specs(zoo.random_prompts([60]))[0])
        for _ in range(2):
            engine.step()
        engine.scheduler.preempt(request)
        while swapping.is_leaving:
            swapping.wait()
        engine.cache.trim()
        departure = departures.begin(request.key, 1)
        assert departure.outgoing is not None
        assert departure.outgoing.cache is swapping.tier.far
        llm.weights_changed()
        assert swapping.tier.longest_prefix(request.token_ids, request.variant) == 0
        assert swapping.tier.far.stats().physical_bytes == 0
        engine.abort(request.key[0])


def test_bad_amounts_are_refused(llama: PreTrainedModel) -> None:
    for value, why in (("3 potatoes", "not an amount"), (100, "holds not even 16 tokens")):
        with pytest.raises(InvalidConfig, match=why):
            LLM(llama, device="cpu", **zoo.with_defaults({"swap_memory": value}))


def test_the_thread_ends_with_the_engine(llama: PreTrainedModel) -> None:
    with LLM(llama, device="cpu", **zoo.with_defaults({"swap_memory": _SWAP})) as llm:
        llm.generate(_prompts()[:2], zoo.greedy(2))
        assert [t for t in threading.enumerate() if t.name == "vkv-swap"]
    assert not [t for t in threading.enumerate() if t.name == "vkv-swap"]
