"""The same server over an `AsyncLLM`, in one process."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from vkv import AsyncLLM
from vkv.runtime.serving.local import app_of

CHAT = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(device="cpu")
    yield llm
    asyncio.run(llm.close())


def test_routes(llm: AsyncLLM) -> None:
    async def visit() -> None:
        app = app_of(llm, served_model_name=["mine"])
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
            for path in ("/health", "/ready", "/version", "/v1/load", "/metrics", "/openapi.json"):
                assert (await client.get(path)).status_code == 200, path
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "mine"
            answers = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=CHAT) for _ in range(4))
            )
            contents = {a.json()["choices"][0]["message"]["content"] for a in answers}
            assert len(contents) == 1
            streamed = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
            assert (await client.post("/sleep")).status_code == 200
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
            assert (await client.post("/wake_up")).status_code == 200
            assert (await client.post("/reset_prefix_cache")).json()["freed_bytes"] >= 0

    asyncio.run(visit())
