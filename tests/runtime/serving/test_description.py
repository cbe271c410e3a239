"""The server is as /openapi.json says: any request has an answer of a kind that stands there."""

import asyncio
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from served import Served
from vkv.runtime.link.remote import RemoteEngine
from vkv.runtime.serving.http.app import build_app
from vkv.runtime.serving.options import ServeOptions
from vkv.runtime.serving.server import Server

CONVERSATION = [{"role": "user", "content": "What is 3 + 4?"}]
FEW = 24  # tokens, so that no example takes long
LEFT_OUT = (  # what other tests rely on, and what has no end
    "/sleep",
    "/wake_up",
    "/abort_requests",
    "/reset_prefix_cache",
    "/memory/stream",
)
UNKNOWN = (  # no random name is the model's, nor an adapter's or its folder
    "/v1/models/{name}",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)
CHECKS = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
}


def _description() -> dict[str, Any]:
    """What a server says of itself, which needs no model."""

    async def ask() -> dict[str, Any]:
        app = build_app(Server(ServeOptions(), RemoteEngine("nowhere")))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return (await client.get("http://here/openapi.json")).json()

    return asyncio.run(ask())


DESCRIPTION = _description()
OPERATIONS = [
    (path, method)
    for path, methods in DESCRIPTION["paths"].items()
    for method in methods
    if path not in LEFT_OUT
]


@pytest.fixture(scope="module")
def schema() -> Any:
    schema = schemathesis.openapi.from_dict(DESCRIPTION)
    schema.config.generation.update(allow_x00=False)
    return schema


def test_the_server_says_it(served: Served) -> None:
    assert served.client.get("/openapi.json").json() == DESCRIPTION


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_any_request(
    schema: Any, served: Served, path: str, method: str, mode: GenerationMode
) -> None:
    """Of values that fit the description, and of ones that do not."""
    operation = schema[path][method.upper()]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing of it can be wrong")

    @settings(
        max_examples=40 if operation.body else 5,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), plain=st.booleans())
    def ask(case: Case, plain: bool) -> None:
        if mode is GenerationMode.POSITIVE:
            _make_sense(case, plain)
        response = case.call(base_url=served.url, timeout=60)
        case.validate_response(response, checks=_checks())
        seen.add(response.status_code)

    seen: set[int] = set()
    ask()
    if mode is GenerationMode.NEGATIVE:
        assert 400 in seen
    elif "200" in DESCRIPTION["paths"][path][method]["responses"] and path not in UNKNOWN:
        assert 200 in seen, seen  # else nothing behind the first check was tried


def _checks() -> list[Any]:
    return [c for c in schemathesis.checks.CHECKS.get_all() if c.__name__ in CHECKS]


def _make_sense(case: Case, plain: bool) -> None:
    """Ask for few tokens; where `plain`, of a conversation, so that the rest of it matters."""
    body = case.body
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], FEW)
    if plain and "messages" in body:
        body["messages"] = CONVERSATION
    if plain and "model" in body:
        body["model"] = None
