"""Routes for operators: is it well, what does it hold, what is it to stop doing."""

import importlib.metadata
from typing import Any

from fastapi import APIRouter, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from ....vmem.errors import UnknownAdapter
from ..http.errors import ApiError
from ..http.streams import json_response
from ..server import Server
from ..tenants import check_may_change
from .fields import HARMLESS, Strict
from .shapes import others
from .shapes.base import described

_SAID: dict[int | str, Any] = {
    200: {"description": "What was done.", "content": {"text/plain": {}}},
}


class AbortRequest(Strict):
    """Requests to be ended: by their names, or all."""

    request_ids: list[str] | None = None
    request_id: str | None = None
    abort_all: bool | None = False


class LoadAdapterRequest(Strict):
    """A LoRA adapter, and what requests will call it."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, description="A folder on the server's machine.")
    load_inplace: bool | None = Field(None, description=HARMLESS)


class UnloadAdapterRequest(Strict):
    """What requests called an adapter."""

    lora_name: str
    lora_int_id: int | None = Field(None, description=HARMLESS)


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["operations"])
    _add_health(routes, server)
    _add_models(routes, server)
    _add_orders(routes, server)
    _add_adapters(routes, server)
    for path in ("/v1/embeddings", "/v1/score", "/score", "/rerank", "/v1/rerank", "/classify"):
        routes.add_api_route(
            path, _no_vectors, methods=["POST"], responses=described(None, 400), status_code=400
        )
    return routes


def _add_health(routes: APIRouter, server: Server) -> None:
    @routes.get("/health", response_model=None, responses=described(others.Status))
    async def health() -> Response:
        """200 while the engine is alive and gets on; 503 while it is dead or stuck."""
        if problem := _problem(server):
            raise ApiError(503, problem, "unhealthy", retry_after_s=5)
        return json_response({"status": "ok"})

    @routes.get("/ready", response_model=None, responses=described(others.Status))
    async def ready() -> Response:
        """200 while requests are taken; 503 while the model loads, or the server shuts down."""
        server.check_ready()
        return json_response({"status": "ready"})

    @routes.get("/metrics", response_class=PlainTextResponse, responses=described(None))
    async def metrics() -> Response:
        """For Prometheus: vLLM's names, and vkv's own."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/version", response_model=None, responses=described(others.Version))
    async def version() -> Response:
        """vkv's version."""
        return json_response({"version": importlib.metadata.version("vkv")})


def _add_models(routes: APIRouter, server: Server) -> None:
    @routes.get("/v1/models", response_model=None, responses=described(others.Models))
    async def models() -> Response:
        """The model under each of its names, those that run beside it, and adapters."""
        adapters = (adapter.name for adapter in server.adapters)
        names = [*server.names, *server.others, *adapters]
        return json_response({"object": "list", "data": [_card(server, n) for n in names]})

    @routes.get(
        "/v1/models/{name:path}",
        response_model=None,
        responses=described(others.Model, 404),
    )
    async def model(name: str) -> Response:
        """The model under one of its names, or an adapter."""
        return json_response(_card(server, server.model_name(name)))

    @routes.get("/v1/load", response_model=None, responses=described(others.Load))
    async def load() -> Response:
        """How much is under way, for balancers."""
        return json_response(_load(server))


