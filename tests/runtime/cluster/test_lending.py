"""Requests longer than an instance's memory: others lend theirs, and the tokens are the same."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import left_over
import pytest
import zoo
from vkv import LLM, SamplingParams
from vkv.runtime.cluster.cluster import Cluster
from vkv.runtime.request.outputs import RequestOutput
from vkv.vmem.errors import RequestTooLarge

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")

_PAGE_BYTES = 8192  # 32 tokens of the tiny llama
_POOL = 65 * _PAGE_BYTES  # 2,080 tokens
_AT_HOME = 1024  # of a long request
_MAX_LEN = 9000
_OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_seqs": 6,
    "max_len": _MAX_LEN,
    "page_bytes": _PAGE_BYTES,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = zoo.tiny_model(
        "llama", eos_token_id=zoo.VOCAB_SIZE - 1, max_position_embeddings=_MAX_LEN
    )
    model.save_pretrained(folder)
    zoo.letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large(folder: Path) -> Iterator[LLM]:
    """Has room for all, and says what is right."""
    with LLM(folder, **_OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def four(folder: Path) -> Iterator[Cluster]:
    with Cluster(
        folder, instances=4, policy="round_robin", kv_memory=_POOL, threads=1, **_OPTIONS
    ) as cluster:
        yield cluster


def _tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _num_lent(cluster: Cluster) -> int:
    """Tokens that went to others, so far."""
    stats = [member.stats for member in cluster.stats().instances]
    return sum(s.segments.lent.num_tokens for s in stats if s is not None and s.segments)


def test_a_request_takes_the_memory_of_all_and_its_neighbours_go_on(
    four: Cluster, large: LLM
) -> None:
    prompts = zoo.random_prompts([5200, 40, 700, 9, 300])
    params = [zoo.greedy(24), *(zoo.greedy(60) for _ in prompts[1:])]
    assert _tokens(four.generate(prompts, params)) == _tokens(large.generate(prompts, params))
    assert _num_lent(four) >= 5200 - _AT_HOME - 512
    for member in four.stats().instances:
        assert member.stats is not None
        assert member.stats.kv.pages_limit * _PAGE_BYTES <= _POOL + _PAGE_BYTES


def test_two_long_ones_share_what_there_is(four: Cluster, large: LLM) -> None:
    prompts = zoo.random_prompts([2300, 2200], seed=3)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True)
    assert _tokens(four.generate(prompts, params)) == _tokens(large.generate(prompts, params))


def test_one_whose_length_nobody_gave_gets_what_it_lacks(four: Cluster, large: LLM) -> None:
    (prompt,) = zoo.random_prompts([1100], seed=31)
    (expected,) = _tokens(large.generate([prompt], zoo.greedy(5)))
    token_ids: list[int] = []
    for delta in four.stream(prompt, SamplingParams(temperature=0, ignore_eos=True)):
        token_ids += delta.token_ids
        if len(token_ids) >= 5:
            break
    assert token_ids[:5] == expected


def test_what_all_together_do_not_hold_is_refused(four: Cluster) -> None:
    (prompt,) = zoo.random_prompts([8000])
    with pytest.raises(RequestTooLarge, match="8000 prompt tokens"):
        four.generate([prompt], zoo.greedy(4))


def test_two_that_want_more_than_there_is_have_it_one_after_the_other(
    four: Cluster, large: LLM
) -> None:
    prompts = zoo.random_prompts([4600, 4500, 60], seed=11)
    params = zoo.greedy(16)
    assert _tokens(four.generate(prompts, params)) == _tokens(large.generate(prompts, params))
    assert four.stats().done.num_lost == 0


def test_a_lender_that_drains_has_its_loans_move_on(four: Cluster, large: LLM) -> None:
    four.scale(4)
    (prompt,) = zoo.random_prompts([2300], seed=21)
    params = zoo.greedy(300)
    outputs: list[RequestOutput] = []
    thread = threading.Thread(target=lambda: outputs.extend(four.generate([prompt], params)))
    before, longest = four.stats().done, four.face.admission.longest
    thread.start()
    while not (full := [one for one in four.stats().loans if one.num_tokens > _AT_HOME]):
        time.sleep(0.01)
    four.drain(full[0].creditor)  # has more than could come home
    assert four.face.admission.longest < longest
    with pytest.raises(RequestTooLarge, match="5000 prompt tokens"):
        four.generate(zoo.random_prompts([5000]), zoo.greedy(4))
    thread.join(120)
    assert _tokens(outputs) == _tokens(large.generate([prompt], params))
    after = four.stats().done
    assert after.moved_on_tokens > before.moved_on_tokens
    assert after.num_preemptions == before.num_preemptions
    four.scale(4)
    assert four.face.admission.longest == longest


def _owner_of_a_long_one(cluster: Cluster) -> int:
    """Which instance borrows, as soon as one does."""
    while True:
        for member in cluster.stats().instances:
            if member.long_requests:
                return member.id
        time.sleep(0.01)


def test_who_drains_has_its_long_request_computed_again_elsewhere(
    four: Cluster, large: LLM
) -> None:
    four.scale(4)
    (prompt,) = zoo.random_prompts([2300], seed=13)
    params = zoo.greedy(600)
    outputs: list[RequestOutput] = []
    thread = threading.Thread(target=lambda: outputs.extend(four.generate([prompt], params)))
    before = four.stats()
    thread.start()
    owner = _owner_of_a_long_one(four)
    four.drain(owner, timeout_s=60)
    assert thread.is_alive()  # the end was not waited for
    thread.join(120)
    after = four.stats()
    assert after.num_recomputed == before.num_recomputed + 1
    assert after.num_stayed - before.num_stayed <= 2  # nobody tries in vain again and again
    assert owner not in {member.id for member in after.instances}
    assert _tokens(outputs) == _tokens(large.generate([prompt], params))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_a_lender_that_dies_costs_computing_what_it_had(
    four: Cluster, large: LLM, how: signal.Signals
) -> None:
    four.scale(4)
    (prompt,) = zoo.random_prompts([2300], seed=9)
    params = zoo.greedy(400)
    outputs: list[RequestOutput] = []
    thread = threading.Thread(target=lambda: outputs.extend(four.generate([prompt], params)))
    before, done = _num_lent(four), four.stats().done
    thread.start()
    while _num_lent(four) == before:
        time.sleep(0.01)
    stats = four.stats()
    (owner,) = {owner for owner in stats.requests.values() if owner is not None}
    ids = sorted(member.id for member in stats.instances)
    asked_first = ids[(ids.index(owner) + 1) % len(ids)]  # which has what was lent
    pid = next(member.pid for member in stats.instances if member.id == asked_first)
    os.kill(pid, how)
    thread.join(55)  # sooner than the front end gives up one that is silent
    assert not thread.is_alive()
    if how is signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    assert _tokens(outputs) == _tokens(large.generate([prompt], params))
    left_over.until(lambda: four.stats().done.mended_tokens > done.mended_tokens, "nothing mended")
    now = four.stats().done
    assert now.mended_tokens - done.mended_tokens <= 2048 < len(prompt)
    assert (now.redone_tokens, now.num_preemptions) == (done.redone_tokens, done.num_preemptions)
