"""The page of memory on a server of its own, in a thread, and a chat that takes some."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vkv import AsyncLLM, SamplingParams
from vkv.runtime.serving.page import MapSource, page_router

MODEL = "tiny-chat"
KEY = "sesame"
T = TypeVar("T")


def page_app(source: MapSource, llm: AsyncLLM | None, *, needs_key: bool = False) -> FastAPI:
    """The page, its stream, and as much of OpenAI's API as the chat beside it asks for."""
    app = FastAPI()
    app.include_router(page_router(source, keep_alive_s=0.3))
    app.include_router(_api(llm))

    @app.middleware("http")
    async def check_key(request: Request, call_next: Callable[[Request], Any]) -> Any:
        shown = request.headers.get("authorization")
        if needs_key and request.url.path != "/" and shown != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "no API key was shown"}}, 401)
        return await call_next(request)

    return app


def _api(llm: AsyncLLM | None) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat(body: dict[str, Any]) -> JSONResponse | StreamingResponse:
        text = body["messages"][-1]["content"]
        if llm is None or text == "refuse":
            return JSONResponse({"error": {"message": "refused: <b>as asked</b>"}}, 400)
        return StreamingResponse(_answer(llm, body), media_type="text/event-stream")

    return routes


async def _answer(llm: AsyncLLM, body: dict[str, Any]) -> AsyncIterator[str]:
    params = SamplingParams(temperature=0, max_tokens=body["max_tokens"], ignore_eos=True)
    if body["messages"][-1]["content"] == "think":
        yield _chunk({"reasoning": "first <i>this</i>"})
    told, output = "", None
    async for output in llm.generate(body["messages"], params):
        text = output.outputs[0].text
        yield _chunk({"content": text[len(told) :]})
        told = text
    assert output is not None
    assert output.prompt_token_ids is not None
    counts = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    yield _chunk({}, "length")
    usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1]}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


def _chunk(delta: dict[str, str], reason: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': reason}]})}\n\n"


def run_elsewhere(work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to, on another thread: a browser's event loop has this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


@contextlib.contextmanager
def served(app: FastAPI, port: int = 0) -> Iterator[str]:
    """The address at which a thread serves `app`."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        app, ws="none", lifespan="off", log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
