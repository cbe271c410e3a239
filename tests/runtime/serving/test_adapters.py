"""Adapters by the names of vLLM's routes: as a request's model, and while the server runs."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import lora
import pytest
import zoo
from served import Served
from vkv import AsyncLLM
from vkv.runtime.serving.local import app_of

_ASKED = {"prompt": "hello there", "temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.save_adapter(tmp_path_factory.mktemp("one"), zoo.tiny_model("llama"), rank=8)


@pytest.fixture
def llm(llama_folder: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(llama_folder, device="cpu", dtype="float32", **zoo.with_defaults({}))
    yield llm
    asyncio.run(llm.close())


async def _text(client: httpx.AsyncClient, model: str) -> str:
    answer = await client.post("/v1/completions", json={**_ASKED, "model": model})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["text"]


def test_adapters_come_and_go(llm: AsyncLLM, adapter: Path) -> None:
    async def visit() -> None:
        transport = httpx.ASGITransport(app=app_of(llm, served_model_name=["base"]))
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
            plain = await _text(client, "base")
            asked = {"lora_name": "mine", "lora_path": str(adapter)}
            loaded = await client.post("/v1/load_lora_adapter", json=asked)
            assert loaded.text == "Success: LoRA adapter 'mine' added successfully."
            base, mine = (await client.get("/v1/models")).json()["data"]
            assert (base["id"], base["parent"]) == ("base", None)
            assert (mine["id"], mine["parent"], mine["root"]) == ("mine", "base", str(adapter))
            card = await client.get("/v1/models/mine")
            assert card.json() == mine
            texts = await asyncio.gather(*(_text(client, n) for n in ("base", "mine", "base")))
            assert texts[0] == texts[2] == plain != texts[1]
            gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
            assert gone.text == "Success: LoRA adapter 'mine' removed successfully."
            refused = await client.post("/v1/completions", json={**_ASKED, "model": "mine"})
            assert refused.status_code == 404
            again = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
            assert again.status_code == 404
            assert "load it first" in again.json()["error"]["message"]

    asyncio.run(visit())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"lora_name": "mine", "lora_path": "/no/such/folder"}, "there is no folder /no/such"),
        ({"lora_name": "base", "lora_path": "/tmp"}, "is a model's own name"),
        ({"lora_name": "mine"}, "lora_path"),
    ],
)
def test_what_cannot_be_loaded_is_a_400(llm: AsyncLLM, asked: dict[str, Any], says: str) -> None:
    async def visit() -> None:
        transport = httpx.ASGITransport(app=app_of(llm, served_model_name=["base"]))
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
            answer = await client.post("/v1/load_lora_adapter", json=asked)
            assert answer.status_code == 400
            assert says in answer.json()["error"]["message"]

    asyncio.run(visit())


def test_one_tenant_does_not_change_what_others_use(
    llm: AsyncLLM, adapter: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first tenant=a\nsecond tenant=b\n")

    async def visit() -> None:
        transport = httpx.ASGITransport(app=app_of(llm, api_key_file=keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
            answer = await client.post(
                "/v1/load_lora_adapter",
                json={"lora_name": "mine", "lora_path": str(adapter)},
                headers={"Authorization": "Bearer first"},
            )
            assert answer.status_code == 403
            assert "--adapter" in answer.json()["error"]["message"]

    asyncio.run(visit())


def test_a_server_begins_with_adapters(llama_folder: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ("--served-model-name", "base", "--adapter", f"mine={adapter}")
    with Served(str(llama_folder), *arguments, log=tmp_path / "log") as server:
        answers = {
            name: server.client.post("/v1/completions", json={**_ASKED, "model": name}).json()
            for name in ("base", "mine")
        }
        base, mine = (answers[name]["choices"][0]["text"] for name in ("base", "mine"))
        assert base != mine
        asked = {"lora_name": "again", "lora_path": str(adapter)}
        assert server.client.post("/v1/load_lora_adapter", json=asked).status_code == 200
        names = [one["id"] for one in server.client.get("/v1/models").json()["data"]]
        assert names == ["base", "mine", "again"]
        said = {
            "model": "again",
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "hello"}],
        }
        assert server.client.post("/v1/messages", json=said).json()["model"] == "again"
        assert server.client.post("/v1/chat/completions", json=said).json()["model"] == "again"
        asked = {"lora_name": "mine"}
        assert server.client.post("/v1/unload_lora_adapter", json=asked).status_code == 200
        refused = server.client.post("/v1/completions", json={**_ASKED, "model": "mine"})
        assert refused.status_code == 404
        assert "'again'" in refused.json()["error"]["message"]
        assert "Traceback" not in server.log(), server.log()
