"""Requests that run for one HTTP request, and what they bring."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ..frontend.async_requests import AsyncRequests
from ..frontend.text_stream import RequestText, StreamDelta
from .metrics import Metrics

Delta = tuple[int, StreamDelta]
"""Which of the requests, and what it got."""


async def deltas(
    requests: AsyncRequests, metrics: Metrics, texts: Sequence[RequestText], name: str
) -> AsyncGenerator[list[Delta]]:
    """What several requests under one name bring, as it comes; to its end.

    Leaving it drops all of them. Raises what one of them raises.
    """
    if len(texts) == 1:
        async with aclosing(_one(requests, metrics, 0, texts[0], name)) as bits:
            async for some in bits:
                yield some
        return
    queue: asyncio.Queue[list[Delta] | asyncio.Task[None]] = asyncio.Queue()
    feeders = [
        asyncio.ensure_future(_feed(queue, _one(requests, metrics, number, text, name)))
        for number, text in enumerate(texts)
    ]
    for feeder in feeders:
        feeder.add_done_callback(queue.put_nowait)
    try:
        num_open = len(feeders)
        while num_open:
            some = await queue.get()
            if isinstance(some, asyncio.Task):
                some.result()
                num_open -= 1
            else:
                yield some
    finally:
        for feeder in feeders:
            feeder.cancel()
        await asyncio.gather(*feeders, return_exceptions=True)


async def _one(
    requests: AsyncRequests, metrics: Metrics, number: int, text: RequestText, name: str
) -> AsyncGenerator[list[Delta]]:
    came_s: dict[int, float] = {}  # when each output's last tokens came
    try:
        async with aclosing(requests.run(text, name)) as arrivals:
            async for _ in arrivals:
                some = text.take_deltas()
                for delta in some:
                    _note(metrics, came_s, delta, text.last_token_s)
                if some:
                    yield [(number, delta) for delta in some]
    finally:
        metrics.ended(text)


def _note(
    metrics: Metrics, came_s: dict[int, float], delta: StreamDelta, now_s: float | None
) -> None:
    if not delta.token_ids or now_s is None:
        return
    if delta.index in came_s:
        metrics.token((now_s - came_s[delta.index]) / len(delta.token_ids))
    came_s[delta.index] = now_s


async def _feed(
    queue: "asyncio.Queue[list[Delta] | asyncio.Task[None]]", bits: AsyncGenerator[list[Delta]]
) -> None:
    async with aclosing(bits):
        async for some in bits:
            queue.put_nowait(some)
