"""What a request asks for is done, or refused by name: nothing is taken and left."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from vkv import AsyncLLM
from vkv.runtime.serving.local import app_of
from vkv.runtime.serving.protocols import chat
from vkv.runtime.serving.server import Server

TEMPLATE = Path(__file__).parents[2] / "support" / "tool_template.jinja"
SAID = [{"role": "user", "content": "What is 3 + 4?"}]
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
TWO_CALLS = {"choice": [CALL + CALL]}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}
PLAIN: dict[str, Any] = {"temperature": 0, "max_tokens": 2}


@asynccontextmanager
async def _client(max_seqs: int = 4, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server in this process, of the built-in model."""
    async with AsyncLLM(device="cpu", max_seqs=max_seqs) as llm:
        app = app_of(llm, chat_template=TEMPLATE, tool_call_parser="hermes", **options)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://local", timeout=60
        ) as client:
            yield client


def _visit(work: Callable[[httpx.AsyncClient], Awaitable[None]], **options: Any) -> None:
    async def visit() -> None:
        async with _client(**options) as client:
            await work(client)

    asyncio.run(visit())


def _chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(one) for one in data]


def test_a_null_asks_for_nothing() -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        body = {"messages": SAID, **PLAIN}
        path = "/v1/chat/completions"
        nulls = {"functions": None, "guided_json": None, "stream_options": None}
        plain, with_nulls = [
            (await client.post(path, json=asked)).json() for asked in (body, {**body, **nulls})
        ]
        assert with_nulls["choices"] == plain["choices"]
        nested = {"stream": True, "stream_options": {"include_usage": True, "unknown": None}}
        assert _chunks(await client.post(path, json={**body, **nested}))[-1]["usage"]
        assert (await client.post(path, json={**body, "functions": []})).status_code == 400

    _visit(ask)


