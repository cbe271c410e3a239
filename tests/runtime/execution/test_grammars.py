"""Grammars are compiled under limits, followed to the letter, and end where they end."""

import json
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemas
import vocabularies
import zoo
from grammar_walks import Walker, allowed
from hypothesis import given, settings
from hypothesis import strategies as st
from vkv import StructuredOutputsParams
from vkv.runtime.execution import grammars as grammars_module
from vkv.runtime.execution.grammars import Grammars
from vkv.vmem.errors import InvalidSamplingParams

_SUPPORT = Path(__file__).parents[2] / "support"
_NUM_SCHEMAS = 240


@pytest.fixture(scope="module")
def walker() -> Walker:
    """A vocabulary of bytes, with more logits than tokens and two end tokens."""
    return Walker.of(vocabularies.byte_level(), [1, 2], 520)


@pytest.fixture(scope="module")
def fallback() -> Walker:
    tokenizer = vocabularies.byte_fallback()
    return Walker.of(tokenizer, [2], len(tokenizer) - 3)  # fewer logits than tokens


def _walks(walker: Walker, num: int = 20, **fields: Any) -> list[str]:
    outputs = StructuredOutputsParams(**fields)
    texts = [walker.walk(outputs, random.Random(seed)) for seed in range(num)]
    whole = [text for text in texts if text is not None]
    assert len(whole) > num / 2
    return whole


@pytest.mark.parametrize("which", ["walker", "fallback"])
def test_each_kind_is_followed(which: str, request: pytest.FixtureRequest) -> None:
    walker = request.getfixturevalue(which)
    choice = ["yes", "no", "yes please", "größe\n", 'a"b\\']
    assert set(_walks(walker, 60, choice=choice)) == set(choice)
    pattern = "(ab|[0-9]{2,4}/)+é?"
    assert all(re.fullmatch(pattern, text) for text in _walks(walker, regex=pattern))
    lark = 'start: pair ("," pair)*\npair: NAME "=" /[0-9]+/\nNAME: /[a-c]{1,3}/\n'
    line = "[a-c]{1,3}=[0-9]+"
    found = _walks(walker, grammar=lark)
    assert all(re.fullmatch(f"{line}(,{line})*", text) for text in found)
    gbnf = 'root ::= ("x" | "y")+ end?\nend ::= "!" [0-9]\n'
    assert all(re.fullmatch("[xy]+(![0-9])?", text) for text in _walks(walker, grammar=gbnf))
    for text in _walks(walker, json_object=True, disable_any_whitespace=True):
        assert isinstance(json.loads(text), dict)


def test_whitespace_is_as_asked(walker: Walker) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}
    anything = _walks(walker, 60, json=schema)
    assert any(" " in text or "\n" in text for text in anything)
    grammar = walker.grammars.start(StructuredOutputsParams(json=schema))
    for byte in (b"[", *[b" "] * 40):
        grammar.advance(walker.table.index(byte))
    assert {walker.table[i][:1] for i in allowed(grammar)} == {b"1", b"2"}
    for text in _walks(walker, json=schema, disable_any_whitespace=True):
        assert re.fullmatch(r"\[[12](,[12])+\]", text)
    for text in _walks(walker, json=schema, whitespace_pattern="_?"):
        assert re.fullmatch(r"\[_?[12]_?(,_?[12]_?)+\]", text)


@pytest.mark.parametrize("seed", range(0, _NUM_SCHEMAS, 20))
def test_what_schemas_allow_is_valid(walker: Walker, fallback: Walker, seed: int) -> None:
    """In batches of twenty, a process would be too much for each."""
    num_whole = 0
    for number in range(seed, seed + 20):
        rng = random.Random(number)
        schema = schemas.random_schema(rng)
        outputs = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
        for one in (walker, fallback):
            text = one.walk(outputs, rng)
            if text is not None:
                _validate(json.loads(text), schema)
                num_whole += 1
    assert num_whole > 30


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_what_any_schema_allows_is_valid(walker: Walker, seed: int) -> None:
    rng = random.Random(seed)
    schema = schemas.random_schema(rng)
    text = walker.walk(StructuredOutputsParams(json=schema, disable_any_whitespace=True), rng)
    if text is not None:
        _validate(json.loads(text), schema)


