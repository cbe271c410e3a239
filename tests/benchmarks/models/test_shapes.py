"""Shapes that benchmarks take: their keys and values, by every benchmark that counts them."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import GPT2Config
from vkv.bench.load import serve
from vkv.bench.load.serve import ServeOptions
from vkv.bench.models import cache, memory
from vkv.bench.models.cache import CacheOptions
from vkv.bench.models.checkpoints import cache_bytes_per_token, save_checkpoints
from vkv.bench.models.memory import MemoryOptions
from vkv.bench.models.shapes import SHAPES, build_model, kv_geometry
from vkv.runtime.cpu_kernels import packing

_HEAD_DIM = 32
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of every shape, one layer of them, and little else."""
    for name, options in SHAPES.items():
        small = {"num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 16}
        small["hidden_size"] = _HEAD_DIM * options["num_attention_heads"]
        small["head_dim"] = _HEAD_DIM
        if options["model_type"] == "qwen2":
            del small["head_dim"]  # it knows none
        monkeypatch.setitem(SHAPES, name, options | small)


@every_shape
def test_keys_and_values_are_those_of_the_model(shape: str) -> None:
    model = build_model(shape, dtype=torch.bfloat16, device=torch.device("meta"))
    attention = model.get_submodule("model.layers.0.self_attn")
    num_kv_heads, head_dim = kv_geometry(model.config)
    keys = attention.get_submodule("k_proj").weight
    assert num_kv_heads * head_dim == len(keys)
    assert head_dim == attention.head_dim
    num_layers = SHAPES[shape]["num_hidden_layers"]
    assert cache_bytes_per_token(model, torch.bfloat16) == 2 * 2 * num_layers * len(keys)


def test_every_head_is_a_kv_head_where_a_config_has_no_other_word() -> None:
    assert kv_geometry(GPT2Config(n_embd=96, n_head=6)) == (6, 16)


@every_shape
@pytest.mark.usefixtures("small_shapes")
def test_checkpoints_of_every_shape(shape: str, tmp_path: Path) -> None:
    saved = save_checkpoints(shape, None, torch.float32, None, tmp_path)
    assert saved.kv_bytes_per_token == 2 * SHAPES[shape]["num_key_value_heads"] * _HEAD_DIM * 4


@every_shape
@pytest.mark.usefixtures("small_shapes")
def test_bench_memory_of_every_shape(shape: str, tmp_path: Path) -> None:
    options = MemoryOptions(
        shape=shape, num_requests=2, prompt_lens=(5, 9), output_lens=(2, 4), idle_s=0.01
    )
    path, _ = memory.run(options, tmp_path, "x")
    samples = json.loads(path.read_text())["results"]["samples"]
    assert set(samples) == {"virtual", "paged", "static", "dynamic"}
    for of_kind in samples.values():
        both = zip(of_kind["token_bytes"], of_kind["kv_bytes"], strict=True)
        assert all(tokens <= backed for tokens, backed in both)


@pytest.mark.parametrize(
    ("bench", "options"),
    [
        (memory, MemoryOptions(num_requests=2, output_lens=(2, 4), idle_s=0.01)),
        (serve, ServeOptions(workloads=("sharegpt",), num_requests=2, clients=(1,), scale=0.02)),
    ],
    ids=["memory", "serve"],
)
@pytest.mark.usefixtures("small_shapes")
def test_weights_are_packed_as_those_of_a_checkpoint(
    bench: ModuleType, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark builds its model, and one that is handed over keeps its own linears."""
    built = []

    def build_and_keep(*args: Any, **kwargs: Any) -> Any:
        built.append(build_model(*args, **kwargs))
        return built[0]

    monkeypatch.setattr(bench, "build_model", build_and_keep)
    bench.run(options, tmp_path, "x")  # on several engines, one after the other
    assert len(built) == 1
    assert (packing.packed_bytes(built[0]) > 0) == packing.can_pack(options.dtype)


@pytest.mark.usefixtures("small_shapes")
def test_bench_cache_of_a_shape_without_head_dim(tmp_path: Path) -> None:
    options = CacheOptions(
        shape="qwen2-0.5b", threads=1, problems=((1, 8),), kinds=("dynamic",), steps=1, repeats=1
    )
    path, _ = cache.run(options, tmp_path, "x")
    (cell,) = json.loads(path.read_text())["results"]["cells"]
    assert cell["runs"]["dynamic"][0]["token_s"]
