"""Outputs held to grammars, beside others that are not, through the front doors."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemas
import vocabularies
import zoo
from transformers import PreTrainedModel
from vkv import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams
from vkv.vmem.errors import InvalidOperation, InvalidSamplingParams

_VOCAB_SIZE = 520  # more than the tokenizer has
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "größe"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_KINDS: list[dict[str, Any]] = [
    {"json": _SCHEMA, "disable_any_whitespace": True},
    {"regex": "[a-z]{3}-[0-9]{1,5}"},
    {"choice": ["yes", "no", "maybe not"]},
    {"grammar": 'start: "<" word ("," word){0,4} ">"\nword: /[a-zé]{1,6}/'},
]
_PROMPTS = zoo.random_prompts([5, 40, 1, 17, 33, 9])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama", vocab_size=_VOCAB_SIZE, eos_token_id=[1, 2])


def _open(model: PreTrainedModel, **options: Any) -> LLM:
    tokenizer = vocabularies.byte_level()
    return LLM(model, tokenizer=tokenizer, device="cpu", **zoo.with_defaults(options))


@pytest.fixture(scope="module")
def llm(model: PreTrainedModel) -> Iterator[LLM]:
    with _open(model) as llm:
        yield llm


def _params(outputs: dict[str, Any], **options: Any) -> SamplingParams:
    options = {"max_tokens": 120, "seed": 7, **options}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**outputs), **options)


def _check(kind: dict[str, Any], text: str) -> None:
    if "json" in kind:
        jsonschema.validate(json.loads(text), kind["json"])
    elif "choice" in kind:
        assert text in kind["choice"]
    else:
        pattern = kind.get("regex", "<[a-zé]{1,6}(,[a-zé]{1,6}){0,4}>")
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: next(iter(kind)))
def test_each_kind_is_followed_to_its_end(
    llm: LLM, kind: dict[str, Any], temperature: float
) -> None:
    for out in llm.generate(_PROMPTS, _params(kind, temperature=temperature)):
        (output,) = out.outputs
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
        _check(kind, output.text)
    zoo.assert_idle(llm)


def test_random_schemas_in_one_batch(llm: LLM) -> None:
    import random

    every = [schemas.random_schema(random.Random(seed)) for seed in range(24)]
    params = [
        _params({"json": schema, "disable_any_whitespace": True}, seed=seed, max_tokens=200)
        for seed, schema in enumerate(every)
    ]
    outs = llm.generate([[3, seed] for seed in range(len(every))], params)
    whole = [out.outputs[0].finish_reason == "stop" for out in outs]
    assert sum(whole) > 8
    for schema, out, is_whole in zip(every, outs, whole, strict=True):
        assert out.error is None
        if is_whole:
            jsonschema.Draft202012Validator(schema).validate(json.loads(out.outputs[0].text))


def _tokens(outs: list[RequestOutput]) -> list[Any]:
    return [[(o.token_ids, o.text, o.finish_reason) for o in out.outputs] for out in outs]


def _mixed() -> list[SamplingParams]:
    """Some rows with grammars, of which some have bars, penalties and more; and plain ones."""
    return [
        _params(_KINDS[0], temperature=0.8, logprobs=2),
        SamplingParams(seed=1, max_tokens=40, ignore_eos=True),
        _params(_KINDS[1], n=2, presence_penalty=0.7),
        zoo.greedy(30),
        _params(_KINDS[3], bad_words=["a", "zé"], logit_bias={300: 2.0}, top_k=9),
        _params(_KINDS[2], temperature=0.0, ignore_eos=True, min_tokens=2),
    ]


def test_neighbours_are_not_touched(llm: LLM) -> None:
    together = _tokens(llm.generate(_PROMPTS, _mixed()))
    apart = [
        _tokens(llm.generate([prompt], params))[0]
        for prompt, params in zip(_PROMPTS, _mixed(), strict=True)
    ]
    assert together == apart


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True, "max_seqs": 4},
        {"max_batch_tokens": 8},
        {"policy": "prefill_first"},
        {"kv": "paged"},
        {"repeatable": True},
        {"prefix_reuse": False, "max_seqs": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_tokens_are_the_same_however_they_are_computed(
    llm: LLM, model: PreTrainedModel, options: dict[str, Any]
) -> None:
    expected = _tokens(llm.generate(_PROMPTS, _mixed()))
    with _open(model, **options) as other:
        found = _tokens(other.generate(_PROMPTS, _mixed()))
    assert found == expected


def test_a_preempted_sequence_keeps_its_place_in_the_grammar(
    llm: LLM, model: PreTrainedModel
) -> None:
    pattern = "([a-z]{3}-[0-9]{2};){12,14}"
    prompts = [[5, i] for i in range(6)]
    params = _params({"regex": pattern}, ignore_eos=True)
    expected = llm.generate(prompts, params)
    with _open(model, kv_memory=4096 * 10, max_seqs=6) as other:
        found = other.generate(prompts, params)
        assert other.stats().num_preemptions > 0
    assert _tokens(found) == _tokens(expected)
    for out in found:
        assert re.fullmatch(pattern, out.outputs[0].text)


def test_replayed_steps_are_masked_too(llm: LLM, model: PreTrainedModel) -> None:
    with _open(model, record_decodes=False) as other:
        expected = _tokens(other.generate(_PROMPTS, _mixed()))
    before = llm.stats().num_replays
    assert _tokens(llm.generate(_PROMPTS, _mixed())) == expected
    if llm.engine.runner.recordings is not None:  # there are no kernels to record else
        assert llm.stats().num_replays > before


def test_log_probabilities_are_of_the_raw_logits(llm: LLM) -> None:
    (out,) = llm.generate([[5, 6]], _params({"choice": ["yes"]}, logprobs=1, temperature=0))
    (first, *_), output = out.outputs[0].logprobs or (), out.outputs[0]
    own, best = list(first.values())[:2] if len(first) > 1 else [*first.values()] * 2
    assert own.logprob <= best.logprob < 0  # a mask would have left one token, of probability 1
    assert output.text == "yes"


def test_an_output_cut_short_says_so(llm: LLM) -> None:
    (out,) = llm.generate([[5]], _params({"regex": "[0-9]{50}"}, max_tokens=5))
    assert (out.outputs[0].finish_reason, len(out.outputs[0].token_ids)) == ("length", 5)


def test_a_whole_output_ends_whatever_else_is_asked(llm: LLM) -> None:
    for options in ({"ignore_eos": True}, {"min_tokens": 30}, {"stop": ["never there"]}):
        (out,) = llm.generate([[5]], _params({"choice": ["done"]}, **options))
        assert (out.outputs[0].text, out.outputs[0].finish_reason) == ("done", "stop")
    # Whole with its last token, of which no more are allowed.
    num_tokens = len(out.outputs[0].token_ids)
    (out,) = llm.generate([[5]], _params({"choice": ["done"]}, max_tokens=num_tokens))
    assert (out.outputs[0].text, out.outputs[0].finish_reason) == ("done", "stop")


def test_min_tokens_and_ignore_eos_put_the_end_off_while_there_is_more(llm: LLM) -> None:
    (out,) = llm.generate([[5]], _params({"regex": "a+"}, min_tokens=20, max_tokens=40))
    assert len(out.outputs[0].token_ids) >= 20
    (out,) = llm.generate([[5]], _params({"regex": "a+"}, ignore_eos=True, max_tokens=40))
    assert (out.outputs[0].finish_reason, len(out.outputs[0].token_ids)) == ("length", 40)


def test_stop_strings_and_tokens_end_an_output_before_it_is_whole(llm: LLM) -> None:
    (out,) = llm.generate([[5]], _params({"regex": "ab{9}"}, stop=["bb"]))
    assert (out.outputs[0].text, out.outputs[0].stop_reason) == ("a", "bb")
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    stop = tokenizer.convert_tokens_to_ids("c")
    (out,) = llm.generate([[5]], _params({"regex": "[ab]c[ab]{9}"}, stop_token_ids=[stop]))
    assert out.outputs[0].text in ("a", "b")
    assert out.outputs[0].stop_reason == stop


def test_a_row_whose_tokens_are_all_barred_fails_alone(llm: LLM) -> None:
    params = [
        _params({"regex": "[0-9]+"}, allowed_token_ids=[300, 301]),
        _params({"choice": ["yes"]}),
    ]
    barred, other = llm.generate([[5], [6]], params)
    assert isinstance(barred.error, InvalidOperation)
    assert "structured_outputs together bar" in str(barred.error)
    assert other.outputs[0].text == "yes"


def test_a_grammar_that_takes_too_much_work_fails_alone(llm: LLM) -> None:
    """What meets llguidance's limits while it runs must not pass for the end of an output."""
    hard = _params({"regex": "((a{1,1000}){1,1000}){1,1000}"}, max_tokens=200, ignore_eos=True)
    failed, other = llm.generate([[5], [6]], [hard, _params(_KINDS[0])])
    assert failed.outputs[0].finish_reason == "error"
    assert "takes too much work" in str(failed.error)
    _check(_KINDS[0], other.outputs[0].text)


