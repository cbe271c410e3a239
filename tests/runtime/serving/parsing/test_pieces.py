"""That it makes no difference how a text is cut, what comes when, and that nothing is lost."""

import json
import re
from collections import Counter
from typing import Any

import pytest
from answers import (
    Answer,
    as_coder,
    as_harmony,
    as_hermes,
    as_llama,
    as_mistral,
    as_named_mistral,
    by_names,
    cut,
    feed,
    parser,
    read,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from vkv.runtime.serving.parsing import AnswerFormat

MARKERS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<|start|>",
    "<|message|>",
    "<|call|>",
)
PLACES = st.lists(st.integers(0, 4000), max_size=30)

names = st.from_regex(
    r"[a-zA-Z_][\w-]{0,12}", fullmatch=True, alphabet=st.characters(codec="ascii")
)
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[{"), max_size=20)
texts = plain | st.lists(plain | st.sampled_from(MARKERS), max_size=4).map("".join)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=4)
calls = st.lists(st.tuples(names, objects), max_size=3)
said = plain.map(str.strip)


def _hermes(reasoning: str, content: str, calls: list[tuple[str, Any]]) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{content}" + "".join(
        as_hermes(*call) for call in calls
    )


def _mistral(reasoning: str, content: str, calls: list[tuple[str, Any]]) -> str:
    return f"[THINK]{reasoning}[/THINK]{content}{as_mistral(calls)}"


def _named_mistral(reasoning: str, content: str, calls: list[tuple[str, Any]]) -> str:
    parts = "".join(as_named_mistral(*call) for call in calls)
    return f"[THINK]{reasoning}[/THINK]{content}{parts}"


def _llama(reasoning: str, content: str, calls: list[tuple[str, Any]]) -> str:
    """It has no content beside calls."""
    return f"<think>{reasoning}</think>{as_llama(calls) or content}"


def _harmony(reasoning: str, content: str, calls: list[tuple[str, Any]]) -> str:
    parts = "".join(as_harmony(*call) for call in calls)
    return (
        f"<|channel|>analysis<|message|>{reasoning}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{content}<|end|>{parts}"
    )


@pytest.mark.parametrize(
    ("names", "write"),
    [
        (("hermes", "think"), _hermes),
        (("mistral", "mistral"), _mistral),
        (("mistral", "mistral"), _named_mistral),
        (("llama3_json", "think"), _llama),
        (("openai", "openai"), _harmony),
    ],
)
@given(reasoning=said, content=said, calls=calls, places=PLACES)
def test_calls_come_back_as_they_were_written(
    names: tuple[str, str],
    write: Any,
    reasoning: str,
    content: str,
    calls: list[tuple[str, Any]],
    places: list[int],
) -> None:
    text = write(reasoning, content, calls)
    answer = read(by_names(*names), cut(text, places))
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == calls
    assert answer.reasoning == reasoning
    assert answer.content == ("" if write is _llama and calls else content)
    assert answer == read(by_names(*names), [text])


members = st.dictionaries(names, plain, max_size=3)


@given(calls=st.lists(st.tuples(names, members), max_size=3), content=said, places=PLACES)
def test_tags_come_back_as_they_were_written(
    calls: list[tuple[str, Any]], content: str, places: list[int]
) -> None:
    text = content + "".join(as_coder(*call) for call in calls)
    answer = read(by_names("qwen3_coder"), cut(text, places))
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == calls
    assert answer.content == content


@given(calls=calls.filter(len), places=PLACES)
def test_a_held_answer_comes_back(calls: list[tuple[str, Any]], places: list[int]) -> None:
    body = [{"name": name, "parameters": arguments} for name, arguments in calls]
    for names in (("hermes", "think"), ("openai", "openai"), ("none", "none")):
        answers = by_names(*names)
        text = json.dumps(body, indent=1)
        answer = read(answers, cut(text, places), tool_choice="required", prompt="<think>")
        assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == calls
        text = json.dumps(calls[0][1])
        answer = read(answers, cut(text, places), tool_choice="now", prompt="<think>")
        assert answer == Answer(calls=(("now", text),))


def test_an_answer_that_no_grammar_held_is_read_as_any_other() -> None:
    text = f"<think>so</think>Well{as_hermes('now', {})}"
    for choice in ("required", "now"):
        answer = read(by_names("hermes", "think"), text, tool_choice=choice)
        assert answer == Answer("Well", "so", (("now", "{}"),))


def test_a_held_answer_that_is_cut_off_is_given_as_far_as_it_came() -> None:
    answers = by_names("hermes")
    text = '[{"name": "weather", "parameters": {"city": "U'
    assert read(answers, text, tool_choice="required").calls == (("weather", '{"city": "U'),)
    assert read(answers, '{"city": "U', tool_choice="weather").calls == (
        ("weather", '{"city": "U'),
    )


# -- anything at all ---------------------------------------------------------------------------

