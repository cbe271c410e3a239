"""Tools and schemas through clients, unchanged, where a grammar holds the answer to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel
from served import Served

TEMPLATE = Path(__file__).parents[2] / "support" / "tool_template.jinja"
QUESTION = "What is 3 + 4?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
ADD = {  # of which every answer is short, so that none is cut off
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["apples", "pears"]},
    },
    "required": ["a", "b", "unit"],
    "additionalProperties": False,
}
STOP = {
    "type": "object",
    "properties": {"now": {"type": "boolean"}},
    "required": ["now"],
    "additionalProperties": False,
}
LONG = 900  # tokens: the model is weak, and fills schemas with whitespace where it may
CHAT_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": ADD}},
    {"type": "function", "function": {"name": "stop", "parameters": STOP}},
]
FLAT_TOOLS: list[Any] = [
    {"type": "function", "name": "add", "description": "Add.", "parameters": ADD, "strict": True},
    {"type": "function", "name": "stop", "parameters": STOP, "strict": True},
]
ANTHROPIC_TOOLS: list[Any] = [
    {"name": "add", "description": "Add.", "input_schema": ADD},
    {"name": "stop", "input_schema": STOP},
]


class Sum(BaseModel):
    """What an answer is held to."""

    left: Literal[1, 2, 3]
    right: Literal[1, 2, 3]
    is_even: bool


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The built-in model under a template that shows tools."""
    log = tmp_path_factory.mktemp("tooled") / "log"
    with Served("--chat-template", str(TEMPLATE), "--max-num-seqs", "4", log=log) as server:
        yield server
        assert "Traceback" not in server.log(), server.log()


@pytest.fixture(scope="module")
def client(tooled: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(tooled: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=tooled.url, api_key="none", max_retries=0)


def check_call(name: str, arguments: Any) -> None:
    """A call is of a tool that there is, and fits its schema."""
    if name == "add":
        assert set(arguments) == {"a", "b", "unit"}
        assert type(arguments["a"]) is type(arguments["b"]) is int
        assert {arguments["a"], arguments["b"]} <= set(range(100))
        assert arguments["unit"] in ("apples", "pears")
    else:
        assert name == "stop"
        assert arguments in ({"now": True}, {"now": False})


CHOICES = ["required", "stop", "add"]


# -- /v1/chat/completions --------------------------------------------------------------------------


def _chat_choice(choice: str) -> Any:
    return choice if choice == "required" else {"type": "function", "function": {"name": choice}}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
def test_chat(client: openai.OpenAI, choice: str, parallel: bool) -> None:
    told = client.chat.completions.create(
        model="tiny-chat",
        messages=MESSAGES,
        tools=CHAT_TOOLS,
        tool_choice=_chat_choice(choice),
        parallel_tool_calls=parallel,
        max_tokens=300,
        temperature=0,
    )
    message = told.choices[0].message
    assert message.tool_calls
    assert message.content is None
    calls = message.tool_calls
    if parallel and told.choices[0].finish_reason == "length":
        calls = calls[:-1]  # a weak model may call without end where it may call more than once
    else:
        assert told.choices[0].finish_reason == "tool_calls"
    assert len(calls) == 1 or parallel
    for call in calls:
        assert call.id
        assert choice in ("required", call.function.name)
        check_call(call.function.name, json.loads(call.function.arguments))
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)


@pytest.mark.parametrize("choice", CHOICES)
def test_chat_stream(client: openai.OpenAI, choice: str) -> None:
    stream = client.chat.completions.create(
        model="tiny-chat",
        messages=MESSAGES,
        tools=CHAT_TOOLS,
        tool_choice=_chat_choice(choice),
        parallel_tool_calls=False,
        max_tokens=300,
        stream=True,
    )
    names, ids, arguments, reasons = [], [], "", []
    for chunk in stream:
        (told,) = chunk.choices
        assert not told.delta.content
        reasons.append(told.finish_reason)
        for call in told.delta.tool_calls or ():
            assert call.index == 0
            names += [call.function.name] if call.function.name else []
            ids += [call.id] if call.id else []
            arguments += call.function.arguments or ""
    assert (len(names), len(ids)) == (1, 1)  # told once, in the first piece
    check_call(names[0], json.loads(arguments))
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_chat_with_the_clients_own_stream(client: openai.OpenAI) -> None:
    """It puts the pieces together, and parses the arguments of strict tools."""
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in CHAT_TOOLS]
    with client.chat.completions.stream(
        model="tiny-chat",
        messages=MESSAGES,
        tools=strict,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    check_call(call.function.name, call.function.parsed_arguments)
    assert any(event.type == "tool_calls.function.arguments.done" for event in events)


def test_a_round_trip(client: openai.OpenAI, tooled: Served) -> None:
    """Calls and what came of them are shown to the model again."""
    asked: dict[str, Any] = {"model": "tiny-chat", "tools": CHAT_TOOLS, "max_tokens": 300}
    first = client.chat.completions.create(
        **asked, messages=MESSAGES, tool_choice=_chat_choice("add")
    )
    (call,) = first.choices[0].message.tool_calls
    conversation = [
        *MESSAGES,
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "seven"},
    ]
    text = _shown(tooled, {"messages": conversation, "tools": CHAT_TOOLS})
    assert "<tool_response>seven</tool_response>" in text
    assert json.dumps(json.loads(call.function.arguments)) in text
    again = client.chat.completions.create(**{**asked, "max_tokens": 8}, messages=conversation)
    assert again.choices[0].message.content is not None


def _shown(tooled: Served, body: dict[str, Any]) -> str:
    tokens = tooled.client.post("/tokenize", json=body).json()["tokens"]
    return tooled.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


