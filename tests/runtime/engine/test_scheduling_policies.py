"""Scheduling policies with a model: the same tokens whoever goes first, and who that is."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.runtime.engine.engine import Engine
from vkv.runtime.engine.messages import Abort, Add, SetPriority
from vkv.runtime.request.request import RequestState
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import InvalidConfig, InvalidSamplingParams

_POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "priority": {"scheduling_policy": "priority"},
    "strict": {"scheduling_policy": "priority", "priority_aging_s": None},
    "fair": {"scheduling_policy": "fair", "tenant_weights": {"b": 2.0}},
}
_NEVER: tuple[dict[str, Any], None] = ({"priority_aging_s": None}, None)
_TIGHT = {"kv_memory": 11 * 4096, "look_ahead_tokens": 0, "max_batch_tokens": 24, "max_seqs": 6}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


def _open(model: PreTrainedModel, **options: Any) -> LLM:
    return LLM(model, device="cpu", **zoo.with_defaults({"max_seqs": 4, **options}))


_PROMPTS = zoo.random_prompts([20, 31, 12, 25, 8, 17, 40, 3, 22, 15])
_PARAMS = [
    zoo.greedy(50)
    if number % 2
    else SamplingParams(
        temperature=0.8, top_k=20, seed=number, max_tokens=40, ignore_eos=True, n=1 + number % 4
    )
    for number in range(len(_PROMPTS))
]
_PRIORITIES = [number * 7 % 5 - 2 for number in range(len(_PROMPTS))]
_TENANTS = ["aab"[number % 3] for number in range(len(_PROMPTS))]


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel) -> list[list[tuple[int, ...]]]:
    with _open(model, max_seqs=1, prefix_reuse=False) as llm:
        outs = [llm.generate([p], q)[0] for p, q in zip(_PROMPTS, _PARAMS, strict=True)]
        return [[one.token_ids for one in out.outputs] for out in outs]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", ["splitfuse", "prefill_first"])
@pytest.mark.parametrize("name", _POLICIES)
def test_the_tokens_of_each_request_alone_whoever_loses_its_slot(
    model: PreTrainedModel, alone: list[Any], name: str, policy: str, overlap: bool
) -> None:
    options = {**_POLICIES[name], **_TIGHT, "policy": policy, "overlap": overlap}
    with _open(model, **options) as llm:
        priority = _PRIORITIES if "priority" in options.get("scheduling_policy", "") else 0
        for _ in range(2):
            outs = llm.generate(_PROMPTS, _PARAMS, priority=priority, tenant=_TENANTS)
            assert [[one.token_ids for one in out.outputs] for out in outs] == alone
            zoo.assert_idle(llm)
        assert llm.stats().num_preemptions
        llm.engine.cache.check_invariants()


def _specs(count: int, prompt: int, output: int, name: str, **more: Any) -> list[Add]:
    prompts = zoo.random_prompts([prompt] * count, seed=len(name))
    params = zoo.greedy(output)
    return [
        Add(RequestSpec(request_id=f"{name}{n}", prompt_token_ids=p, params=params, **more))
        for n, p in enumerate(prompts)
    ]


def _ends(llm: LLM, messages: Sequence[Any]) -> list[str]:
    """Names of requests in the order in which they ended."""
    outputs = llm.loop.turn(messages)
    while llm.loop.has_work:
        outputs += llm.loop.turn()
    return [out.request_id for out in outputs if out.finish_reason is not None]


@pytest.mark.parametrize(("name", "before"), [("fcfs", 20), ("fair", 4)])
def test_a_light_tenant_beside_a_heavy_one(model: PreTrainedModel, name: str, before: int) -> None:
    """By arrival it waits for all that came before it, and fairly for those that run."""
    with _open(model, **_POLICIES[name], max_seqs=2, prefix_reuse=False) as llm:
        heavy = _specs(20, 16, 8, "heavy", tenant="heavy")
        (light,) = _specs(1, 16, 8, "light", tenant="light")
        llm.loop.turn(heavy)
        ends = _ends(llm, [light])
        assert ends.index("light0") <= before
        assert (ends.index("light0") > 10) == (name == "fcfs")
        told = {tenant.tenant: tenant for tenant in llm.stats().tenants}
        assert (told["heavy"].prompt_tokens, told["heavy"].output_tokens) == (320, 160)
        assert (told["light"].prompt_tokens, told["light"].output_tokens) == (16, 8)
        assert told["light"].num_unfinished == 0


def test_options_reach_the_order(model: PreTrainedModel) -> None:
    for given, expected in (({}, 60.0), ({"priority_aging_s": 5}, 5), _NEVER):
        with _open(model, scheduling_policy="priority", **given) as llm:
            order: Any = llm.engine.scheduler.policy.order
            assert (order.name, order.aging_s) == ("priority", expected)
    with _open(model, **_POLICIES["fair"]) as llm:
        (request,) = zoo.add(llm.engine, "0", [1], zoo.greedy(1))
        assert llm.engine.scheduler.accounts.of(request).weight == 1.0
        spec = RequestSpec(request_id="1", prompt_token_ids=[1], params=zoo.greedy(1), tenant="b")
        (request,) = llm.engine.add(spec)
        assert llm.engine.scheduler.accounts.of(request).weight == 2.0
        while llm.engine.has_work:
            llm.engine.step()


def test_one_of_better_priority_takes_a_slot_in_a_running_engine(model: PreTrainedModel) -> None:
    with _open(model, **_POLICIES["priority"], max_seqs=2) as llm:
        llm.loop.turn(_specs(4, 16, 30, "low", priority=5))
        for _ in range(3):
            llm.loop.turn()
        ends = _ends(llm, _specs(1, 16, 4, "high", priority=-1))
        assert ends[0] == "high0"
        assert len(ends) == 5
        assert llm.stats().num_preemptions == 1


def test_a_priority_can_change_while_a_request_waits_and_while_it_runs(
    model: PreTrainedModel,
) -> None:
    with _open(model, **_POLICIES["priority"], max_seqs=1) as llm:
        llm.loop.turn(_specs(3, 16, 20, "a", priority=1))
        engine = llm.engine
        running, first, second = (engine._requests[f"a{n}"][0] for n in range(3))
        llm.loop.turn([SetPriority("a2", 0), SetPriority("nobody", 0)])
        assert second.state is RequestState.RUNNING
        assert running.state is RequestState.WAITING
        llm.loop.turn([SetPriority("a2", 9)])
        assert running.state is RequestState.RUNNING
        assert first.state is second.state is RequestState.WAITING
        assert _ends(llm, []) == ["a0", "a1", "a2"]


def test_all_outputs_of_a_prompt_have_its_new_priority(model: PreTrainedModel) -> None:
    with _open(model, **_POLICIES["priority"], max_seqs=1) as llm:
        params = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
        spec = RequestSpec(request_id="n", prompt_token_ids=[1] * 9, params=params, priority=5)
        ends = _ends(llm, [*_specs(2, 9, 4, "a", priority=1), Add(spec), SetPriority("n", 0)])
        assert ends == ["n", "n", "n", "a0", "a1"]


@pytest.mark.parametrize("name", _POLICIES)
def test_requests_may_be_dropped_in_any_line(model: PreTrainedModel, name: str) -> None:
    with _open(model, **_POLICIES[name], max_seqs=1) as llm:
        params = SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True)
        messages = _specs(3, 9, 4, "a", priority=1, tenant="x")
        messages += _specs(3, 9, 4, "b", priority=2, tenant="y")
        messages += [
            Add(RequestSpec(request_id=f"n{i}", prompt_token_ids=[i + 1] * 9, params=params))
            for i in range(2)
        ]
        llm.loop.turn(messages)
        dropped = [Abort(name) for name in ("a1", "b0", "b2", "n0")]
        ends = _ends(llm, dropped)
        assert sorted(ends) == ["a0", "a1", "a2", "b0", "b1", "b2", "n0", "n0", "n1", "n1"]
        assert ends[:5] == ["a1", "b0", "b2", "n0", "n0"]
        zoo.assert_idle(llm)
        assert all(tenant.num_unfinished == 0 for tenant in llm.stats().tenants)


def _finish(engine: Engine) -> Iterator[None]:
    while engine.has_work:
        engine.step()
        yield


@pytest.mark.parametrize("name", _POLICIES)
def test_several_outputs_share_their_prompt(model: PreTrainedModel, name: str) -> None:
    with _open(model, **_POLICIES[name], max_seqs=4) as llm:
        params = SamplingParams(n=4, seed=1, temperature=1.0, max_tokens=6, ignore_eos=True)
        requests = zoo.add(llm.engine, "0", list(range(1, 50)), params)
        for _ in _finish(llm.engine):
            pass
        assert [request.num_cached for request in requests] == [0, 48, 48, 48]
        (told,) = llm.stats().tenants
        assert (told.prompt_tokens, told.output_tokens) == (49 + 3, 24)  # what was found is free


# -- what callers say ----------------------------------------------------------------------------


def test_a_priority_that_nothing_goes_by_is_refused(model: PreTrainedModel) -> None:
    for name in ("fcfs", "fair"):
        with _open(model, **_POLICIES[name]) as llm:
            with pytest.raises(InvalidConfig, match=r"priority is 3.*scheduling_policy='priority'"):
                llm.generate([[1, 2]], zoo.greedy(2), priority=3)
            assert llm.generate([[1, 2]], zoo.greedy(2), priority=0, tenant="x")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"priority": [1]}, "1 priorities for 2 prompts"),
        ({"tenant": ["a", "b", "c"]}, "3 tenants for 2 prompts"),
        ({"priority": "high"}, "priority = 'high'.*an integer"),
        ({"priority": True}, "priority = True"),
        ({"priority": [1, 1.5]}, "priority = 1.5"),
        ({"priority": 1 << 60}, "an integer"),
        ({"tenant": 7}, "tenant = 7.*a text"),
        ({"tenant": "x" * 300}, "at most 256"),
        ({"tenant": "\ud800"}, "a text"),
    ],
)
def test_what_is_no_priority_or_tenant_is_refused(
    model: PreTrainedModel, how: dict[str, Any], words: str
) -> None:
    with _open(model, **_POLICIES["priority"]) as llm:
        with pytest.raises(InvalidSamplingParams, match=words):
            llm.generate([[1, 2], [3]], zoo.greedy(2), **how)
        assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduling_policy": "lottery"}, "use 'fcfs', 'priority' or 'fair'"),
        ({"priority_aging_s": 0}, "use None"),
        ({"priority_aging_s": -1.0}, "finite number"),
        ({"tenant_weights": {"a": 2.0}}, "use 'fair'"),
        ({"tenant_weights": {"a": 0.0}, "scheduling_policy": "fair"}, "above 0"),
        ({"tenant_weights": {"a": "2"}, "scheduling_policy": "fair"}, "'a': '2'"),
        ({"tenant_weights": [2.0], "scheduling_policy": "fair"}, "a dictionary"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        LLM(device="cpu", **options)


def test_streams_and_chats_say_them_too() -> None:
    with LLM(device="cpu", scheduling_policy="priority") as llm:
        text = "".join(map(str, llm.stream("hello", zoo.greedy(4), priority=1, tenant="s")))
        message = [{"role": "user", "content": "hello"}]
        out = llm.chat([message, message], zoo.greedy(4), priority=[2, 1], tenant="c")
        assert text
        assert all(one.outputs[0].text for one in out)
        told = {tenant.tenant: tenant.output_tokens for tenant in llm.stats().tenants}
        assert told == {"s": 4, "c": 8}
