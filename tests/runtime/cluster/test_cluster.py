"""Instances in processes of their own: their requests are those of one engine, whatever happens."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from served import is_alive
from vkv import LLM, SamplingParams
from vkv.runtime.cluster.cluster import Cluster, ClusterStats
from vkv.runtime.cluster.policies import Llumnix, Scaling
from vkv.runtime.request.outputs import RequestOutput
from vkv.vmem.errors import EngineDied, InvalidConfig, InvalidOperation, UsageError

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")

_OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seqs": 8, "max_len": 1024}
_PROMPTS = [f"Tell me a story about the number {number}." for number in range(6)]
_LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)


def _mixed(max_tokens: int) -> list[SamplingParams]:
    """What has to travel: seeds, penalties, several outputs, log probabilities."""
    some: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 0.8, "seed": 3, "n": 2},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 1.0, "seed": 11, "frequency_penalty": 0.5, "min_tokens": 5},
    ]
    return [SamplingParams(max_tokens=max_tokens, ignore_eos=True, **one) for one in some]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Says what is right."""
    with LLM(**_OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    options = {**_OPTIONS, "threads": 1, "liveness_s": 5.0}
    with Cluster(instances=2, policy="round_robin", **options) as cluster:
        yield cluster


@pytest.fixture
def two(cluster: Cluster) -> Cluster:
    """With two instances, whatever became of those before."""
    cluster.scale(2)
    return cluster


def _tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


class _Running:
    """A call of `generate` on a thread."""

    def __init__(self, cluster: Cluster, params: Any = _LONG, prompts: Any = _PROMPTS) -> None:
        self.outputs: list[RequestOutput] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(cluster, prompts, params))
        self._thread.start()

    def _run(self, cluster: Cluster, prompts: Any, params: Any) -> None:
        try:
            self.outputs = cluster.generate(prompts, params)
        except BaseException as error:  # noqa: BLE001 - told to the test
            self.error = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> list[RequestOutput]:
        self._thread.join(120)
        assert self.is_over
        if self.error is not None:
            raise self.error
        return self.outputs


def _until(cluster: Cluster, is_so: Callable[[ClusterStats], bool]) -> ClusterStats:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        stats = cluster.stats()
        if is_so(stats):
            return stats
        time.sleep(0.005)
    raise AssertionError(f"it did not come to that: {cluster.stats()}")


def _is_generating(stats: ClusterStats) -> bool:
    """Every instance has sequences."""
    owners = set(stats.requests.values())
    return None not in owners and owners == {member.id for member in stats.instances}


def test_tokens_are_those_of_one_engine(two: Cluster, llm: LLM) -> None:
    params = _mixed(40)
    found, right = two.generate(_PROMPTS, params), llm.generate(_PROMPTS, params)
    assert _tokens(found) == _tokens(right)
    assert [o.outputs[0].text for o in found] == [o.outputs[0].text for o in right]
    assert not two.stats().requests


