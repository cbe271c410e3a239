"""Conversations written out: what templates are told, what they take, what is refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from transformers import PreTrainedTokenizerFast
from vkv import LLM, AsyncLLM
from vkv.runtime.frontend.chat_template import ChatTemplate
from vkv.vmem.errors import InvalidPrompt

_HELLO = {"role": "user", "content": "hello"}
_PARTS = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
_PLAIN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
_TOOLS = "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}" + _PLAIN
_THINKS = "{% if thinks is defined and thinks %}(thinking){% endif %}" + _PLAIN
_PARTS_ALONE = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
)
_CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }} ARGUMENTS>{% endfor %};{% endfor %}"
)


def template(text: str | dict[str, str] | None) -> ChatTemplate:
    tokenizer = zoo.letter_tokenizer()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, "a model")


def write(text: str | dict[str, str] | None, messages: Any, **options: Any) -> str:
    written = template(text).render(messages, options)  # type: ignore[arg-type]
    assert written.text == "".join(chr(32 + token) for token in written.token_ids or ())
    return written.text


# --- what a template is told -------------------------------------------------------------------


def test_a_conversation_ends_where_the_answer_begins() -> None:
    assert write(_PLAIN, [_HELLO]) == "user:hello;a:"
    assert write(_PLAIN, [_HELLO], add_generation_prompt=False) == "user:hello;"
    assert write(_PLAIN, (_HELLO,), add_generation_prompt=None) == "user:hello;a:"


def test_the_last_message_may_be_left_open() -> None:
    messages = [_HELLO, {"role": "assistant", "content": "I am"}]
    assert write(_PLAIN, messages, continue_final_message=True) == "user:hello;assistant:I am"
    with pytest.raises(InvalidPrompt, match="add_generation_prompt and continue_final_message"):
        write(_PLAIN, messages, continue_final_message=True, add_generation_prompt=True)


def test_tools_reach_the_template() -> None:
    text = write(_TOOLS, [_HELLO], tools=[_TOOL])
    assert json.loads(text[1 : text.index("]")]) == _TOOL
    assert write(_TOOLS, [_HELLO], tools=None) == write(_TOOLS, [_HELLO], tools=[])

    def look(at: str) -> str:
        """
        Look at something.

        Args:
            at: what to look at
        """
        return at

    assert "look at something" in write(_TOOLS, [_HELLO], tools=[look]).lower()


def test_a_template_of_several_is_chosen() -> None:
    several = {"default": _PLAIN, "tool_use": _TOOLS, "short": "{{ messages[0].content }}"}
    assert write(several, [_HELLO]) == "user:hello;a:"
    assert write(several, [_HELLO], tools=[_TOOL]).startswith("[")
    assert write(several, [_HELLO], chat_template="short") == "hello"
    with pytest.raises(InvalidPrompt, match=r"'shrt', which writes no message.*default, short"):
        write(several, [_HELLO], chat_template="shrt")
    with pytest.raises(InvalidPrompt, match=r"multiple chat templates.*pass chat_template="):
        write({"short": "{{ messages }}"}, [_HELLO])


def test_another_template_may_be_passed() -> None:
    assert write(_PLAIN, [_HELLO], chat_template="<{{ messages[0].content }}>") == "<hello>"
    assert write(None, [_HELLO], chat_template=_PLAIN) == "user:hello;a:"


def test_variables_reach_the_template() -> None:
    assert write(_THINKS, [_HELLO], chat_template_kwargs={"thinks": True}).startswith("(thinking)")
    assert write(_THINKS, [_HELLO], chat_template_kwargs={"thinks": False}) == "user:hello;a:"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": [_TOOL]}, "template of a model has no variable 'tools'"),
        ({"chat_template_kwargs": {"thinks": 1}}, "has no variable 'thinks'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "has no variable 'tokenize'"),
        ({"chat_template_kwargs": {"tools": []}}, "has 'tools'; pass it as an argument"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs is 5; give a dictionary"),
        ({"tools": _TOOL}, "give a list of schemas or functions"),
        ({"chat_template": 5}, "chat_template is 5; give a template's text"),
        ({"chat_template": "my_template.jinja"}, "writes no message"),
        ({"chat_template": "{% if %}"}, "the chat template refuses"),
        ({"chat_template": "{{ messages[0].content + 5 }}"}, "template fails.*TypeError"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt is 'no'; use True or False"),
        ({"continue_final_message": 1}, "continue_final_message is 1; use True or False"),
        ({"chat_templat": _PLAIN}, "'chat_templat': did you mean 'chat_template'"),
        ({"sampling_params": None}, "it is params here"),
        ({"lora_request": None}, "load the adapter by load_adapter"),
    ],
)
def test_what_a_template_would_not_see_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        write(_PLAIN, [_HELLO], **options)


# --- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [_PARTS, ["he", "llo"], [{"type": "text", "text": "he"}, {"text": "llo"}], tuple(_PARTS)],
)
def test_parts_of_a_content_are_joined(content: Any) -> None:
    joined = _PLAIN.replace("{{ m.content }}", "{{ m.content.replace('\n', '|') }}")
    assert write(joined, [{"role": "user", "content": content}]) == "user:he|llo;a:"


def test_a_template_that_takes_parts_alone_gets_them() -> None:
    assert write(_PARTS_ALONE, [_HELLO]) == "user:hello;"
    parts = [{"type": "text", "text": "hello"}]
    assert write(_PARTS_ALONE, [{"role": "user", "content": parts}]) == "user:hello;"


def test_a_call_needs_no_content() -> None:
    as_json = _CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
    for content in ({}, {"content": None}, {"content": ""}):
        messages = [_HELLO, {"role": "assistant", "tool_calls": [_CALL], **content}]
        assert write(as_json, messages) == 'user:hello;assistant:<look {"at": "sky"}>;'


@pytest.mark.parametrize(
    "arguments",
    ["{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}", "{{ '' + ARGS }}"],
)
@pytest.mark.parametrize("given", [{"at": "sky"}, '{"at": "sky"}'])
def test_a_calls_arguments_are_json_and_never_pythons(arguments: str, given: Any) -> None:
    """Templates take dictionaries or texts, and a dictionary printed is Python's repr."""
    text = _CALLS.replace("ARGUMENTS", arguments.replace("ARGS", "c.function.arguments"))
    call = {"type": "function", "function": {"name": "look", "arguments": given}}
    messages = [_HELLO, {"role": "assistant", "tool_calls": [call]}]
    assert write(text, messages) == 'user:hello;assistant:<look {"at": "sky"}>;'


