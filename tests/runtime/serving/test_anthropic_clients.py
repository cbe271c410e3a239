"""Anthropic's own client, unchanged, against the server."""

import asyncio

import anthropic
import pytest
from served import Served

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(scope="module")
def client(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def answer(served: Served) -> str:
    """What OpenAI's protocol answers."""
    told = served.client.post(
        "/v1/chat/completions", json={"messages": QUESTION, "temperature": 0}
    ).json()
    return told["choices"][0]["message"]["content"]


def test_messages(client: anthropic.Anthropic, answer: str) -> None:
    told = client.messages.create(
        model="tiny-chat", messages=QUESTION, max_tokens=32, extra_body={"temperature": 0}
    )
    assert [(block.type, block.text) for block in told.content] == [("text", answer)]
    assert (told.role, told.stop_reason, told.stop_sequence) == ("assistant", "end_turn", None)
    assert told.usage.output_tokens > 1
    assert told.usage.input_tokens + told.usage.cache_read_input_tokens > 1


def test_stream(client: anthropic.Anthropic, answer: str) -> None:
    names, text = [], ""
    with client.messages.stream(
        model="tiny-chat", messages=QUESTION, max_tokens=32, extra_body={"temperature": 0}
    ) as stream:
        for event in stream:
            names.append(event.type)
            if event.type == "content_block_delta":
                text += event.delta.text
        whole = stream.get_final_message()
    assert text == answer == whole.content[0].text
    assert whole.stop_reason == "end_turn"
    wire = [name for name in names if name not in ("text", "content_block_delta")]
    assert wire == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_ends(client: anthropic.Anthropic) -> None:
    asked = {"model": "tiny-chat", "messages": QUESTION, "extra_body": {"temperature": 0}}
    assert client.messages.create(**asked, max_tokens=2).stop_reason == "max_tokens"
    told = client.messages.create(**asked, max_tokens=32, stop_sequences=["="])
    assert (told.stop_reason, told.stop_sequence) == ("stop_sequence", "=")


def test_count_tokens(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tiny-chat", messages=QUESTION)
    told = client.messages.create(model="tiny-chat", messages=QUESTION, max_tokens=1)
    usage = told.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_system_and_blocks_are_text(client: anthropic.Anthropic) -> None:
    plain = client.messages.count_tokens(model="tiny-chat", system="Be brief.", messages=QUESTION)
    blocks = client.messages.count_tokens(
        model="tiny-chat",
        system=[{"type": "text", "text": "Be brief."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "What is 3 + 4?"}]}],
    )
    assert blocks == plain


def test_a_system_message_within_the_conversation(client: anthropic.Anthropic) -> None:
    """As coding agents send it."""
    within = [{"role": "system", "content": "Be brief."}, *QUESTION]
    before = client.messages.count_tokens(model="tiny-chat", system="Be brief.", messages=QUESTION)
    assert client.messages.count_tokens(model="tiny-chat", messages=within) == before


def test_refusals(client: anthropic.Anthropic, served: Served) -> None:
    image = [{"type": "image", "source": {"type": "url", "url": "x"}}]
    for more, words in (
        ({"messages": [{"role": "user", "content": image}]}, "'image' is not understood"),
        ({"messages": [{"role": "owner", "content": "x"}]}, "role is 'owner'"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"extra_body": {"container": "x"}}, "runs no code"),
    ):
        asked = {"model": "tiny-chat", "messages": QUESTION, "max_tokens": 4, **more}
        with pytest.raises(anthropic.BadRequestError, match=words) as told:
            client.messages.create(**asked)
        assert told.value.body["type"] == "error"
        assert told.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="no model"):
        client.messages.create(model="claude", messages=QUESTION, max_tokens=4)


def test_async_client(served: Served, answer: str) -> None:
    async def ask() -> str:
        client = anthropic.AsyncAnthropic(base_url=served.url, api_key="none")
        asked = {"model": "tiny-chat", "messages": QUESTION, "max_tokens": 32}
        async with client, client.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == answer
