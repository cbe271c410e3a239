"""How streams of events begin and end."""

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest
from vkv.runtime.serving.http.errors import ApiError
from vkv.runtime.serving.http.streams import DONE, EventStream, event, last_words
from vkv.vmem.errors import EngineDied, InvalidPrompt

FIRST = event({"first": 1})


def sent(events: AsyncGenerator[bytes], keep_alive_s: float = 10) -> list[MutableMapping[str, Any]]:
    """What an ASGI server is told."""
    told: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        told.append(message)

    stream = EventStream(events, last_words, keep_alive_s=keep_alive_s)
    asyncio.run(stream({}, receive, send))
    return told


async def fails(error: Exception, *before: bytes) -> AsyncGenerator[bytes]:
    for chunk in before:
        yield chunk
    raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EngineDied("it is gone"), b"it is gone"),
        (ApiError(400, "it is wrong"), b"it is wrong"),
        (RuntimeError("a secret of ours"), b"the server failed"),
    ],
)
def test_an_error_within_a_stream_is_told_and_the_stream_has_its_end(
    error: Exception, words: bytes
) -> None:
    start, *bodies = sent(fails(error, FIRST))
    assert start["status"] == 200
    chunks = [body["body"] for body in bodies]
    assert chunks[0] == FIRST
    assert words in chunks[1]
    assert b"secret" not in chunks[1]
    assert chunks[1].endswith(DONE)
    assert bodies[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("error", "raised"),
    [(InvalidPrompt("it is wrong"), ApiError), (RuntimeError("ours"), RuntimeError)],
)
def test_an_error_before_a_stream_has_a_status_of_its_own(
    error: Exception, raised: type[Exception]
) -> None:
    with pytest.raises(raised):
        sent(fails(error))


def test_comments_where_nothing_comes() -> None:
    async def waits() -> AsyncGenerator[bytes]:
        await asyncio.sleep(0.2)
        yield FIRST

    chunks = [message["body"] for message in sent(waits(), 0.02)[1:]]
    assert chunks[0].startswith(b":")
    assert chunks[-2:] == [FIRST, b""]
    assert [message["body"] for message in sent(waits(), 0)[1:]] == [FIRST, b""]  # 0 for none