def _validate(value: Any, schema: dict[str, Any]) -> None:
    checker = jsonschema.FormatChecker()
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json": {"not": {"type": "string"}}}, '"not"'),
        ({"json": {"type": "array", "uniqueItems": True}}, '"uniqueItems"'),
        ({"json": {"type": "array", "contains": {}}}, '"contains"'),
        ({"json": {"if": {}, "then": {"type": "null"}}}, '"if", "then"'),
        ({"json": {"dependentRequired": {"a": ["b"]}}}, "dependentRequired"),
        ({"json": {"type": "object", "unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"json": {"type": "string", "format": "of-mine"}}, "of-mine"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}, "anyOf"),
        ({"json": {"$ref": "http://localhost:1/a.json"}}, "localhost:1.*not fetch"),
        ({"json": {"$ref": "#/$defs/gone"}}, "gone"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "greater than maximum"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"json": '{"items":' * 300 + "{}" + "}" * 300}, "recursion|nest"),
        ({"json": {"properties": {f"p{i}": {"type": "null"} for i in range(4000)}}}, "fewer"),
        ({"regex": "(a"}, "unclosed"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "(" * 9000 + ")" * 9000}, "invalid regex"),
        ({"grammar": "start: nothing_such"}, "nothing_such"),
        ({"grammar": 'begin: "a"'}, "start"),
        ({"grammar": "start: start"}, "no output"),
        ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "nested"),
        ({"grammar": "root ::= nothing_such"}, "nothing"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    walker: Walker, fields: dict[str, Any], words: str
) -> None:
    outputs = StructuredOutputsParams(**fields)
    for _ in range(2):  # the second refusal is remembered
        with pytest.raises(InvalidSamplingParams, match=words) as caught:
            walker.grammars.prepare(outputs)
        assert str(caught.value).startswith(f"structured_outputs.{outputs.kind} ")


_DEEP = r"""
import json, sys
sys.path.insert(0, sys.argv[1])
import vocabularies
from vkv import StructuredOutputsParams
from vkv.runtime.execution.grammars import Grammars
from vkv.runtime.request.token_grammar import allowed_bits
from vkv.vmem.errors import InvalidSamplingParams

grammars = Grammars(vocabularies.byte_level(), 520, [1])
deep = {
    "$ref": "#/$defs/0",
    "$defs": {str(i): {"properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(2000)},
}
deep["$defs"]["2000"] = {}
rules = "".join(f"a{i}: \"b\" a{i + 1}\n" for i in range(1900))
terminals = rules.upper()
for fields in (
    {"json": deep},
    {"grammar": "start: a0\n" + rules + "a1900: \"c\"\n"},
    {"grammar": "start: A0\n" + terminals.replace("\"B\"", "\"b\"") + "A1900: \"c\"\n"},
    {"regex": "(a?|b)" * 5000},
):
    try:
        places = [grammars.start(StructuredOutputsParams(**fields)) for _ in range(3)]
        allowed_bits(places)
    except InvalidSamplingParams as error:
        print("refused", str(error)[:80])
print("whole")
"""


