"""Routes for the operators of several instances: what there are, drain one, have more or fewer."""

import dataclasses
from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field

from ...engine.stats import EngineStats
from ..cluster_engine import ClusterEngine
from ..http.errors import ApiError
from ..http.streams import json_response
from ..options import ServeOptions
from ..tenants import check_may_change
from .fields import Strict
from .shapes import others
from .shapes.base import described


class Drain(Strict):
    """An instance that is to end once it has handed over what it has."""

    instance: int


class Scale(Strict):
    """How many instances there are to be."""

    instances: int = Field(ge=1, le=1024)


def cluster_router(engine: ClusterEngine, options: ServeOptions) -> APIRouter:
    """The routes."""
    stays = "its instances serve all of them: end one with SIGTERM, or give max_instances"
    routes = APIRouter(tags=["cluster"])

    @routes.get("/cluster", response_model=None, responses=described(others.ClusterState))
    async def state() -> Response:
        """The instances, and how many sequences have moved between them."""
        return json_response(await _state(engine))

    @routes.post(
        "/cluster/drain",
        response_model=None,
        responses=described(others.ClusterState, 400, 403, body=True),
    )
    async def drain(asked: Drain) -> Response:
        """Move everything away from an instance and end it; answered once that is done."""
        check_may_change(options, stays)
        there = [member.id for member in engine.members]
        if asked.instance not in there:
            known = ", ".join(map(str, there))
            raise ApiError(400, f"instance {asked.instance} is not there; there are: {known}")
        await engine.drain(asked.instance)
        return json_response(await _state(engine))

    @routes.post(
        "/cluster/scale",
        response_model=None,
        responses=described(others.ClusterState, 400, 403, body=True),
    )
    async def scale(asked: Scale) -> Response:
        """Start instances, or drain some; answered once that is done."""
        check_may_change(options, stays)
        await engine.scale(asked.instances)
        return json_response(await _state(engine))

    return routes


async def _state(engine: ClusterEngine) -> dict[str, Any]:
    stats = await engine.cluster_stats()
    return {
        "num_migrations": stats.num_migrations,
        "num_stayed": stats.num_stayed,
        "num_recomputed": stats.num_recomputed,
        "num_under_way": len(stats.moves),
        "num_bytes_copied": stats.num_bytes_copied,
        "num_pages_moved": stats.num_pages_moved,
        "num_died": stats.done.num_died,
        "num_drained": stats.done.num_drained,
        "num_loans_called_back": stats.done.num_called_back,
        "num_loans_lost": stats.done.num_lost,
        "instances": [
            {
                "id": member.id,
                "role": member.role,
                "pid": member.pid,
                "node": member.node,
                "state": member.state,
                "is_draining": member.is_draining,
                "num_sequences": sum(owner == member.id for owner in stats.requests.values()),
                "carried_bytes": member.carried_bytes,
                "handed_pages": member.handed_pages,
                "lent_tokens": sum(
                    one.num_tokens for one in stats.loans if one.creditor == member.id
                ),
                "borrowed_tokens": sum(
                    one.num_tokens for one in stats.loans if one.debtor == member.id
                ),
                **_of_engine(member.stats),
            }
            for member in stats.instances
        ],
        "loans": [dataclasses.asdict(one) for one in stats.loans if one.num_loans],
    }


def _of_engine(stats: EngineStats | None) -> dict[str, int]:
    if stats is None:
        return dict.fromkeys(("running", "waiting", "kv_used_bytes", "kv_limit_bytes"), 0)
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "kv_used_bytes": (stats.pages_held - stats.pages_parked) * stats.page_bytes,
        "kv_limit_bytes": stats.pages_limit * stats.page_bytes,
    }