FORMATS = [
    by_names("hermes", "think"),
    by_names("qwen3_coder", "think"),
    by_names("llama3_json", "think"),
    by_names("mistral", "mistral"),
    by_names("openai", "openai"),
    by_names("none", "none"),
]
SHREDS = (
    *MARKERS,
    *(marker[: len(marker) // 2] for marker in MARKERS),
    "[CALL_ID]",
    "<|channel|>",
    "analysis",
    "final",
    "to=functions.f",
    "<|end|>",
    '{"name": "f", "arguments": {',
    '{"name": "f", "parameters": {}}',
    '"a": "\\u00e9',
    *'{}[]":,;\\\n <>=',
    "name",
    "f",
)
anything = st.lists(st.sampled_from(SHREDS) | plain, max_size=25).map("".join)


@pytest.mark.parametrize("answers", FORMATS, ids=lambda answers: answers.tool_call_parser)
@settings(max_examples=150)
@given(text=anything, places=PLACES, prompt=st.sampled_from(["", "<think>", "<|start|>assistant"]))
def test_nothing_raises_and_cuts_make_no_difference(
    answers: AnswerFormat, text: str, places: list[int], prompt: str
) -> None:
    for choice in ("auto", "none", "required", "now"):
        expected = read(answers, [text], tool_choice=choice, prompt=prompt)
        for pieces in (text, cut(text, places)):
            assert read(answers, pieces, tool_choice=choice, prompt=prompt) == expected
        if choice == "none" and answers.reasoning_parser == "none":
            assert expected == Answer(text)


WORDS = ("alpha", "beta", "gamma", "delta")
UNITS = {
    "hermes": ("<tool_call>", "</tool_call>", as_hermes("now", {"a": 1}), "<tool", '{"x": 1}'),
    "qwen3_coder": ("<tool_call>", "</tool_call>", "</function>", as_coder("now", {"a": "b"})),
    "llama3_json": ("<|python_tag|>", '{"name": "f", "parameters": {}}', '{"x": [1]}', ";"),
    "mistral": ("[TOOL_CALLS]", as_named_mistral("now", {}), as_mistral([("now", {})]), "[TOOL"),
    "openai": (
        "<|start|>assistant<|channel|>final<|message|>",
        "<|start|>assistant<|channel|>analysis<|message|>",
        "<|end|>",
        as_harmony("now", {}),
        "<|",
    ),
}


@pytest.mark.parametrize("name", UNITS)
@given(data=st.data())
def test_no_word_is_lost(name: str, data: st.DataObject) -> None:
    units = st.sampled_from([*UNITS[name], *(f" {word} " for word in WORDS), " ", "\n"])
    text = "".join(data.draw(st.lists(units, max_size=12)))
    answer = read(by_names(name, "openai" if name == "openai" else "none"), text)
    told = answer.content + answer.reasoning + "".join(sum(answer.calls, ()))
    count = lambda text: Counter(re.findall("|".join(WORDS), text))  # noqa: E731
    assert count(told) == count(text)


# -- what comes when ---------------------------------------------------------------------------


def test_text_is_passed_on_as_soon_as_it_can_be_no_marker() -> None:
    reader = parser(by_names("hermes", "think"))
    assert reader.feed("<think>Hm").reasoning == "Hm"
    assert reader.feed(" so <").reasoning == " so"
    assert reader.feed("b></think>\nA <tool").content == "A"
    assert reader.feed("s> ").content == " <tools>"
    assert reader.feed(".").content == " ."


def test_a_name_comes_when_it_is_known_and_arguments_as_they_come() -> None:
    reader = parser(by_names("hermes"))
    assert not reader.feed('<tool_call>\n{"name": "weath').tool_calls
    (call,) = reader.feed('er"').tool_calls
    assert (call.index, call.name, call.arguments) == (0, "weather", "")
    assert call.id
    pieces = [
        reader.feed(piece).tool_calls for piece in (', "arguments": {"ci', 'ty": "U', 'lm"}}')
    ]
    assert [[call.arguments for call in piece] for piece in pieces] == [
        ['{"ci'],
        ['ty": "U'],
        ['lm"}'],
    ]
    assert all(call.id is None and call.name is None for (call,) in pieces)


def test_strings_of_tags_come_as_they_come() -> None:
    reader = parser(by_names("qwen3_coder"))
    reader.feed("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert reader.feed('say "a').tool_calls[0].arguments == 'say \\"a'
    assert reader.feed("\nb\n").tool_calls[0].arguments == "\\nb"
    assert reader.feed("</parameter>").tool_calls[0].arguments == '"'


def test_calls_in_one_piece_come_in_order() -> None:
    text = as_hermes("a", {"x": 1}) + as_hermes("b", {})
    first = parser(by_names("hermes")).feed(text)
    assert [(call.index, call.name, call.arguments) for call in first.tool_calls] == [
        (0, "a", '{"x": 1}'),
        (1, "b", "{}"),
    ]


def test_ids_are_such_as_the_models_templates_take() -> None:
    (call,) = parser(by_names("mistral")).feed("[TOOL_CALLS]now[ARGS]{}").tool_calls
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", call.id or "")
    (call,) = parser(by_names("hermes")).feed(as_hermes("now", {})).tool_calls
    assert re.fullmatch(r"call_[0-9a-f]{24}", call.id or "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", as_hermes("weather", {"city": 'U"l', "x": "y"})),
        ("qwen3_coder", as_coder("weather", {"city": 'U"l', "x": "y"})),
        ("mistral", as_mistral([("weather", {"city": 'U"l', "x": "y"})])),
        ("mistral", as_named_mistral("weather", {"city": 'U"l', "x": "y"})),
        ("llama3_json", as_llama([("weather", {"city": 'U"l', "x": "y"})])),
        ("openai", as_harmony("weather", {"city": 'U"l', "x": "y"})),
    ],
)
def test_a_call_may_be_cut_off_anywhere(name: str, text: str) -> None:
    for length in range(len(text)):
        answer = read(by_names(name, "openai" if name == "openai" else "none"), text[:length])
        assert not any(marker in answer.content for marker in MARKERS)
        if answer.calls:
            ((called, arguments),) = answer.calls
            assert called == "weather"
            assert '{"city": "U\\"l", "x": "y"}'.startswith(arguments)
            assert not answer.content, length


def test_pieces_may_be_empty() -> None:
    assert whole(feed(parser(by_names("hermes")), ["", "a", "", ""])) == Answer("a")