def test_deep_grammars_do_not_end_the_process() -> None:
    """The library that compiles them recurses, and an overflow of the stack would be the end."""
    command = [sys.executable, "-c", _DEEP, str(_SUPPORT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("whole\n")


def test_who_waits_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(vocabularies.byte_level(), 520, [1])
    grammars.prepare(StructuredOutputsParams(regex="warm"))
    go_on = threading.Event()
    compile_it = grammars_module._compile

    def slowly(*args: Any) -> Any:
        go_on.wait()
        return compile_it(*args)

    with monkeypatch.context() as patched:
        patched.setattr(grammars_module, "_COMPILE_S", 0.05)
        patched.setattr(grammars_module, "_compile", slowly)
        for regex in ("first", "second"):
            with pytest.raises(InvalidSamplingParams, match=r"not compiled in 0\.05 s; use fewer"):
                grammars.prepare(StructuredOutputsParams(regex=regex))
        with pytest.raises(InvalidSamplingParams, match="try again"):
            grammars.prepare(StructuredOutputsParams(regex="third"))
        assert grammars.knows(StructuredOutputsParams(regex="first"))  # and refuses it at once
        grammars.prepare(StructuredOutputsParams(regex="warm"))
        go_on.set()
    grammars.prepare(StructuredOutputsParams(regex="third"))
    for thread in threading.enumerate():
        if thread.name == "vkv-grammar":
            thread.join(10)
    for regex in ("first", "second"):  # compiled by now: who asks again has them
        grammars.prepare(StructuredOutputsParams(regex=regex))


def test_a_system_without_threads_takes_no_place_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammars = Grammars(vocabularies.byte_level(), 520, [1])
    outputs = StructuredOutputsParams(regex="a")

    def refuse(work: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(grammars_module, "_start", refuse)
        patched.setattr(grammars_module, "_COMPILE_S", 0.05)
        for _ in range(3):
            with pytest.raises(InvalidSamplingParams, match=r"start new thread, .* try again"):
                grammars.prepare(outputs)
    grammars.prepare(outputs)


def test_grammars_are_kept_and_the_oldest_forgotten(
    walker: Walker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "_MOST_KEPT", 3)
    every = [StructuredOutputsParams(choice=[f"text {i}"]) for i in range(5)]
    for outputs in every:
        walker.grammars.prepare(outputs)
        walker.grammars.prepare(every[0])
    assert [walker.grammars.knows(outputs) for outputs in every] == [True, False, False, True, True]


def test_any_number_of_threads_may_prepare_and_start(walker: Walker) -> None:
    errors: list[BaseException] = []
    stack_bytes = threading.stack_size()

    def work(number: int) -> None:
        try:
            for i in range(20):
                outputs = StructuredOutputsParams(choice=[f"{i % 5}", f"{number % 2}x"])
                assert walker.walk(outputs, random.Random(i)) in outputs.choice  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert threading.stack_size() == stack_bytes


def test_all_end_tokens_may_end_an_output_and_only_a_whole_one(walker: Walker) -> None:
    grammar = walker.grammars.start(StructuredOutputsParams(regex="a(bc)*"))
    table = walker.table
    assert {table[i] for i in allowed(grammar)} == {b"a"}
    grammar.advance(table.index(b"a"))
    assert {1, 2} < set(allowed(grammar))
    grammar.advance(table.index(b"b"))
    assert not {1, 2} & set(allowed(grammar))
    assert not grammar.is_complete
    grammar.advance(table.index(b"c"))
    grammar.advance(2)
    assert grammar.is_complete


def test_ends_that_are_ignored_come_only_where_nothing_else_can(walker: Walker) -> None:
    outputs = StructuredOutputsParams(regex="a+")
    grammar = walker.grammars.start(outputs, ends=())
    a = walker.table.index(b"a")
    grammar.advance(a)
    assert {walker.table[i] for i in allowed(grammar)} == {b"a"}
    grammar = walker.grammars.start(StructuredOutputsParams(regex="a"), ends=())
    grammar.advance(a)
    assert grammar.is_complete
    assert set(allowed(grammar)) == {1, 2}


def test_a_model_without_end_tokens_ends_where_the_grammar_does() -> None:
    walker = Walker.of(vocabularies.byte_level(), [], 520)
    assert walker.walk(StructuredOutputsParams(choice=["ab", "c"]), random.Random(0)) in ("ab", "c")


def test_a_grammar_that_cannot_go_on_says_so_and_is_compiled_anew() -> None:
    tokenizer = zoo.letter_tokenizer()  # which has no ö
    walker = Walker.of(tokenizer, [95], 96)
    outputs = StructuredOutputsParams(regex="[a-z]ö")
    grammar = walker.grammars.start(outputs)
    grammar.advance(walker.table.index(b"q"))
    assert allowed(grammar) == []
    assert "no token of the vocabulary continues" in str(grammar.failure)
    assert not grammar.is_complete
    assert not walker.grammars.knows(outputs)


def test_a_tokenizer_that_cannot_be_is_refused_for_good() -> None:
    grammars = Grammars(vocabularies.word_piece(), 4, [3])
    for _ in range(2):
        with pytest.raises(InvalidSamplingParams, match="WordPiece"):
            grammars.prepare(StructuredOutputsParams(regex="a"))
