"""Sampling without parameters: what a model's generation config says, unless told otherwise."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from transformers import GenerationConfig
from vkv import LLM, AsyncLLM, RequestOutput, SamplingParams
from vkv.vmem.errors import InvalidConfig, VkvError

_SAID = {
    "temperature": 0.25,
    "top_p": 0.75,
    "top_k": 5,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "max_new_tokens": 7,
}
_PARAMS = SamplingParams(
    temperature=0.25, top_p=0.75, top_k=5, min_p=0.125, repetition_penalty=1.5, max_tokens=7
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose authors say how to sample."""
    zoo.save_checkpoint(tmp_path)
    _say(tmp_path, _SAID)
    return tmp_path


def _say(folder: Path, said: dict[str, Any]) -> None:
    text = json.dumps({"do_sample": True, "eos_token_id": zoo.VOCAB_SIZE - 1, **said})
    (folder / "generation_config.json").write_text(text)


def _open(model: Any, **options: Any) -> LLM:
    return LLM(model, device="cpu", **zoo.with_defaults({"max_seqs": 2, **options}))


def _used(llm: LLM, prompt: Any = "hello", **given: Any) -> SamplingParams:
    return llm._front_end.request(prompt, **given).spec.params


def test_they_are_the_defaults(folder: Path) -> None:
    chat = [{"role": "user", "content": "x"}]
    with _open(folder) as llm:
        assert llm.get_default_sampling_params() == _PARAMS
        assert _used(llm) == _used(llm, chat) == _PARAMS
        explicit = SamplingParams(temperature=0.5)
        assert _used(llm, params=explicit) == explicit, "given parameters are taken as they are"
        (out,) = llm.generate("hello")
        assert len(out.outputs[0].token_ids) == 7
        assert len(llm.chat(chat)[0].outputs[0].token_ids) == 7
        assert sum(len(delta.token_ids) for delta in llm.stream("hello")) == 7

    async def ask() -> RequestOutput:
        options = zoo.with_defaults({"max_seqs": 2})
        async with AsyncLLM(folder, device="cpu", **options) as llm:
            assert llm.get_default_sampling_params() == _PARAMS
            return [output async for output in llm.generate("hello")][-1]

    assert len(asyncio.run(ask()).outputs[0].token_ids) == 7


def test_an_answer_without_a_limit_of_the_models_has_none(folder: Path) -> None:
    _say(folder, {"temperature": 0.25})
    with _open(folder) as llm:
        assert _used(llm) == SamplingParams(temperature=0.25)
        chat = _used(llm, [{"role": "user", "content": "x"}])
        assert chat == SamplingParams(temperature=0.25, max_tokens=None)


def test_vllm_switches_them_off(folder: Path) -> None:
    with _open(folder, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == _used(llm) == SamplingParams()
        bias = {zoo.VOCAB_SIZE - 1: 100.0}
        (out,) = llm.generate("hello", SamplingParams(logit_bias=bias))
        assert out.outputs[0].finish_reason == "stop", "the model's end is an end all the same"


@pytest.mark.parametrize("to_file", [False, True])
def test_those_of_another_folder_may_be_used(folder: Path, tmp_path: Path, to_file: bool) -> None:
    other = tmp_path / "other"
    other.mkdir()
    _say(other, {"temperature": 0.5, "eos_token_id": [3, 10**6]})
    where = other / "generation_config.json" if to_file else other
    with _open(folder, generation_config=where) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5)
        for end in (3, zoo.VOCAB_SIZE - 1):
            params = SamplingParams(temperature=0, logit_bias={end: 100.0}, min_tokens=1)
            (out,) = llm.generate("hello", params)
            assert out.outputs[0].finish_reason == "stop"
            assert out.outputs[0].token_ids[-1] == end


def test_a_model_handed_in_has_its_own(folder: Path) -> None:
    model = zoo.tiny_model("llama")
    model.generation_config = GenerationConfig(temperature=0.25, do_sample=True)
    with _open(model) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25)
    with _open(zoo.tiny_model("llama")) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"generation_config": "nowhere"},
            "'nowhere'.*is no file; use 'auto', 'vllm', or a folder",
        ),
        ({"generation_config": 5}, "generation_config is 5; use 'auto', 'vllm' or a folder"),
        ({"generation_confg": "vllm"}, "did you mean 'generation_config'"),
    ],
)
def test_what_is_no_generation_config_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        _open(zoo.tiny_model("llama"), **options)


def test_impossible_ones_are_refused_with_the_way_around(folder: Path) -> None:
    _say(folder, {"top_p": 7.0})
    with pytest.raises(VkvError, match=r"generation config of .*top_p.*generation_config='vllm'"):
        _open(folder)
    with _open(folder, generation_config="vllm") as llm:
        assert llm.generate("hello")[0].finished
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(VkvError, match="generation config"):
        _open(zoo.tiny_model("llama"), generation_config=folder)