def test_streams_give_the_last_token_too(llm: LLM) -> None:
    for kind in _KINDS:
        pieces = list(llm.stream([5, 6], _params(kind)))
        assert pieces[-1].finish_reason == "stop"
        _check(kind, "".join(piece.text for piece in pieces))


def test_asyncio_callers_and_their_refusals(model: PreTrainedModel) -> None:
    async def run() -> None:
        tokenizer = vocabularies.byte_level()
        options = zoo.with_defaults({})
        async with AsyncLLM(model, tokenizer=tokenizer, device="cpu", **options) as llm:

            async def one(kind: dict[str, Any]) -> None:
                async for out in llm.generate([5, 6], _params(kind)):
                    last = out
                _check(kind, last.outputs[0].text)

            await asyncio.gather(*map(one, _KINDS))
            with pytest.raises(InvalidSamplingParams, match="uniqueItems"):
                llm.generate([5], _params({"json": {"uniqueItems": True}}))

    asyncio.run(run())


def test_refusals_come_before_anything_runs(llm: LLM) -> None:
    before = llm.stats().num_prompt_tokens
    params = [_params({"choice": ["yes"]}), _params({"json": {"not": {}}})]
    with pytest.raises(InvalidSamplingParams, match='"not"'):
        llm.generate([[5], [6]], params)
    assert llm.stats().num_prompt_tokens == before