def test_streams_and_conversations_are_as_of_one_engine(two: Cluster, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    text = "".join(delta.text for delta in two.stream(_PROMPTS[0], params))
    assert text == llm.generate(_PROMPTS[0], params)[0].outputs[0].text
    messages = [{"role": "user", "content": "hello"}]
    assert _tokens(two.chat(messages, params)) == _tokens(llm.chat(messages, params))


def test_sequences_move_while_they_run_and_no_token_changes(two: Cluster, llm: LLM) -> None:
    params = _mixed(300)
    before = two.stats()
    running = _Running(two, params)
    num_moved = 0
    while not running.is_over and num_moved < 12:
        stats = two.stats()
        ids = [member.id for member in stats.instances]
        for (request_id, index), owner in stats.requests.items():
            if owner is None:
                continue
            other = next(instance for instance in ids if instance != owner)
            try:
                num_moved += two.migrate(request_id, other, index=index)
            except InvalidOperation:  # it has just ended
                continue
    assert _tokens(running.wait()) == _tokens(llm.generate(_PROMPTS, params))
    assert num_moved >= 6
    after = two.stats()
    assert after.num_migrations - before.num_migrations >= num_moved
    # Pages changed hands: nothing was copied but what others shared.
    assert after.num_pages_moved > before.num_pages_moved
    assert after.num_pages_moved >= sum(member.handed_pages for member in after.instances) > 0
    assert not after.moves


def test_a_killed_instance_costs_time_and_no_token(two: Cluster, llm: LLM) -> None:
    params, recomputed = _mixed(200), two.stats().num_recomputed
    running = _Running(two, params)
    stats = _until(two, _is_generating)
    os.kill(stats.instances[0].pid, signal.SIGKILL)
    began_s = time.monotonic()
    _until(two, lambda stats: len(stats.instances) == 1)
    assert time.monotonic() - began_s < 1.0
    assert _tokens(running.wait()) == _tokens(llm.generate(_PROMPTS, params))
    assert two.stats().num_recomputed > recomputed


def test_a_stopped_instance_is_killed_and_its_requests_go_on(two: Cluster, llm: LLM) -> None:
    running = _Running(two)
    stats = _until(two, _is_generating)
    stopped = stats.instances[1].pid
    os.kill(stopped, signal.SIGSTOP)
    assert _tokens(running.wait()) == _tokens(llm.generate(_PROMPTS, _LONG))
    assert [member.id for member in two.stats().instances] == [stats.instances[0].id]
    assert not is_alive(stopped)


def test_draining_moves_everything_and_computes_nothing_again(two: Cluster, llm: LLM) -> None:
    running = _Running(two)
    stats = _until(two, _is_generating)
    computed = stats.num_recomputed
    two.drain(stats.instances[0].id)
    after = two.stats()
    assert [member.id for member in after.instances] == [stats.instances[1].id]
    assert _tokens(running.wait()) == _tokens(llm.generate(_PROMPTS, _LONG))
    assert two.stats().num_recomputed == computed
    with pytest.raises(InvalidOperation, match="only one"):
        two.drain(after.instances[0].id)


def test_an_instance_that_is_told_to_end_hands_over_first(two: Cluster, llm: LLM) -> None:
    running = _Running(two)
    stats = _until(two, _is_generating)
    os.kill(stats.instances[0].pid, signal.SIGTERM)
    _until(two, lambda now: len(now.instances) == 1)
    assert _tokens(running.wait()) == _tokens(llm.generate(_PROMPTS, _LONG))
    after = two.stats()
    assert after.num_recomputed == stats.num_recomputed
    assert not is_alive(stats.instances[0].pid)
    # What it had done is counted still, what it handed over last included.
    assert after.num_pages_moved > stats.num_pages_moved
    assert after.done.num_drained == stats.done.num_drained + 1
    assert after.done.num_output_tokens > stats.done.num_output_tokens


def test_instances_come_and_go(two: Cluster, llm: LLM) -> None:
    two.scale(1)
    assert len(two.stats().instances) == 1
    running = _Running(two)
    two.scale(2)
    assert len(two.stats().instances) == 2
    assert _tokens(running.wait()) == _tokens(llm.generate(_PROMPTS, _LONG))


def test_what_nobody_waits_for_is_dropped(two: Cluster) -> None:
    stream = two.stream(_PROMPTS[0], _LONG)
    next(stream)
    assert len(two.stats().requests) == 1
    stream.close()
    _until(two, lambda stats: not stats.requests)
    _until(two, lambda s: all(m.stats and not m.stats.kv.tokens_held for m in s.instances))


def test_instances_are_as_urgent_as_their_front_end(two: Cluster) -> None:
    """Ray has its workers wait behind all others, which is not for engines."""
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, m.pid) for m in two.stats().instances} == {mine}


