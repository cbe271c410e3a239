"""Callers whose keys are of several tenants: what one computes, runs or owns is not another's."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import zoo
from vkv import AsyncLLM
from vkv.runtime.serving.http.errors import ApiError
from vkv.runtime.serving.local import app_of
from vkv.runtime.serving.options import ServeOptions
from vkv.runtime.serving.protocols.cluster import Drain, Scale, cluster_router

_PROMPT = "my gate code is four eight two one, and tell nobody of it " * 2


@pytest.fixture
def llm(llama_folder: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(llama_folder, device="cpu", dtype="float32", **zoo.with_defaults({}))
    yield llm
    asyncio.run(llm.close())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("first tenant=ann\nsecond tenant=bob\nthird tenant=ann\n")
    return path


class _Callers:
    """Three keys of two tenants."""

    def __init__(self, llm: AsyncLLM, **options: Any) -> None:
        transport = httpx.ASGITransport(app=app_of(llm, **options))
        self._client = httpx.AsyncClient(transport=transport, base_url="http://local")

    async def post(self, key: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return await self._client.post(path, json=body, headers=headers)

    async def num_found(self, key: str, path: str, **more: Any) -> int:
        """Prompt tokens that were not computed again."""
        said = {"messages": [{"role": "user", "content": _PROMPT}]}
        asked = {"prompt": _PROMPT} if path == "/v1/completions" else said
        body = {**asked, "max_tokens": 2, "temperature": 0, **more}
        answer = await self.post(key, path, body)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return usage.get("cache_read_input_tokens") or details.get("cached_tokens") or 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_equal_prompts_share_no_prefix_across_tenants(llm: AsyncLLM, keys: Path, path: str) -> None:
    async def visit() -> None:
        callers = _Callers(llm, api_key_file=keys)
        assert await callers.num_found("first", path) == 0
        assert await callers.num_found("second", path) == 0
        assert await callers.num_found("third", path) > 0
        assert await callers.num_found("second", path) > 0
        if path != "/v1/messages":
            for salt in ("3 ann ", "ann", "x"):
                assert await callers.num_found("second", path, cache_salt=salt) == 0

    asyncio.run(visit())


def test_tenants_may_share_prefixes_where_they_are_told_to(llm: AsyncLLM, keys: Path) -> None:
    async def visit() -> None:
        callers = _Callers(llm, api_key_file=keys, tenants_share_prefixes=True)
        assert await callers.num_found("first", "/v1/completions") == 0
        assert await callers.num_found("second", "/v1/completions") > 0
        assert await callers.num_found("second", "/v1/completions", cache_salt="x") == 0

    asyncio.run(visit())


def test_a_tenant_ends_its_own_requests_alone(
    llm: AsyncLLM, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though both call them by one name."""
    runner = llm.engine.runner
    launch = runner.launch

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.01)
        return launch(*args, **options)

    monkeypatch.setattr(runner, "launch", slow)
    long = {"prompt": "once", "max_tokens": 150, "ignore_eos": True, "request_id": "mine"}

    async def visit() -> None:
        callers = _Callers(llm, api_key_file=keys)
        theirs = asyncio.ensure_future(callers.post("first", "/v1/completions", long))
        ours = asyncio.ensure_future(callers.post("second", "/v1/completions", long))
        while llm.stats().num_running < 2:
            await asyncio.sleep(0.01)
        told = await callers.post("second", "/abort_requests", {"request_ids": ["cmpl-mine"]})
        assert told.status_code == 200
        assert (await ours).json()["choices"][0]["finish_reason"] == "abort"
        await callers.post("second", "/abort_requests", {"abort_all": True})
        assert not theirs.done()
        await callers.post("third", "/abort_requests", {"abort_all": True})
        assert (await theirs).json()["choices"][0]["finish_reason"] == "abort"

    asyncio.run(visit())


def test_what_all_would_feel_is_for_nobody(llm: AsyncLLM, keys: Path) -> None:
    async def visit() -> None:
        callers = _Callers(llm, api_key_file=keys)
        for path in ("/sleep", "/wake_up", "/reset_prefix_cache"):
            answer = await callers.post("first", path)
            assert answer.status_code == 403, path
            assert "several tenants" in answer.json()["error"]["message"]
        assert await callers.num_found("first", "/v1/completions") == 0

    asyncio.run(visit())


def test_instances_are_for_no_tenant_to_end(keys: Path) -> None:
    options = ServeOptions(api_key_file=keys)
    routes = cluster_router(cast(Any, None), options).routes
    orders = {route.path: route.endpoint for route in routes if "POST" in route.methods}  # type: ignore[attr-defined]
    for path, asked in (
        ("/cluster/drain", Drain(instance=0)),
        ("/cluster/scale", Scale(instances=1)),
    ):
        with pytest.raises(ApiError, match="several tenants"):
            asyncio.run(orders[path](asked))