def test_a_model_without_a_tokenizer_refuses_with_the_remedy(model: PreTrainedModel) -> None:
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        with pytest.raises(InvalidSamplingParams, match="pass tokenizer="):
            llm.generate([[5]], _params({"choice": ["yes"]}))
        with pytest.raises(InvalidSamplingParams, match="pass tokenizer="):
            zoo.add(llm.engine, "r", [5], _params({"choice": ["yes"]}))


@pytest.mark.parametrize("width", [370, 520])
def test_logits_may_be_fewer_or_more_than_tokens(width: int) -> None:
    model = zoo.tiny_model("llama", vocab_size=width, eos_token_id=1)
    with _open(model) as llm:
        assert llm.tokenizer is not None
        for out in llm.generate(_PROMPTS, _params(_KINDS[0], seed=3)):
            assert max(out.outputs[0].token_ids) < min(width, len(llm.tokenizer))
            _check(_KINDS[0], out.outputs[0].text)


def test_a_tokenizer_with_byte_fallback() -> None:
    tokenizer = vocabularies.byte_fallback()
    model = zoo.tiny_model("llama", vocab_size=len(tokenizer) + 9, eos_token_id=2)
    with LLM(model, tokenizer=tokenizer, device="cpu", **zoo.with_defaults({})) as llm:
        for kind in _KINDS:
            for out in llm.generate(_PROMPTS, _params(kind, max_tokens=200)):
                assert out.outputs[0].finish_reason == "stop"
                _check(kind, out.outputs[0].text)


def test_the_built_in_model() -> None:
    with LLM(device="cpu") as llm:
        for kind in _KINDS:
            (out,) = llm.generate("what is your name?", _params(kind))
            assert out.outputs[0].finish_reason == "stop"
            _check(kind, out.outputs[0].text)
