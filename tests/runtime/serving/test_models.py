"""A zoo served: all of its models are listed, and a request names the one that it is for."""

import asyncio
from pathlib import Path
from typing import Any

import chains
import httpx
import pytest
import zoo
from served import Served
from tokenizers import normalizers
from transformers import GenerationConfig
from vkv import AsyncLLM
from vkv.runtime.blocks.zoo import BlockZoo
from vkv.runtime.serving.local import app_of

_ASKED = {"prompt": "hello there", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
_PARTS = {"early": ("layers.0.self_attn",), "late": ("layers.1.mlp", "lm_head")}
_BEHIND = {"late": "<think>"}  # its template opens the reasoning of an answer


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> BlockZoo:
    home = tmp_path_factory.mktemp("tenants")
    family = chains.save_family(home, "llama", _PARTS)
    for name, folder in family.items():
        tokenizer = zoo.letter_tokenizer()
        template = f"{name}:" + "{{ messages[-1]['content'] }}"
        if name in _BEHIND:
            template += "{# </think> #}" + _BEHIND[name]
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    (family["late"] / "generation_config.json").write_text('{"max_new_tokens": 3}')
    return chains.make_zoo(home, family)


@pytest.fixture(scope="module")
def texts(tenants: BlockZoo) -> dict[str, str]:
    """What each model says alone."""

    async def say(name: str) -> str:
        folder = tenants.chain(name).folder
        async with AsyncLLM(folder, **zoo.with_defaults({})) as llm:
            async for out in llm.generate("hello there", zoo.greedy(8)):
                text = out.outputs[0].text
            return text

    return {name: asyncio.run(say(name)) for name in tenants.models}


def test_a_zoo_in_one_process(tenants: BlockZoo, texts: dict[str, str]) -> None:
    async def visit() -> None:
        async with AsyncLLM(tenants, model="base", **zoo.with_defaults({})) as llm:
            transport = httpx.ASGITransport(app=app_of(llm))
            async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
                listed = (await client.get("/v1/models")).json()["data"]
                assert [one["id"] for one in listed] == ["base", "early", "late"]
                names = [*texts] * 2
                asked = [client.post("/v1/completions", json={**_ASKED, "model": n}) for n in names]
                for name, answer in zip(names, await asyncio.gather(*asked), strict=True):
                    assert answer.json()["model"] == name
                    assert answer.json()["choices"][0]["text"] == texts[name]
                plain = await client.post("/v1/completions", json=_ASKED)
                assert plain.json()["model"] == "base"
                assert plain.json()["choices"][0]["text"] == texts["base"]
                said_hi = {"messages": [{"role": "user", "content": "hi"}]}
                said = {**said_hi, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
                for name in texts:  # each by its own template
                    num_tokens = len(f"{name}:hi{_BEHIND.get(name, '')}")
                    answer = await client.post("/v1/chat/completions", json={**said, "model": name})
                    assert answer.json()["usage"]["prompt_tokens"] == num_tokens
                    message = answer.json()["choices"][0]["message"]
                    assert bool(message["content"]) == (name not in _BEHIND)
                    assert bool(message.get("reasoning")) == (name in _BEHIND)
                    counted = await client.post("/tokenize", json={**said_hi, "model": name})
                    assert counted.json()["count"] == num_tokens
                    freely = {"prompt": "hello", "ignore_eos": True, "model": name}
                    answer = await client.post("/v1/completions", json=freely)
                    most = 3 if name == "late" else 16  # as its generation config says
                    assert answer.json()["usage"]["completion_tokens"] == most
                for name in texts:  # which an adapter of that name could not be asked by
                    asked_to_load = {"lora_name": name, "lora_path": "anywhere"}
                    answer = await client.post("/v1/load_lora_adapter", json=asked_to_load)
                    assert answer.status_code == 400
                    assert "is a model's own name" in answer.json()["error"]["message"]
                refused = await client.post("/v1/completions", json={**_ASKED, "model": "x"})
                assert refused.status_code == 404
                assert "'late'" in refused.json()["error"]["message"]

    asyncio.run(visit())


def test_each_model_is_spoken_to_in_its_own_way(tmp_path: Path) -> None:
    """Its tokenizer, its template, and how it samples."""
    family = chains.save_family(tmp_path, "llama", {"late": ("lm_head",)})
    for name, folder in family.items():
        tokenizer = zoo.letter_tokenizer()
        tokenizer.chat_template = f"{name}:" + "{{ messages[-1]['content'] }}"
        if name == "late":
            tokenizer.backend_tokenizer.normalizer = normalizers.Replace("hello", "~")
            GenerationConfig(max_new_tokens=3).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    models = chains.make_zoo(tmp_path, family)
    said = {"messages": [{"role": "user", "content": "hello"}]}

    async def visit() -> None:
        async with AsyncLLM(models, model="base", **zoo.with_defaults({})) as llm:
            transport = httpx.ASGITransport(app=app_of(llm))
            async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:

                async def ask(path: str, name: str, **body: object) -> dict[str, Any]:
                    answer = await client.post(path, json={"model": name, **body})
                    assert answer.status_code == 200, answer.text
                    return answer.json()

                for name, known in (("base", "hello"), ("late", "~")):
                    count = len(known)
                    told = await ask("/tokenize", name, prompt="hello")
                    assert told["count"] == count
                    text = await ask("/detokenize", name, tokens=told["tokens"])
                    assert text == {"prompt": known}
                    chat = await ask("/tokenize", name, **said)
                    assert chat["count"] == len(f"{name}:") + count
                    counted = await ask("/v1/messages/count_tokens", name, **said)
                    assert counted == {"input_tokens": chat["count"]}
                    body = {"prompt": told["tokens"], "echo": True, "ignore_eos": True}
                    answer = await ask("/v1/completions", name, **body, logprobs=0)
                    assert answer["choices"][0]["text"].startswith(known)
                    assert answer["choices"][0]["logprobs"]["tokens"][0] == known[0]
                    number = answer["usage"]["completion_tokens"]
                    assert number == (16 if name == "base" else 3)
                asked = {"lora_name": "late", "lora_path": str(family["late"])}
                refused = await client.post("/v1/load_lora_adapter", json=asked)
                assert "is a model's own name" in refused.json()["error"]["message"]

    asyncio.run(visit())


def test_a_server_of_a_zoo(tenants: BlockZoo, texts: dict[str, str], tmp_path: Path) -> None:
    with Served(str(tenants.path), "--model", "early", log=tmp_path / "log") as server:
        listed = server.client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["early", "base", "late"]
        for name, text in texts.items():
            answer = server.client.post("/v1/completions", json={**_ASKED, "model": name})
            assert answer.json()["choices"][0]["text"] == text
        assert "Traceback" not in server.log(), server.log()
