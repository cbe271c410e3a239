"""Checkpoints in 8 bits, FP8 and of bitsandbytes through `vkv.LLM`: the tokens of dense weights."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from eight_bits import DENSE, KINDS, write_folders
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vkv import LLM, SamplingParams
from vkv.runtime.cpu_kernels.packing import int4_products
from vkv.vmem.errors import BadCheckpoint, UnsupportedModel

GREEDY = SamplingParams(max_tokens=64, temperature=0)
PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]
LAYER = "model.layers.0.self_attn.k_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    zoo.tiny_model("llama").save_pretrained(folder)
    return folder


def tokens(folder: Path, **options: Any) -> list[tuple[int, ...]]:
    with LLM(folder, device="cpu", kv_memory="16MiB", **options) as llm:
        return [tuple(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, GREEDY)]


def change(folder: Path, changed: Callable[[Tensors], None], **config: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_dense_weights(source: Path, tmp_path: Path, kind: str) -> None:
    rounded, dense = write_folders(source, tmp_path, kind)
    found = tokens(rounded, dtype="float32")
    assert found == tokens(dense, dtype="float32")
    assert len(set(found[0])) > 5, "a text of one word would hide a difference"


@pytest.mark.parametrize("kind", KINDS)
def test_experts(tmp_path: Path, kind: str) -> None:
    zoo.tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    rounded, dense = write_folders(tmp_path / "source", tmp_path, kind)
    found = tokens(rounded, dtype="float32")
    assert found == tokens(dense, dtype="float32")
    assert len(set(found[0])) > 3, "a text of one word would hide a difference"


@pytest.mark.parametrize("kind", DENSE)
def test_what_is_read_as_dense_is_rounded_once_and_says_so(
    source: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rounded, dense = write_folders(source, tmp_path, kind)
    with caplog.at_level(logging.WARNING, "vkv"):
        found = tokens(rounded, dtype="bfloat16")
    assert len([r for r in caplog.records if "read as dense" in r.getMessage()]) == 1
    assert found == tokens(dense, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["gptq", "w8a8", "llm-int8"])
def test_scores_are_those_of_dense_weights_in_bf16(tmp_path: Path, kind: str) -> None:
    zoo.tiny_model("llama").save_pretrained(tmp_path / "source")
    rounded, dense = write_folders(tmp_path / "source", tmp_path, kind)
    prompts, counts = zoo.random_prompts([5, 40, 1]), [10, 9, 8]
    with LLM(rounded, device="cpu", dtype="bfloat16", kv_memory="16MiB") as llm:
        outs = llm.generate(prompts, [zoo.greedy(count, logprobs=1) for count in counts])
        products = [linear for _, linear in int4_products(llm.loaded.model)]
        layers = len(llm.loaded.attention_layers)
    assert [linear.bits for linear in products] == [8] * 4 * layers, "siblings are one product"
    plain, exact = (
        AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    zoo.check_scores(prompts, outs, plain, exact)


def add_kv_scales(tensors: Tensors) -> None:
    for name in ("k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor([0.5])


def test_keys_and_values_that_were_to_be_rounded_are_not(source: Path, tmp_path: Path) -> None:
    rounded, dense = write_folders(source, tmp_path, "fp8")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    change(rounded, add_kv_scales, kv_cache_scheme=scheme)
    assert tokens(rounded, dtype="float32") == tokens(dense, dtype="float32")
    change(rounded, add_kv_scales, kv_cache_scheme=None)
    with pytest.raises(UnsupportedModel, match="k_scale"):
        LLM(rounded, device="cpu")


def reorder(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_format"] = torch.ones((), dtype=torch.uint8)


def drop(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.weight"]


def spoil(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight"].view(torch.uint8)[0, 0] = 0x7F


def add_zeros(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_zero_point"] = torch.ones(1)


def scramble(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"][0] = 0


def exchange(tensors: Tensors) -> None:
    """The state of a layer of another size."""
    other = "model.layers.0.mlp.up_proj"
    for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
        tensors[name] = tensors[name.replace(LAYER, other)].clone()


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("llm-int8", reorder, rf"{LAYER}\.weight_format is 1"),
        ("llm-int8", drop, rf"{LAYER}\.weight is missing"),
        ("fp8", spoil, rf"{LAYER}\.weight holds values that are not finite"),
        ("fp8", add_zeros, rf"{LAYER}\.weight_zero_point holds zero points"),
        ("nf4", scramble, rf"{LAYER}\.weight_quant_state is no JSON"),
        ("nf4", exchange, rf"{LAYER}\.weight holds a weight of"),
        ("w8a8", exchange, rf"{LAYER}\.weight is .* in 8 bits"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_layers_that_are_damaged_are_named(
    source: Path, tmp_path: Path, kind: str, changed: Callable[[Tensors], None], message: str
) -> None:
    rounded, _ = write_folders(source, tmp_path, kind)
    change(rounded, changed)
    with pytest.raises(BadCheckpoint, match=message):
        LLM(rounded, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit=True and load_in_8bit=True"),
        ({"load_in_8bit": False}, "load_in_4bit=False and load_in_8bit=False"),
        ({"of_tomorrow": 1}, "of_tomorrow is 1"),
    ],
    ids=str,
)
def test_configs_of_bitsandbytes(
    source: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    rounded, _ = write_folders(source, tmp_path, "llm-int8")
    change(rounded, lambda _: None, **config)
    with pytest.raises(UnsupportedModel, match=message):
        LLM(rounded, device="cpu")