def test_what_would_do_nothing_is_refused() -> None:
    wrong = (
        ("/v1/chat/completions", {"messages": SAID, "max_completion_tokens": 0}, "max_tokens"),
        *(
            (path, {**body, **PLAIN, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs")
            for path, body in (
                ("/v1/chat/completions", {"messages": SAID}),
                ("/v1/completions", {"prompt": "hello"}),
            )
        ),
    )

    async def work(client: httpx.AsyncClient) -> None:
        for path, body, says in wrong:
            answer = await client.post(path, json=body)
            assert answer.status_code == 400, (body, answer.text)
            assert says in answer.json()["error"]["message"]

    _visit(work)


def test_what_a_response_cannot_tell_of_its_request_is_refused() -> None:
    wrong: dict[str, Any] = {"user": "\ud800", "metadata": {"a": "\ud800"}}

    async def work(client: httpx.AsyncClient) -> None:
        headers = {"content-type": "application/json"}
        for name, value in wrong.items():
            for stream in (False, True):
                body = json.dumps({"input": "a", name: value, "stream": stream})
                answer = await client.post("/v1/responses", content=body, headers=headers)
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["param"] == name

    _visit(work)


def test_a_body_of_another_type_is_told_which_it_is_to_be() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
            answer = await client.post(
                "/v1/completions", content=b'{"prompt": "a"}', headers=headers
            )
            assert answer.status_code == 400
            assert "content-type: application/json" in answer.json()["error"]["message"]

    _visit(work)


def test_all_log_probabilities() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        numbers = {}
        for top in (-1, 3):
            body = {"messages": SAID, **PLAIN, "logprobs": True, "top_logprobs": top}
            told = (await client.post("/v1/chat/completions", json=body)).json()
            numbers[top] = {
                len(t["top_logprobs"]) for t in told["choices"][0]["logprobs"]["content"]
            }
        body = {"prompt": "a", **PLAIN, "logprobs": 10**9}
        refused = (await client.post("/v1/completions", json=body)).json()["error"]["message"]
        assert numbers[3] == {3}
        (number,) = numbers[-1]
        assert f"at most the vocabulary's {number}" in refused

    _visit(work, max_logprobs=-1)


def test_no_more_log_probabilities_than_the_server_allows() -> None:
    chat, plain = "/v1/chat/completions", "/v1/completions"
    asked: tuple[tuple[str, dict[str, Any]], ...] = (
        (chat, {"messages": SAID, "logprobs": True, "top_logprobs": 21}),
        (chat, {"messages": SAID, "prompt_logprobs": 21}),
        (plain, {"prompt": "a", "logprobs": -1}),
        (plain, {"prompt": "a", "logprobs": 21, "echo": True}),
    )

    async def work(client: httpx.AsyncClient) -> None:
        for path, body in asked:
            refused = await client.post(path, json={**body, **PLAIN})
            assert refused.status_code == 400, body
            assert "--max-logprobs" in refused.json()["error"]["message"]
        most = {"messages": SAID, "logprobs": True, "top_logprobs": 20}
        assert (await client.post(chat, json={**most, **PLAIN})).status_code == 200

    _visit(work)


def test_token_ids_of_a_stream() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {"messages": SAID, **PLAIN, "return_token_ids": True}
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        answer = await client.post("/v1/chat/completions", json={**body, "stream": True})
        first, *others = _chunks(answer)
        assert first["prompt_token_ids"] == whole["prompt_token_ids"]
        assert not any("prompt_token_ids" in other for other in others)
        body = {"prompt": "hello", "max_tokens": 0, "echo": True, "return_token_ids": True}
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        (told,) = _chunks(await client.post("/v1/completions", json={**body, "stream": True}))
        for name in ("text", "token_ids", "prompt_token_ids", "finish_reason", "stop_reason"):
            assert told["choices"][0][name] == whole[name], name

    _visit(work)


@pytest.mark.parametrize(("parallel", "count"), [(None, 2), (True, 2), (False, 1)])
def test_calls_beside_each_other(parallel: bool | None, count: int) -> None:
    """One that is told not to may write several all the same."""

    async def work(client: httpx.AsyncClient) -> None:
        body = {"messages": SAID, "tools": [{"type": "function", "function": NOW}]}
        body |= {"structured_outputs": TWO_CALLS, "max_tokens": 200}
        if parallel is not None:
            body["parallel_tool_calls"] = parallel
        told = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert len(told["message"]["tool_calls"]) == count
        assert told["finish_reason"] == "tool_calls"
        chunks = _chunks(await client.post("/v1/chat/completions", json={**body, "stream": True}))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        calls = {call["index"] for delta in deltas for call in delta.get("tool_calls", ())}
        assert calls == set(range(count))
        assert not any(delta.get("content") for delta in deltas)

    _visit(work)


def test_a_model_that_never_thinks_may_be_told_not_to() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {"messages": SAID, **PLAIN}
        plain = (await client.post("/v1/messages", json=body)).json()
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            asked = {"messages": SAID} if path.endswith("tokens") else body
            for kind, status in (("disabled", 200), ("enabled", 400)):
                told = await client.post(path, json={**asked, "thinking": {"type": kind}})
                assert told.status_code == status, told.text
                if status == 200 and path == "/v1/messages":
                    assert told.json()["content"] == plain["content"]

    _visit(work)


def test_how_long_a_conversation_is_counts_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait for no long one to be read."""
    arguments = '{"text": "' + "a" * 30_000 + '"}'
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    body = {"messages": [*SAID, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    lengths = []
    prepare = Server.prepare

    async def noted(server: Server, make: Any, num_characters: int, **more: Any) -> Any:
        lengths.append(num_characters)
        return await prepare(server, make, num_characters, **more)

    monkeypatch.setattr(Server, "prepare", noted)

    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/v1/chat/completions", json=body)
        assert lengths[0] >= len(arguments)

    _visit(work)


def test_tokens_of_a_conversation_that_is_too_long_are_counted() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {"messages": [{"role": "user", "content": "hello " * 3000}]}
        counted = await client.post("/v1/messages/count_tokens", json=body)
        assert counted.status_code == 200, counted.text
        refused = await client.post("/v1/chat/completions", json=body)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        tokenized = (await client.post("/tokenize", json=body)).json()
        assert counted.json() == {"input_tokens": tokenized["count"]}
        assert tokenized["count"] > tokenized["max_model_len"]

    _visit(work)


async def _aborted_in_line(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], name: str
) -> httpx.Response:
    """What a request is answered that is aborted while another has the only slot."""
    long = {"prompt": "hello", "max_tokens": 1900, "ignore_eos": True}
    running = asyncio.ensure_future(client.post("/v1/completions", json=long))
    while not (await client.get("/v1/load")).json()["running"]:
        await asyncio.sleep(0.01)
    headers = {"x-request-id": "mine"}
    waiting = asyncio.ensure_future(client.post(path, json=body, headers=headers))
    while (await client.get("/v1/load")).json()["server_load"] < 2:
        await asyncio.sleep(0.01)
    await client.post("/abort_requests", json={"request_id": name})
    answer = await waiting
    await client.post("/abort_requests", json={"abort_all": True})
    await running
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_that_is_aborted_in_the_line(stream: bool) -> None:
    """Nothing is known of its prompt then."""
    echo = {"prompt": "hello", "echo": True, "logprobs": 1, "stream": stream}

    async def work(client: httpx.AsyncClient) -> None:
        answer = await _aborted_in_line(client, "/v1/completions", echo, "cmpl-mine")
        told = _chunks(answer)[0] if stream else answer.json()
        assert told["choices"][0]["finish_reason"] == "abort"
        assert told["choices"][0]["text"] == "hello"
        assert told["choices"][0]["logprobs"]["tokens"] == []

    _visit(work, max_seqs=1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_that_is_aborted_has_not_ended_its_turn(stream: bool) -> None:
    body = {"messages": SAID, "max_tokens": 9, "stream": stream}

    async def work(client: httpx.AsyncClient) -> None:
        answer = await _aborted_in_line(client, "/v1/messages", body, "msg_mine")
        assert '"stop_reason":"max_tokens"' in answer.text
        assert '"output_tokens":0' in answer.text

    _visit(work, max_seqs=1)


def test_what_nobody_thought_of_is_told_in_the_protocols_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(chat, "usage", fail)

    async def work(client: httpx.AsyncClient) -> None:
        body = {"messages": SAID, **PLAIN}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.headers["x-request-id"]
        answer = await client.post("/v1/messages", json=body)
        assert (answer.status_code, answer.json()["type"]) == (500, "error")

    _visit(work)
