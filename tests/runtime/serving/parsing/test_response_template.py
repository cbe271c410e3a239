"""Answers read by `transformers`' own description of them."""

import copy
import json
import re
from typing import Any

import pytest
from answers import TOOLS, Answer, as_hermes, cut, feed, parser, read, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from vkv.runtime.serving.parsing import AnswerFormat, answer_format
from vkv.vmem.errors import InvalidConfig

TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>"},
    },
}
PROMPT = "<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n"


def _format(**changes: Any) -> AnswerFormat:
    template = copy.deepcopy(TEMPLATE)
    template["fields"].update(changes)
    return answer_format(tokenizer(response_template=template))


def test_it_is_chosen_where_a_tokenizer_has_one() -> None:
    answers = _format()
    assert (answers.tool_call_parser, answers.reasoning_parser) == ("hf", "hf")
    assert not answers.skip_special_tokens


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain < text", Answer("plain < text")),
        (
            f"<think>\nHm\n</think>\n\nOk{as_hermes('now', {'a': [1]})}<|im_end|>",
            Answer("Ok", "Hm", (("now", '{"a": [1]}'),)),
        ),
        (
            as_hermes("a", {}) + as_hermes("b", {"x": "é"}),
            Answer(calls=(("a", "{}"), ("b", '{"x": "é"}'))),
        ),
        # What is not as described, or was cut off, is content.
        ("<tool_call>{x}</tool_call> so", Answer("{x} so")),
        ("<tool_call>[1]</tool_call>", Answer("[1]")),
        (f"<tool_call>?</tool_call>{as_hermes('now', {})}", Answer("?", calls=(("now", "{}"),))),
        ('Hm <tool_call>{"name": "no', Answer('Hm{"name": "no')),  # its opening takes the space
        ("<think>so </thi", Answer("", "so </thi")),
    ],
)
def test_what_is_read_of_a_text(text: str, answer: Answer) -> None:
    for pieces in ([text], text, cut(text, [3, 20])):
        assert read(_format(), pieces, prompt=PROMPT) == answer


def test_the_prompt_may_have_opened_the_reasoning() -> None:
    text = "so\n</think>\n\nHi"
    assert read(_format(), text, prompt=f"{PROMPT}<think>\n") == Answer("Hi", "so")
    assert read(_format(), "Hi", prompt=f"{PROMPT}<think>\n\n</think>\n\n") == Answer("Hi")


def test_calls_and_reasoning_stay_text_where_they_are_not_wanted() -> None:
    call = as_hermes("now", {})
    assert read(_format(), f"Ok{call}", tools=None, prompt=PROMPT) == Answer(f"Ok{call}")
    assert read(_format(), call, tool_choice="none", prompt=PROMPT) == Answer(call)
    answers = answer_format(tokenizer(response_template=TEMPLATE), reasoning_parser="none")
    assert read(answers, "<think>a</think>b", prompt=PROMPT) == Answer("<think>a</think>b")


def test_arguments_get_the_types_of_the_tools() -> None:
    calls = {
        "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>\w+)>(?P<value>.*?)</parameter>"},
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    }
    text = (
        "<tool_call><function=weather><parameter=city>12</parameter><parameter=days>3</parameter>"
        "</function>\n</tool_call>"
    )
    ((name, arguments),) = read(_format(tool_calls=calls), text, prompt=PROMPT).calls
    assert (name, json.loads(arguments)) == ("weather", {"city": "12", "days": 3})


shreds = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<|im_end|>",
        "<tool",
        as_hermes("f", {}),
    ]
)


@given(text=st.lists(shreds | st.text(max_size=5), max_size=12).map("".join))
def test_nothing_raises_and_cuts_make_no_difference(text: str) -> None:
    for choice in ("auto", "none", "now"):
        expected = read(_format(), [text], tool_choice=choice, prompt=PROMPT)
        assert read(_format(), text, tool_choice=choice, prompt=PROMPT) == expected


def test_text_comes_as_it_is_written() -> None:
    reader = parser(_format(), prompt=PROMPT)
    assert reader.feed("<think>Hm").reasoning == "Hm"
    assert reader.feed("</think>A <tool").content == "A"
    (call,) = reader.feed('_call>{"name": "now", "arguments": {}}</tool_call>').tool_calls
    assert (call.name, call.arguments) == ("now", "{}")
    assert feed(reader, [])[-1].tool_calls == ()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"fields": {}}, "response_template is wrong"),
        ({**TEMPLATE, "start_anchor": 3}, "response_template is wrong"),
        ({**TEMPLATE, "fields": {**TEMPLATE["fields"], "citations": {"open": "["}}}, "citations"),
        (
            {**TEMPLATE, "fields": {"content": {"content": "json"}}},
            "'content' of more than its text",
        ),
    ],
)
def test_a_template_that_is_not_understood_is_refused(template: Any, words: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(words)):
        answer_format(tokenizer(response_template=template))
    answers = answer_format(
        tokenizer(response_template=template), tool_call_parser="hermes", reasoning_parser="think"
    )
    assert read(answers, as_hermes("now", {}), tools=TOOLS).calls == (("now", "{}"),)