def _add_orders(routes: APIRouter, server: Server) -> None:
    """What an operator may have the engine do, and a tenant beside others may not."""
    stays = "it serves all of them: stop it, or have it served to one tenant alone"

    @routes.post("/sleep", response_model=None, responses=described(others.Freed, 400, 403))
    async def sleep(level: int = Query(1, ge=1, le=2)) -> Response:
        """Give memory back: of keys and values (1), and of weights that can be read again (2)."""
        check_may_change(server.options, stays)
        freed = await server.engine.ask("sleep" if level == 1 else "sleep_weights")
        return json_response({"freed_bytes": freed})

    @routes.post("/wake_up", response_model=None, responses=described(others.Status, 403))
    async def wake_up() -> Response:
        """End a sleep."""
        check_may_change(server.options, stays)
        await server.engine.ask("wake")
        return json_response({"status": "awake"})

    @routes.get("/is_sleeping", response_model=None, responses=described(others.Sleeping))
    async def is_sleeping() -> Response:
        """Whether it sleeps."""
        return json_response({"is_sleeping": server.engine.is_asleep})

    @routes.post("/reset_prefix_cache", response_model=None, responses=described(others.Freed, 403))
    async def reset_prefix_cache() -> Response:
        """Forget keys and values of finished requests."""
        check_may_change(server.options, stays)
        return json_response({"freed_bytes": await server.engine.ask("trim")})

    @routes.post(
        "/abort_requests",
        response_model=None,
        responses=described(others.Status, body=True),
    )
    async def abort_requests(asked: AbortRequest, request: Request) -> Response:
        """End requests: their callers get what there is, with the reason "abort". A tenant among
        others ends its own."""
        tenant = server.tenant(request) if server.options.has_tenants else None
        names = [*(asked.request_ids or ()), *filter(None, (asked.request_id,))]
        if bool(names) == bool(asked.abort_all):
            raise ApiError(400, "give either request_ids or abort_all")
        if asked.abort_all:
            server.requests.abort_all(tenant)
        for name in names:
            server.requests.abort(name, tenant)
        return json_response({"status": "ok"})


def _add_adapters(routes: APIRouter, server: Server) -> None:
    """As vLLM has them: adapters come and go while the server runs."""
    given = "adapters are of all of them: give them at the start, by --adapter name=path"

    @routes.post(
        "/v1/load_lora_adapter",
        response_class=Response,
        responses=_SAID | described(None, 400, 403, body=True),
    )
    async def load_lora_adapter(asked: LoadAdapterRequest) -> Response:
        """Have requests use an adapter by naming it as their model."""
        check_may_change(server.options, given)
        if asked.lora_name in (*server.names, *server.others):
            raise ApiError(
                400,
                f"{asked.lora_name!r} is a model's own name; use another",
                "invalid_value",
                "lora_name",
            )
        await server.engine.ask("load_adapter", asked.lora_name, asked.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @routes.post(
        "/v1/unload_lora_adapter",
        response_class=Response,
        responses=_SAID | described(None, 403, 404, body=True),
    )
    async def unload_lora_adapter(asked: UnloadAdapterRequest) -> Response:
        """Take no more requests for an adapter; those under way keep it."""
        check_may_change(server.options, given)
        try:
            await server.engine.ask("unload_adapter", asked.lora_name)
        except UnknownAdapter as error:
            raise ApiError(404, str(error), "adapter_not_found", "lora_name") from error
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


async def _no_vectors() -> Response:
    """Embeddings, scores and classes are not made here."""
    raise ApiError(
        400,
        "this server generates text, and makes no embeddings, scores or classes; use "
        "/v1/completions or /v1/chat/completions",
        "not_supported",
    )


def _problem(server: Server) -> str | None:
    """Why the server is not well; None if it is. A model that still loads is no illness."""
    if server.engine.has_died and not server.engine.is_ready:
        return "the engine's process has died"
    if 0 < server.options.stuck_after < server.engine.stuck_s:
        return f"requests have waited {server.engine.stuck_s:.0f} s without a step"
    return None


def _card(server: Server, name: str) -> dict[str, Any]:
    face = server.face
    folder = next((one.path for one in server.adapters if one.name == name), None)
    is_adapter = folder is not None and name not in server.names
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "vkv",
        "root": folder if is_adapter else face.name,
        "parent": server.names[0] if is_adapter else None,
        "max_model_len": face.admission.max_len,
    }


def _load(server: Server) -> dict[str, Any]:
    stats = server.engine.stats
    if stats is None:  # an engine says what it is before it says what it holds
        raise ApiError(503, "the model is loading; try again", "loading", retry_after_s=2)
    return {
        "server_load": server.admittance.num_requests,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "max_running": server.face.max_seqs,
        "kv_used_bytes": (stats.pages_held - stats.pages_parked) * stats.page_bytes,
        "kv_parked_bytes": stats.pages_parked * stats.page_bytes,
        "kv_limit_bytes": stats.pages_limit * stats.page_bytes,
        "kv_physical_bytes": stats.physical_bytes,
        "kv_virtual_bytes": stats.virtual_bytes,
    }