def test_bad_input_is_refused_before_anything_runs(two: Cluster) -> None:
    with pytest.raises(UsageError, match="5000 tokens"):
        two.generate({"prompt_token_ids": [1] * 5000})
    with pytest.raises(InvalidOperation, match="not unfinished"):
        two.migrate("nobody", two.stats().instances[0].id)
    with pytest.raises(InvalidOperation, match="there are"):
        two.migrate("nobody", 99)
    with pytest.raises(InvalidConfig, match="one at least"):
        two.scale(0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"instances": 0}, "one at least"),
        ({"roles": ["prefill"]}, "name one for each"),
        ({"roles": ["prefill", "prefill"]}, "nobody to decode"),
        ({"roles": ["prefill", "encode"]}, "use some of"),
        ({"policy": "luck"}, "use one of"),
        ({"policy": "llumnix", "roles": ["prefill", "decode"]}, "moves no computed prompt"),
        ({"max_sqs": 3}, "did you mean 'max_seqs'"),
        ({"model": object()}, "save it"),
        ({"threads": 0}, "one at least"),
        ({"liveness_s": 0}, "taken for dead"),
        ({"liveness_s": float("nan")}, "taken for dead"),
        ({"liveness_s": float("inf")}, "86400 s"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidConfig, match=why):
        Cluster(**options)


def test_a_model_that_does_not_load_says_so(cluster: Cluster) -> None:
    assert cluster  # Ray runs
    with pytest.raises(UsageError, match="nowhere"):
        Cluster("/nowhere/at/all", instances=1, **_OPTIONS)


def test_without_an_instance_requests_end_with_an_error(llm: LLM) -> None:
    with Cluster(instances=1, threads=1, **_OPTIONS) as lonely:
        running = _Running(lonely)
        stats = _until(lonely, _is_generating)
        os.kill(stats.instances[0].pid, signal.SIGKILL)
        outputs = running.wait()
        assert all(isinstance(output.error, EngineDied) for output in outputs)
        with pytest.raises(EngineDied):
            lonely.generate("hello")
    lonely.close()
    assert lonely.is_closed
    with pytest.raises(InvalidOperation, match="closed"):
        lonely.generate("hello")


def test_prefill_and_decode_apart_give_the_same_tokens(llm: LLM) -> None:
    """Every sequence is handed over once its prompt is computed, and none is computed twice."""
    roles: Any = ["prefill", "prefill", "decode"]
    params = _mixed(40)
    with Cluster(instances=3, roles=roles, threads=1, **_OPTIONS) as apart:
        assert _tokens(apart.generate(_PROMPTS, params)) == _tokens(llm.generate(_PROMPTS, params))
        stats = apart.stats()
        by_role = {role: [m for m in stats.instances if m.role == role] for role in roles}
        (decode,) = by_role["decode"]
        assert decode.stats is not None
        assert decode.stats.num_prompt_tokens < 40  # tails, at most, of what moved
        assert decode.stats.num_output_tokens > 150
        assert stats.num_migrations >= len(_PROMPTS)
        assert not stats.num_recomputed


def test_the_policy_has_more_instances_started(llm: LLM) -> None:
    scaling = Scaling(least=1, most=2, below=1e9, above=2e9, pause_s=0.0)
    policy = Llumnix(scaling=scaling)
    with Cluster(instances=1, policy=policy, threads=1, **_OPTIONS) as growing:
        running = _Running(growing)
        _until(growing, lambda stats: len(stats.instances) == 2)
        assert _tokens(running.wait()) == _tokens(llm.generate(_PROMPTS, _LONG))
        scaling.below, scaling.above = -2.0, -1.0
        _until(growing, lambda stats: len(stats.instances) == 1)


def test_instances_may_be_told_to_keep_less_memory(two: Cluster, llm: LLM) -> None:
    right = _tokens(llm.generate(_PROMPTS, _LONG))
    first, second = (member.id for member in two.router.members_now())
    two.limit_memory("2MiB", instance=first)
    try:
        assert _tokens(two.generate(_PROMPTS, _LONG)) == right
        two.limit_memory("1MiB")
        for picture in two.router.ask("memory_map"):
            assert picture.totals.physical <= 1 << 20  # what finished requests held went
        with pytest.raises(InvalidConfig, match="were made for"):
            two.limit_memory("1TiB", instance=second)
    finally:
        two.limit_memory(None)
