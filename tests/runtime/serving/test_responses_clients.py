"""OpenAI's newer API through its own client, unchanged, against the server."""

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from served import Served

QUESTION = "What is 3 + 4?"
LOGPROBS = "message.output_text.logprobs"
ASKED = {"model": "tiny-chat", "input": QUESTION, "temperature": 0}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def answer(served: Served) -> dict[str, Any]:
    """What the older protocol answers."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 2}
    return served.client.post("/v1/chat/completions", json=body).json()


def test_a_response(client: openai.OpenAI, answer: dict[str, Any]) -> None:
    told = client.responses.create(**ASKED, metadata={"mine": "1"})
    assert told.output_text == answer["choices"][0]["message"]["content"]
    (item,) = told.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (told.status, told.error, told.incomplete_details) == ("completed", None, None)
    assert told.metadata == {"mine": "1"}
    assert told.temperature == 0
    assert told.usage.input_tokens == answer["usage"]["prompt_tokens"]
    assert told.usage.output_tokens == answer["usage"]["completion_tokens"]
    assert told.usage.total_tokens == told.usage.input_tokens + told.usage.output_tokens


def test_the_client_finds_all_that_it_wants(served: Served) -> None:
    """Its models are lenient by themselves; this holds an answer to them."""
    body = served.client.post("/v1/responses", json={"input": QUESTION}).json()
    told = Response.model_validate(body)
    assert told.output
    assert told.text.format.type == "text"


def test_what_is_left_open_is_of_the_model(client: openai.OpenAI) -> None:
    told = client.responses.create(model="tiny-chat", input=QUESTION)
    assert told.temperature is not None
    assert told.top_p is not None


def test_stream(client: openai.OpenAI, answer: dict[str, Any]) -> None:
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    text = answer["choices"][0]["message"]["content"]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == final.output_text == text
    assert [e.type for e in events if not e.type.endswith("text.delta")] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.output == []
    assert events[0].response.usage is None
    ids = {e.item_id for e in events if hasattr(e, "item_id")}
    assert ids == {final.output[0].id}


def test_stream_and_whole_are_alike(served: Served) -> None:
    whole = served.client.post("/v1/responses", json=ASKED).json()
    with served.client.stream("POST", "/v1/responses", json={**ASKED, "stream": True}) as answer:
        lines = list(answer.iter_lines())
    names = [line[len("event: ") :] for line in lines if line.startswith("event: ")]
    datas = [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: ")]
    assert names == [data["type"] for data in datas]
    streamed = datas[-1]["response"]

    def plain(told: dict[str, Any]) -> dict[str, Any]:
        items = [{**item, "id": ""} for item in told["output"]]
        usage = {**told["usage"], "input_tokens_details": None}
        gone = {"id": "", "created_at": 0, "completed_at": 0}
        return {**told, **gone, "output": items, "usage": usage}

    assert plain(streamed) == plain(whole)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, answer: dict[str, Any], stream: bool) -> None:
    asked = {**ASKED, "include": [LOGPROBS], "top_logprobs": 2}
    if stream:
        events = list(client.responses.create(**asked, stream=True))
        deltas = [e for e in events if e.type == "response.output_text.delta"]
        entries = [entry for event in deltas for entry in event.logprobs]
        (done,) = [e for e in events if e.type == "response.output_text.done"]
        assert [e.logprob for e in done.logprobs] == [e.logprob for e in entries]
    else:
        entries = client.responses.create(**asked).output[0].content[0].logprobs
    expected = answer["choices"][0]["logprobs"]["content"]
    assert [e.token for e in entries] == [e["token"] for e in expected]
    assert [e.logprob for e in entries] == pytest.approx([e["logprob"] for e in expected], abs=1e-4)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_cut_off(client: openai.OpenAI) -> None:
    told = client.responses.create(**ASKED, max_output_tokens=2)
    assert (told.status, told.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert told.output[0].status == "incomplete"
    last = list(client.responses.create(**ASKED, max_output_tokens=2, stream=True))[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_instructions_and_items_are_a_conversation(client: openai.OpenAI, served: Served) -> None:
    """As many tokens as the same conversation has in the older protocol."""
    told = client.responses.create(
        **{**ASKED, "max_output_tokens": 1},
        instructions="Be brief.",
    )
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    ]
    assert _num_tokens(client, items) == told.usage.input_tokens
    first = client.responses.create(**ASKED)
    sent_back = [
        {"role": "user", "content": QUESTION},
        *[item.model_dump() for item in first.output],
        {"role": "user", "content": "thank you"},
    ]
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "thank you"},
    ]
    counted = served.client.post("/tokenize", json={"messages": messages}).json()["count"]
    assert _num_tokens(client, sent_back) == counted


def _num_tokens(client: openai.OpenAI, items: list[dict[str, Any]]) -> int:
    told = client.responses.create(model="tiny-chat", input=items, max_output_tokens=1)
    return told.usage.input_tokens


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"previous_response_id": "resp_1"}, "nothing is kept between requests"),
        ({"conversation": "conv_1"}, "nothing is kept between requests"),
        ({"prompt": {"id": "x"}}, "no prompts kept here"),
        ({"store": True}, "store is true"),
        ({"background": True}, "background is true"),
        ({"truncation": "auto"}, "truncation: Input should be 'disabled'"),
        ({"tools": [{"type": "web_search"}]}, "'web_search'"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "'mcp'"),
        ({"top_logprobs": 2}, "nothing would show them"),
        ({"include": ["file_search_call.results"]}, "file_search_call.results"),
        ({"input": []}, "empty list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "send the item itself"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "'web_search_call'"),
        ({"input": [{"role": "owner", "content": "x"}]}, "role is 'owner'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text alone"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "cannot read"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]},
            "no JSON",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"extra_body": {"max_tokens": 3}}, "it is max_output_tokens here"),
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "give both"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
    ],
)
def test_refusals(client: openai.OpenAI, more: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(**{**ASKED, **more})


def test_harmless_fields(client: openai.OpenAI, answer: dict[str, Any]) -> None:
    told = client.responses.create(
        **ASKED,
        store=False,
        background=False,
        truncation="disabled",
        service_tier="auto",
        user="x",
        safety_identifier="x",
        prompt_cache_key="x",
        include=["reasoning.encrypted_content"],
        reasoning={"summary": "auto"},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        parallel_tool_calls=False,
        tool_choice="none",
    )
    assert told.output_text == answer["choices"][0]["message"]["content"]
    assert told.parallel_tool_calls is False


def test_nothing_is_kept(client: openai.OpenAI) -> None:
    name = client.responses.create(**ASKED).id
    for ask in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError, match="keeps none") as told:
            ask(name)
        assert name in told.value.message
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.responses.create(**{**ASKED, "model": "gpt-5"})


def test_async_client(served: Served, answer: dict[str, Any]) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            whole = await client.responses.create(**ASKED)
            stream = await client.responses.create(**ASKED, stream=True)
            pieces = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        return whole.output_text, "".join(pieces)

    text = answer["choices"][0]["message"]["content"]
    assert asyncio.run(ask()) == (text, text)
