"""4-bit checkpoints through `vkv.LLM`: the same tokens as dequantised weights, or a typed error."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from quantized import KINDS, quantize_folder, random_weight, round_to_nearest, written
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from vkv import LLM, SamplingParams
from vkv.quant import Int4Linear
from vkv.quant.kernels.table import kernel_class
from vkv.runtime.cpu_kernels.packing import int4_products
from vkv.vmem.errors import BadCheckpoint, InvalidConfig, UnsupportedModel

GREEDY = SamplingParams(max_tokens=256, temperature=0)
PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    zoo.tiny_model("llama").save_pretrained(folder)
    return folder


def tokens(folder: Path, **options: Any) -> list[tuple[int, ...]]:
    with LLM(folder, device="cpu", **options) as llm:
        return [tuple(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_greedy_tokens_are_those_of_dequantised_weights(
    dense: Path, tmp_path: Path, kind: str, symmetric: bool, act_order: bool
) -> None:
    if kind == "awq" and act_order:
        pytest.skip("AWQ has no activation order")
    int4, same = quantize_folder(
        dense, tmp_path, kind, group_size=8, symmetric=symmetric, act_order=act_order
    )
    found = tokens(int4, dtype="float32")
    assert found == tokens(same, dtype="float32")
    assert all(len(row) == 256 for row in found)
    assert len(set(found[0])) > 5, "a text of one word would hide a difference"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_dequantised_weights_in_bf16(
    tmp_path: Path, kind: str, device: str
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}  # groups of 32, which all kernels take
    zoo.tiny_model("llama", **sizes).save_pretrained(tmp_path / "source")
    int4, same = quantize_folder(tmp_path / "source", tmp_path, kind, group_size=32)
    prompts, counts = zoo.random_prompts([5, 40, 1, 17]), [30, 9, 17, 20]
    options: dict[str, Any] = {"max_batch_tokens": 48, "max_len": 256, "kv_memory": "64MiB"}
    with LLM(int4, device=device, dtype="bfloat16", **options) as llm:
        outs = llm.generate(prompts, [zoo.greedy(count, logprobs=1) for count in counts])
        kernels = {
            linear.kernel_for(torch.device(device), torch.bfloat16, 1).name
            for _, linear in int4_products(llm.loaded.model)
        }
    assert kernels
    if device == "cuda":
        assert kernels <= {"humming", "triton"}, "on a card since Ampere it is one made for it"
    plain, exact = (
        AutoModelForCausalLM.from_pretrained(same, dtype=dtype).to(device).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    zoo.check_scores(prompts, outs, plain, exact)


def test_without_packing_it_is_the_same(dense: Path, tmp_path: Path) -> None:
    int4, _ = quantize_folder(dense, tmp_path, "gptq", group_size=8)
    packed = tokens(int4, dtype="float32")
    assert tokens(int4, dtype="float32", pack_weights=False) == packed


def test_a_quarter_of_the_weights(dense: Path, tmp_path: Path) -> None:
    """Layers shrink, embeddings stay; float16, a GPU's type, is read as bfloat16."""
    int4, same = quantize_folder(dense, tmp_path, "gptq", group_size=8)
    config = json.loads((int4 / "config.json").read_text())
    (int4 / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with LLM(int4, device="cpu") as small, LLM(same, device="cpu", dtype="bfloat16") as large:
        assert small.loaded.dtype == torch.bfloat16
        kept = sum(p.nbytes for p in small.loaded.model.parameters())
        layers = large.loaded.weight_bytes - kept
        assert 0 < small.loaded.weight_bytes - kept < 0.8 * layers  # groups of 8 cost much


def test_layers_that_are_not_quantised_stay_dense(dense: Path, tmp_path: Path) -> None:
    int4, _ = quantize_folder(dense, tmp_path, "compressed-tensors", group_size=8)
    with LLM(int4, device="cpu", dtype="float32", pack_weights=False) as llm:
        model = llm.loaded.model
        assert type(model.get_submodule("lm_head")) is torch.nn.Linear
        assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is Int4Linear


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.scales"]


def shorten(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.qzeros"
    tensors[name] = tensors[name][:1].contiguous()


def retype(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.qweight"
    tensors[name] = tensors[name].long()


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.k_proj.scales"][0, 0] = float("inf")


def misplace(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"model.elsewhere.{part}"] = tensors.pop(f"model.layers.0.mlp.up_proj.{part}")


def rotate(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.input_rotation.weight"] = torch.eye(8)


def keep_dense(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)


def rotate_heads(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.query_rotation"] = torch.eye(8)


def empty(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if not name.endswith("weight")]:
        del tensors[name]
    for name in [name for name in tensors if name.endswith("qweight")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop, BadCheckpoint, r"model\.layers\.1\.mlp\.up_proj\.scales is missing"),
        (shorten, BadCheckpoint, r"model\.layers\.1\.mlp\.up_proj\.qzeros is int32 \[1, "),
        (retype, BadCheckpoint, r"model\.layers\.0\.self_attn\.q_proj\.qweight is int64"),
        (poison, BadCheckpoint, r"model\.layers\.0\.self_attn\.k_proj\.scales holds values"),
        (misplace, UnsupportedModel, r"model\.elsewhere\.\w+ is quantised"),
        (rotate, UnsupportedModel, r"q_proj\.input_rotation\.weight belongs to a quantised"),
        (keep_dense, UnsupportedModel, r"0\.mlp\.up_proj\.weight belongs to a quantised"),
        (rotate_heads, UnsupportedModel, r"no place for, .*self_attn\.query_rotation"),
        (empty, BadCheckpoint, r"no tensor is called \*\.qweight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_checkpoint_names_the_tensor(
    dense: Path,
    tmp_path: Path,
    damage: Callable[[dict[str, torch.Tensor]], None],
    error: type[Exception],
    message: str,
) -> None:
    int4, _ = quantize_folder(dense, tmp_path, "gptq", group_size=8)
    held = load_file(int4 / "model.safetensors")
    damage(held)
    save_file(held, int4 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        LLM(int4, device="cpu", dtype="float32")


def of_another_size(kind: str) -> dict[str, torch.Tensor]:
    """A layer of 48 outputs and 64 inputs, whose tensors agree with one another."""
    return written(kind, random_weight(48, 64, 8))


def of_eight_bits(kind: str) -> dict[str, torch.Tensor]:
    """A layer of 48 outputs and 32 inputs, four codes a word."""
    tensors = written(kind, random_weight(48, 32, 8))
    doubled = {"gptq": (0, 1), "gptq_v2": (0, 1), "awq": (1, 1), "compressed-tensors": (1, 0)}
    names = ("weight_packed",) if kind == "compressed-tensors" else ("qweight", "qzeros")
    for name, dim in zip(names, doubled[kind], strict=False):
        tensors[name] = tensors[name].repeat_interleave(2, dim=dim)
    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [of_another_size, of_eight_bits])
def test_a_layer_that_the_model_has_in_another_size_is_named(
    dense: Path,
    tmp_path: Path,
    kind: str,
    layer: Callable[[str], dict[str, torch.Tensor]],
) -> None:
    """Its tensors fit one another, so that nothing but the model's own layer tells."""
    int4, _ = quantize_folder(dense, tmp_path, kind, group_size=8)
    held = load_file(int4 / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for full_name in [full_name for full_name in held if full_name.startswith(f"{name}.")]:
        del held[full_name]
    held |= {f"{name}.{part}": tensor.clone() for part, tensor in layer(kind).items()}
    save_file(held, int4 / "model.safetensors", metadata={"format": "pt"})
    sizes = r"a weight of (\[48, 64\]|\[96, 32\]) .*the model's layer is \[48, 32\]"
    message = rf"{re.escape(name)}\.\w+ is \[.*{sizes}; use .* 4 bits in all"
    with pytest.raises(BadCheckpoint, match=message):
        LLM(int4, device="cpu", dtype="float32")


@pytest.mark.parametrize("kept", [0, 4, 1000, -100])
def test_a_truncated_file(dense: Path, tmp_path: Path, kept: int) -> None:
    int4, _ = quantize_folder(dense, tmp_path, "awq", group_size=8)
    file = int4 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors is damaged"):
        LLM(int4, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "only 4-bit and 8-bit weights"),
        ({"quant_method": "of-tomorrow"}, "'of-tomorrow', which is unknown"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
    ],
    ids=str,
)
def test_unknown_formats(dense: Path, tmp_path: Path, change: dict, message: str) -> None:
    int4, _ = quantize_folder(dense, tmp_path, "gptq", group_size=8)
    config = json.loads((int4 / "config.json").read_text())
    config["quantization_config"] |= change
    (int4 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=message):
        LLM(int4, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_layer_of_its_own_where_the_config_ties_it(tmp_path: Path, kind: str) -> None:
    """Quantisers untie it, and many leave the config as it was."""
    model = zoo.tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    int4, same = quantize_folder(tmp_path / "source", tmp_path, kind, group_size=8)
    head = round_to_nearest(model.lm_head.weight.detach(), 8, symmetric=True)
    held = load_file(int4 / "model.safetensors")
    held |= {f"lm_head.{part}": tensor for part, tensor in written(kind, head).items()}
    save_file(held, int4 / "model.safetensors", metadata={"format": "pt"})
    held = load_file(same / "model.safetensors") | {"lm_head.weight": head.dequantize()}
    save_file(held, same / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert tokens(int4, dtype="float32") == tokens(same, dtype="float32")


def test_a_router_in_4_bits_is_refused_by_name(tmp_path: Path) -> None:
    zoo.tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    int4, _ = quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=8)
    held = load_file(int4 / "model.safetensors")
    name = "model.layers.1.mlp.gate"
    weight = round_to_nearest(held.pop(f"{name}.weight").repeat(2, 1), 8, symmetric=True)
    held |= {f"{name}.{part}": tensor for part, tensor in written("gptq", weight).items()}
    save_file(held, int4 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"mlp\.gate\.\w+ is .*Router .* leaves it dense"):
        LLM(int4, device="cpu", dtype="float32")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_layer_in_fewer_bits(dense: Path, bits: int) -> None:
    with LLM(dense, device="cpu", dtype="bfloat16", lm_head_bits=bits, kv_memory="4MiB") as llm:
        (out,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=20, temperature=0))
        assert len(out.outputs[0].token_ids) == 20
        assert type(llm.loaded.model.get_output_embeddings()) is not torch.nn.Linear


def test_output_layers_that_cannot_be_quantised_are_refused(dense: Path) -> None:
    with pytest.raises(InvalidConfig, match="lm_head_bits is 3"):
        LLM(dense, device="cpu", lm_head_bits=3)
    with pytest.raises(InvalidConfig, match="caller's own"):
        LLM(zoo.tiny_model("llama"), device="cpu", lm_head_bits=8)


@pytest.mark.skipif(
    kernel_class("native-int8").unavailable_reason() is not None, reason="no kernels here"
)
def test_activations_in_8_bits(tmp_path: Path) -> None:
    zoo.tiny_model("llama").save_pretrained(tmp_path / "source")
    int4, _ = quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=8)
    options = {"device": "cpu", "dtype": "bfloat16", "lm_head_bits": 4, "kv_memory": "4MiB"}
    scores = []
    for bits in (16, 8):
        with LLM(int4, activation_bits=bits, **options) as llm:  # type: ignore[arg-type]
            kernels = {one.pinned for _, one in int4_products(llm.loaded.model)}
            assert kernels == ({"native-int8"} if bits == 8 else {None})
            sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
            (out,) = llm.generate([PROMPTS[0]], sampling)
            assert out.outputs[0].logprobs is not None
            scores.append(max(one.logprob for one in out.outputs[0].logprobs[0].values()))
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


def test_activations_that_cannot_be_rounded_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="activation_bits is 4; use 8 or 16"):
        LLM(dense, device="cpu", activation_bits=4)
    with pytest.raises(InvalidConfig, match="none of its layers is in 4 or 8 bits"):
        LLM(dense, device="cpu", dtype="bfloat16", activation_bits=8)
    with pytest.raises(InvalidConfig, match="caller's own"):
        LLM(zoo.tiny_model("llama"), device="cpu", activation_bits=8)
    int4, _ = quantize_folder(dense, tmp_path, "gptq", group_size=8)
    with pytest.raises(InvalidConfig, match=r"q_proj is in groups of 8.* in bfloat16"):
        LLM(int4, device="cpu", dtype="float32", activation_bits=8)


@pytest.mark.skipif(
    kernel_class("native-int8").unavailable_reason() is not None, reason="no kernels here"
)
def test_a_layer_with_inputs_of_another_type_is_named(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for rounded inputs take no float32, which some models have within."""
    int4, _ = quantize_folder(dense, tmp_path, "gptq", group_size=8)

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).float()).to(x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(InvalidConfig, match=r"layers.0.mlp.down_proj is given inputs of float32"):
        LLM(int4, device="cpu", dtype="bfloat16", activation_bits=8)


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_published_names_of_a_model_with_a_vision_tower(tmp_path: Path, kind: str) -> None:
    """The files hold the names that the model had when it was published."""
    zoo.gemma3().save_pretrained(tmp_path / "source")
    assert not any(
        name.startswith("model.") for name in load_file(tmp_path / "source" / "model.safetensors")
    )
    int4, same = quantize_folder(tmp_path / "source", tmp_path, kind, group_size=8)
    found = tokens(int4, dtype="float32", max_len=300)
    assert found == tokens(same, dtype="float32", max_len=300)


def test_names_without_the_prefix_of_the_base_model(dense: Path, tmp_path: Path) -> None:
    int4, same = quantize_folder(dense, tmp_path, "gptq", group_size=8)
    held = load_file(int4 / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    save_file(bare, int4 / "model.safetensors", metadata={"format": "pt"})
    assert tokens(int4, dtype="float32") == tokens(same, dtype="float32")