def test_a_call_may_stand_without_its_wrapper() -> None:
    bare = (
        "{% for c in messages[-1].tool_calls %}{{ c.name }}{{ c.arguments | tojson }}{% endfor %}"
    )
    call = {"name": "look", "arguments": '{"at": 1}'}
    assert write(bare, [{"role": "assistant", "tool_calls": [call]}]) == 'look{"at": 1}'
    assert write(bare, [{"role": "assistant", "tool_calls": [{"name": "look"}]}]) == "look{}"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ({"role": "user", "content": "x"}, "a conversation is a list of messages"),
        ("hello", "a conversation is a list of messages"),
        (5, "a conversation is a list of messages"),
        (iter([_HELLO]), "a conversation is a list of messages"),
        ([], "no messages"),
        (["hello"], "'hello' is no message; give it a 'role' and a 'content'"),
        ([{"content": "x"}], "is no message"),
        ([{"role": 5, "content": "x"}], "is no message"),
        ([{"role": "user"}], "says nothing; give it a 'content'"),
        ([{"role": "assistant", "content": None}], "says nothing"),
        ([{"role": "user", "content": 5}], "content is 5; give a text, or a list of text parts"),
        ([{"role": "user", "content": b"x"}], "give a text, or a list of text parts"),
        ([{"role": "user", "content": {"text": "x"}}], "give a text, or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "no part that a model of text"),
        ([{"role": "user", "content": [5]}], "no part that a model of text"),
        ([{"role": "user", "content": "caf\udce9"}], r"conversation is no text.*no UTF-8"),
        ([{"role": "assistant", "tool_calls": ["look"]}], "is no tool call"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "look", "arguments": "{at"}]}],
            "no JSON",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        write(_PLAIN, messages)


# --- through the front door --------------------------------------------------------------------


@pytest.fixture
def tooled(llama_folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = zoo.letter_tokenizer()
    tokenizer.chat_template = _TOOLS
    return tokenizer


def test_chat_stream_and_async_take_the_same(tooled: PreTrainedTokenizerFast) -> None:
    model, settings = zoo.tiny_model("llama"), zoo.with_defaults({"max_seqs": 4})
    messages = [_HELLO, {"role": "assistant", "content": "I am"}]
    options: dict[str, Any] = {"tools": [_TOOL], "continue_final_message": True}
    with LLM(model, tokenizer=tooled, device="cpu", **settings) as llm:
        (out,) = llm.chat(messages, zoo.greedy(5), **options)
        both = llm.chat([messages, [_HELLO]], zoo.greedy(5), tools=[_TOOL])
        text = "".join(map(str, llm.stream(messages, zoo.greedy(5), **options)))
        tokens = llm.render_chat(messages, **options)
        with pytest.raises(InvalidPrompt, match="did you mean 'tools'"):
            llm.chat(messages, tool=[_TOOL])  # type: ignore[call-arg]
        with pytest.raises(InvalidPrompt, match="tools is for conversations"):
            llm.stream("hello", tools=[_TOOL])

    async def ask() -> Any:
        async with AsyncLLM(model, tokenizer=tooled, device="cpu", **settings) as llm:
            with pytest.raises(InvalidPrompt, match="tools is for conversations"):
                llm.generate("hello", tools=[_TOOL])
            outputs = [o async for o in llm.generate(messages, zoo.greedy(5), **options)]
            return outputs[-1]

    other = asyncio.run(ask())
    assert list(out.prompt_token_ids) == list(other.prompt_token_ids) == tokens
    assert out.outputs == other.outputs
    assert out.outputs[0].text == text
    assert out.prompt == other.prompt == "".join(chr(32 + token) for token in tokens)
    assert out.prompt.endswith("assistant:I am")
    assert len(both) == 2


def test_the_example_from_the_refusals(llm: LLM) -> None:
    """The template that the checkpoint has says nothing of tools, and knows no system message."""
    with pytest.raises(InvalidPrompt, match="no variable 'tools'"):
        llm.chat([_HELLO], tools=[_TOOL])
    with pytest.raises(InvalidPrompt, match="no system"):
        llm.chat([{"role": "system", "content": "x"}])
    with pytest.raises(InvalidPrompt, match="a conversation is a list of messages"):
        llm.chat(_HELLO)  # type: ignore[arg-type]
    with pytest.raises(InvalidPrompt, match="a conversation is a list of messages"):
        llm.chat([[_HELLO], _HELLO])  # type: ignore[list-item]