def test_a_cut_off_call_says_so(client: openai.OpenAI) -> None:
    told = client.chat.completions.create(
        model="tiny-chat",
        messages=MESSAGES,
        tools=CHAT_TOOLS,
        tool_choice=_chat_choice("add"),
        max_tokens=3,
    )
    assert told.choices[0].finish_reason == "length"


def test_chat_parse(client: openai.OpenAI) -> None:
    told = client.chat.completions.parse(
        model="tiny-chat", messages=MESSAGES, response_format=Sum, max_tokens=LONG, n=2, seed=1
    )
    for choice in told.choices:
        assert isinstance(choice.message.parsed, Sum)
    assert client.beta.chat.completions.parse.__name__ == "parse"  # the older name of the same


def test_chat_parse_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny-chat", messages=MESSAGES, response_format=Sum, max_tokens=LONG
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Sum)


def test_parsed_tools(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Sum, name="sum")
    told = client.chat.completions.parse(
        model="tiny-chat",
        messages=MESSAGES,
        tools=[tool],
        tool_choice=_chat_choice("sum"),
        max_tokens=LONG,
    )
    (call,) = told.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sum)


def test_json_object(client: openai.OpenAI) -> None:
    told = client.chat.completions.create(
        model="tiny-chat",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        max_tokens=LONG,
        seed=3,
    )
    text, reason = told.choices[0].message.content, told.choices[0].finish_reason
    assert text.lstrip().startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)


# -- /v1/messages ----------------------------------------------------------------------------------


def _claude_choice(choice: str) -> Any:
    kind = {"type": "any"} if choice == "required" else {"type": "tool", "name": choice}
    return {**kind, "disable_parallel_tool_use": True}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stream", [False, True])
def test_messages(claude: anthropic.Anthropic, choice: str, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny-chat",
        "messages": MESSAGES,
        "tools": ANTHROPIC_TOOLS,
        "tool_choice": _claude_choice(choice),
        "max_tokens": 300,
    }
    if stream:
        pieces = ""
        with claude.messages.stream(**asked) as events:
            for event in events:
                if event.type == "input_json":
                    pieces += event.partial_json
            told = events.get_final_message()
        assert json.loads(pieces) == told.content[0].input
    else:
        told = claude.messages.create(**asked)
    (block,) = told.content
    assert (block.type, told.stop_reason) == ("tool_use", "tool_use")
    assert choice in ("required", block.name)
    check_call(block.name, block.input)


def test_messages_parse(claude: anthropic.Anthropic) -> None:
    told = claude.messages.parse(
        model="tiny-chat", messages=MESSAGES, max_tokens=LONG, output_format=Sum
    )
    assert isinstance(told.parsed_output, Sum)


def test_messages_round_trip(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny-chat", "tools": ANTHROPIC_TOOLS, "max_tokens": 300}
    first = claude.messages.create(**asked, messages=MESSAGES, tool_choice=_claude_choice("add"))
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "seven"}
    conversation = [
        *MESSAGES,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result]},
    ]
    again = claude.messages.create(**{**asked, "max_tokens": 4}, messages=conversation)
    assert again.role == "assistant"


# -- /v1/responses ---------------------------------------------------------------------------------


def _flat_choice(choice: str) -> Any:
    return choice if choice == "required" else {"type": "function", "name": choice}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stream", [False, True])
def test_responses(client: openai.OpenAI, choice: str, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny-chat",
        "input": QUESTION,
        "tools": FLAT_TOOLS,
        "tool_choice": _flat_choice(choice),
        "parallel_tool_calls": False,
        "max_output_tokens": 300,
    }
    if stream:
        pieces = ""
        with client.responses.stream(**asked) as events:
            for event in events:
                if event.type == "response.function_call_arguments.delta":
                    pieces += event.delta
            told = events.get_final_response()
        assert told.output[0].arguments == pieces
    else:
        told = client.responses.create(**asked)
    (item,) = told.output
    assert (item.type, item.status, told.status) == ("function_call", "completed", "completed")
    assert choice in ("required", item.name)
    check_call(item.name, json.loads(item.arguments))


def test_responses_round_trip(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny-chat", "tools": FLAT_TOOLS, "max_output_tokens": 300}
    first = client.responses.create(**asked, input=QUESTION, tool_choice=_flat_choice("add"))
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "seven"}
    given = [{"role": "user", "content": QUESTION}, call.model_dump(exclude_none=True), output]
    again = client.responses.create(**{**asked, "max_output_tokens": 4}, input=given)
    assert again.usage.input_tokens > first.usage.input_tokens


def test_responses_parse(client: openai.OpenAI) -> None:
    told = client.responses.parse(
        model="tiny-chat", input=QUESTION, text_format=Sum, max_output_tokens=LONG
    )
    assert isinstance(told.output_parsed, Sum)


# -- what does not go ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_choice": _chat_choice("subtract")}, "'add', 'stop'"),
        ({"tools": [], "tool_choice": "required"}, "without tools"),
        ({"tools": [CHAT_TOOLS[0], CHAT_TOOLS[0]]}, "several tools 'add'"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "use one"),
        ({"response_format": {"type": "json_schema"}}, "without a schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "without a schema",
        ),
    ],
)
def test_refusals(client: openai.OpenAI, more: dict[str, Any], words: str) -> None:
    asked = {"model": "tiny-chat", "messages": MESSAGES, "tools": CHAT_TOOLS, **more}
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**asked)


def test_a_template_that_shows_no_tools(served: Served) -> None:
    """A model that is told of no tools cannot call them, so they are refused."""
    body = {"messages": MESSAGES, "tools": CHAT_TOOLS}
    told = served.client.post("/v1/chat/completions", json=body)
    assert told.status_code == 400
    assert "tools" in told.json()["error"]["message"]
