"""4-bit mixtures of experts: read as published, run like dequantised weights, and written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from quantized import gpt_oss_folders, matrix, quantize_folder, random_weight
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from vkv import LLM, SamplingParams
from vkv.quant import Expert, Experts, Int4Linear, QuantError
from vkv.quant.experts import FusedExperts, taken_apart
from vkv.quant.quantise.model import plan, quantize_model
from vkv.quant.quantise.rounding import Rounding
from vkv.quant.quantise.save import FORMATS, quantization_config, save_quantized
from vkv.quant.stored_experts import _ROLES
from vkv.vmem.errors import BadCheckpoint, UnsupportedModel

PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]
GROUP_8 = Rounding(group_size=8)


def tokens(folder: Path, count: int = 40, **options: Any) -> list[tuple[int, ...]]:
    options = {"dtype": "float32", "kv_memory": "4MiB", **options}
    with LLM(folder, device="cpu", **options) as llm:
        outs = llm.generate(PROMPTS, SamplingParams(max_tokens=count, temperature=0))
        experts = [m for m in llm.loaded.model.modules() if isinstance(m, Experts)]
    assert bool(experts) != ("dense" in folder.name), "whether they were read in 4 bits"
    return [tuple(out.outputs[0].token_ids) for out in outs]


@pytest.mark.parametrize(
    ("model_type", "kind", "options"),
    [
        ("qwen3_moe", "gptq", {"act_order": True}),
        ("qwen3_moe", "awq", {"symmetric": False}),
        ("mixtral", "gptq_v2", {}),
        ("mixtral", "compressed-tensors", {"symmetric": False, "act_order": True}),
        ("deepseek_v3", "compressed-tensors", {}),
        ("minimax_m2", "awq", {}),
        ("qwen3_next", "gptq", {}),
        ("nemotron_h", "gptq", {}),
    ],
)
def test_greedy_tokens_are_those_of_dequantised_weights(
    tmp_path: Path, model_type: str, kind: str, options: dict[str, Any]
) -> None:
    zoo.tiny_model(model_type).save_pretrained(tmp_path / "source")
    int4, same = quantize_folder(tmp_path / "source", tmp_path, kind, group_size=8, **options)
    assert any(".experts.3." in name for name in load_file(int4 / "model.safetensors"))
    found = tokens(int4)
    assert found == tokens(same)
    assert len({token for row in found for token in row}) > 5, "they say something"


@pytest.mark.parametrize(
    "style",
    ["{expert}.{part}", "experts.{expert}.{part}", "{part}.{expert}", "{part}_projs.{expert}"],
)
def test_each_writers_names_of_the_experts_of_gpt_oss(tmp_path: Path, style: str) -> None:
    """Gate and up alternate in the model's own tensor; some publish them apart."""
    zoo.tiny_model("gpt_oss").save_pretrained(tmp_path / "source")
    int4, same = gpt_oss_folders(tmp_path / "source", tmp_path, "gptq", style)
    assert tokens(int4) == tokens(same)


def test_scores_are_those_of_dequantised_weights_in_bf16(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 64}  # groups of 32, which all kernels take
    # Every token has all experts, for a choice may hang on a rounding error.
    model = zoo.tiny_model("mixtral", num_experts_per_tok=4, **sizes)
    model.save_pretrained(tmp_path / "source")
    int4, same = quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=32)
    prompts, counts = zoo.random_prompts([5, 40, 1, 17]), [30, 9, 17, 20]
    options: dict[str, Any] = {"max_batch_tokens": 48, "max_len": 256, "kv_memory": "64MiB"}
    with LLM(int4, device="cpu", dtype="bfloat16", **options) as llm:
        outs = llm.generate(prompts, [zoo.greedy(count, logprobs=1) for count in counts])
    plain, exact = (
        AutoModelForCausalLM.from_pretrained(same, dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    zoo.check_scores(prompts, outs, plain, exact)


@pytest.mark.parametrize(("model_type", "inner"), [("mixtral", 72), ("gpt_oss", 64)])
@torch.inference_mode()
def test_a_tokens_result_does_not_depend_on_the_others(
    tmp_path: Path, model_type: str, inner: int
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": inner}
    zoo.tiny_model(model_type, **sizes).save_pretrained(tmp_path / "source")
    if model_type == "gpt_oss":
        int4, _ = gpt_oss_folders(tmp_path / "source", tmp_path, "gptq", "{part}.{expert}")
    else:
        int4, _ = quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=8)
    with LLM(int4, device="cpu", dtype="bfloat16", kv_memory="4MiB") as llm:
        experts = llm.loaded.model.get_submodule("model.layers.1.mlp.experts")
    assert isinstance(experts, Experts)
    names = {m.kernel_for(torch.device("cpu"), torch.bfloat16, 1).name for m in linears(experts)}
    if names != {"native"}:
        pytest.skip("the kernels of this processor sum in another order for other batches")
    states = torch.randn(41, 64).bfloat16()
    weights, index = torch.randn(41, 4).softmax(-1).topk(2)
    whole = experts(states, index, weights)
    for row in range(41):
        one = slice(row, row + 1)
        assert torch.equal(experts(states[one], index[one], weights[one]), whole[one])


def linears(experts: Experts) -> list[Int4Linear]:
    return [module for module in experts.modules() if isinstance(module, Int4Linear)]


def test_gate_and_up_are_one_product(tmp_path: Path) -> None:
    zoo.tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    int4, _ = quantize_folder(tmp_path / "source", tmp_path, "awq", group_size=8)
    with LLM(int4, device="cpu", dtype="bfloat16", kv_memory="4MiB") as llm:
        experts = llm.loaded.model.get_submodule("model.layers.0.mlp.experts")
        assert isinstance(experts, Experts)
        assert len(linears(experts)) == 2 * experts.num_experts
        assert all(linear.is_settled for linear in linears(experts))
        held = sum(linear.num_bytes for linear in linears(experts))
        assert llm.loaded.weight_bytes > held > 0


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
@torch.no_grad()
def test_experts_taken_apart_compute_what_transformers_does(model_type: str) -> None:
    model = zoo.tiny_model(model_type)
    (fused, module), *_ = [
        (fused, module)
        for module in model.modules()
        if (fused := FusedExperts.of(module)) is not None
    ]
    states = torch.randn(7, 32)
    weights, index = torch.randn(7, fused.num_experts).softmax(-1).topk(2)
    apart = taken_apart(fused)
    torch.testing.assert_close(apart(states, index, weights), module(states, index, weights))
    assert not apart(states, torch.full_like(index, fused.num_experts), weights).any()
    shared = fused.linear("down_proj", 1).weight
    shared.zero_()
    assert not fused.weight("down_proj", 1).any(), "they share memory"


def test_names_of_parts_mean_in_every_architecture_what_they_mean_here() -> None:
    """`transformers` puts parts together in an order of its own: gate before up."""
    seen = 0
    for model_type in ("mixtral", "qwen2_moe", "phimoe", "lfm2_moe", "nemotron_h", "minimax_m2"):
        for rule in get_checkpoint_conversion_mapping(model_type) or ():
            if "experts.*." not in rule.source_patterns[0]:
                continue
            roles = [_ROLES[source.split(".")[-2]] for source in rule.source_patterns]
            (target,) = rule.target_patterns
            if target.endswith("gate_up_proj"):
                assert roles == ["gate_proj", "up_proj"]
            else:
                assert roles == [target.split(".")[-1]]
            seen += 1
    assert seen >= 8


def test_layers_that_a_model_leaves_out_may_be_in_4_bits_too(tmp_path: Path) -> None:
    """Those that predict several tokens ahead, behind the last: `transformers` has none."""
    zoo.tiny_model("deepseek_v3").save_pretrained(tmp_path / "source")
    int4, same = quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=8)
    held = load_file(int4 / "model.safetensors")
    ahead = {
        name.replace("layers.2.", "layers.61."): tensor.clone()
        for name, tensor in held.items()
        if "layers.2." in name
    }
    assert any("experts.3" in name for name in ahead)
    save_file(held | ahead, int4 / "model.safetensors", metadata={"format": "pt"})
    assert tokens(int4, 24) == tokens(same, 24)


def lose(tensors: dict[str, torch.Tensor], home: str) -> None:
    for name in [name for name in tensors if name.startswith(f"{home}.2.down_proj.")]:
        del tensors[name]


def keep_dense(tensors: dict[str, torch.Tensor], home: str) -> None:
    lose(tensors, home)
    tensors[f"{home}.2.down_proj.weight"] = torch.zeros(32, 24)


def add(tensors: dict[str, torch.Tensor], home: str) -> None:
    for name in [name for name in tensors if name.startswith(f"{home}.2.down_proj.")]:
        tensors[name.replace(".2.", ".4.")] = tensors[name].clone()


def rename(tensors: dict[str, torch.Tensor], home: str) -> None:
    for name in [name for name in tensors if name.startswith(f"{home}.2.down_proj.")]:
        tensors[name.replace("down_proj", "fc2")] = tensors.pop(name)


def narrow(tensors: dict[str, torch.Tensor], home: str) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        name = f"{home}.2.down_proj.{part}"
        tensors[name] = tensors[name.replace("down", "up")].clone()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lose, BadCheckpoint, r"experts are in 4 bits, but not the down_proj of expert 2; all"),
        (keep_dense, BadCheckpoint, r"but not the down_proj of expert 2; .* whole experts"),
        (add, UnsupportedModel, r"experts\.4\.down_proj\.\w+ is quantised, and .* no module"),
        (rename, UnsupportedModel, r"experts\.2\.fc2\.\w+ is quantised"),
        (narrow, BadCheckpoint, r"experts\.2\.down_proj\.qweight is .* layer is \[32, 24\]"),
    ],
)
def test_experts_that_are_not_whole_are_named(
    tmp_path: Path,
    damage: Callable[[dict[str, torch.Tensor], str], None],
    error: type[Exception],
    message: str,
) -> None:
    zoo.tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    int4, _ = quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=8)
    held = load_file(int4 / "model.safetensors")
    damage(held, "model.layers.1.mlp.experts")
    save_file(held, int4 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        LLM(int4, device="cpu", dtype="float32")


# -- written -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "format"),
    [*(("mixtral", format) for format in FORMATS), ("qwen3_moe", "gptq"), ("gpt_oss", "awq")],
)
def test_what_is_written_is_run_as_the_quantised_model(
    tmp_path: Path, model_type: str, format: str
) -> None:
    model = zoo.tiny_model(model_type)
    rounding = Rounding(group_size=8, symmetric=format != "awq")
    text = torch.randint(0, zoo.VOCAB_SIZE, (4, 48))
    result = quantize_model(model, method="gptq", rounding=rounding, calibration=text)
    assert not any(isinstance(module, Experts) for module in model.modules()), "all is put back"
    assert sum(".experts." in name for name in result.weights) == 2 * 4 * (
        2 if model_type == "gpt_oss" else 3
    )
    save_quantized(result, tmp_path / "int4", format=format)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "dense")
    names = load_file(tmp_path / "int4" / "model.safetensors")
    published = {"mixtral": "block_sparse_moe.experts.3.w1", "qwen3_moe": "mlp.experts.3.up_proj"}
    part = published.get(model_type, "mlp.experts.3.gate_up_proj")
    assert any(name.startswith(f"model.layers.1.{part}.") for name in names)
    assert tokens(tmp_path / "int4") == tokens(tmp_path / "dense")


def test_experts_are_calibrated_by_their_own_rows_and_those_without_are_rounded() -> None:
    model = zoo.tiny_model("qwen3_moe", num_experts=16)
    text = torch.randint(0, zoo.VOCAB_SIZE, (1, 4))
    result = quantize_model(model, method="gptq", rounding=GROUP_8, calibration=text)
    experts = [error for error in result.errors if ".experts." in error.name]
    assert {error.method for error in experts} == {"gptq", "rtn"}
    for error in experts:
        assert (error.method == "gptq") == (error.output is not None)
    fused = FusedExperts.of(model.get_submodule("model.layers.0.mlp.experts"))
    assert fused is not None
    name = "model.layers.0.mlp.experts.5"
    assert torch.equal(fused.weight("up_proj", 5), result.weights[f"{name}.up_proj"].dequantize())


def test_calibrating_many_experts_takes_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.randint(0, zoo.VOCAB_SIZE, (2, 48))
    whole = quantize_model(
        zoo.tiny_model("qwen3_moe"), method="gptq", rounding=GROUP_8, calibration=text
    )
    monkeypatch.setattr("vkv.quant.quantise.model._MOST_HESSIAN_BYTES", 10_000)
    parts = quantize_model(
        zoo.tiny_model("qwen3_moe"), method="gptq", rounding=GROUP_8, calibration=text
    )
    assert whole.weights.keys() == parts.weights.keys()
    assert {error.method for error in parts.errors} == {"gptq"}
    first = "model.layers.0.mlp.experts.0.gate_proj"
    assert torch.equal(whole.weights[first].packed, parts.weights[first].packed)


def test_routers_stay_dense_and_are_named_in_every_format() -> None:
    planned = plan(zoo.tiny_model("mixtral"), GROUP_8)
    routers = tuple(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2))
    assert planned.routers == routers
    for format in FORMATS:
        config = quantization_config(
            format, GROUP_8, planned.dense, planned.head, routers=planned.routers
        )
        named = {**config, **config.get("config_groups", {})}
        if format == "gptq":
            assert all(
                any(re.match(key.removeprefix("-:"), name) for key in named["dynamic"])
                for name in routers
            )
        else:
            listed = named["ignore" if format == "compressed-tensors" else "modules_to_not_convert"]
            assert set(routers) <= set(listed)


def test_experts_of_which_a_part_does_not_divide_stay_dense(tmp_path: Path) -> None:
    planned = plan(zoo.tiny_model("qwen3_moe"), Rounding(group_size=32))  # down reads 24
    assert planned.num_linears
    assert not planned.experts
    assert "model.layers.1.mlp.experts.3.up_proj" in planned.dense
    result = quantize_model(zoo.tiny_model("qwen3_moe"), rounding=Rounding(group_size=32))
    save_quantized(result, tmp_path / "half-dense", format="compressed-tensors")
    result.model.save_pretrained(tmp_path / "dense")
    assert tokens(tmp_path / "half-dense", 24) == tokens(tmp_path / "dense", 24)


def test_weights_that_nobody_knows_are_refused_by_name() -> None:
    model = zoo.tiny_model("llama")
    model.model.layers[0].mlp.many = nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(QuantError, match=r"layers\.0\.mlp\.many holds several weights in one"):
        quantize_model(model, rounding=GROUP_8)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("biased", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("same_order", [True, False])
def test_gate_and_up_become_one_where_they_can(
    interleaved: bool, biased: tuple[bool, bool], same_order: bool
) -> None:
    def linear(number: int, out_features: int, in_features: int, *, bias: bool) -> Int4Linear:
        weight = random_weight(
            out_features, in_features, 8, act_order=True, seed=0 if same_order else number
        )
        return Int4Linear(weight, matrix(out_features, seed=number) if bias else None)

    gate, up = (linear(i, 16, 32, bias=bias) for i, bias in enumerate(biased))
    down = linear(2, 32, 16, bias=False)

    def activation(whole: torch.Tensor) -> torch.Tensor:
        first, second = (whole[..., ::2], whole[..., 1::2]) if interleaved else whole.chunk(2, -1)
        return first.tanh() * second

    expert = Expert(
        {"gate_proj": gate, "up_proj": up, "down_proj": down}, activation, interleaved=interleaved
    )
    inputs = matrix(5, 32)
    expected = down(gate(inputs).tanh() * up(inputs))
    torch.testing.assert_close(expert(inputs), expected)
    expert.join()
    assert hasattr(expert, "gate_up_proj") == (same_order and biased[0] == biased[1])
    torch.testing.assert_close(expert(inputs), expected)


# -- GPT-OSS as its authors published it -------------------------------------------------------


def mxfp4_folders(folder: Path) -> tuple[Path, Path]:
    """A tiny GPT-OSS with experts in MXFP4, and the same with those numbers written out."""
    zoo.tiny_model("gpt_oss", hidden_size=64, intermediate_size=32).save_pretrained(folder / "mx")
    zoo.tiny_model("gpt_oss", hidden_size=64, intermediate_size=32).save_pretrained(
        folder / "dense"
    )
    small, large = (load_file(folder / name / "model.safetensors") for name in ("mx", "dense"))
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([magnitudes, -magnitudes])
    for name in [name for name in large if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = small.pop(name).shape
        blocks = torch.randint(
            256, (experts, outer, inner // 32, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(
            122, 126, (experts, outer, inner // 32), generator=generator, dtype=torch.uint8
        )
        small |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
        rows = pairs.flatten(-2) * torch.exp2(scales.float() - 127).unsqueeze(-1)
        large[name] = rows.flatten(-2).transpose(1, 2).contiguous()
    for name, tensors in (("mx", small), ("dense", large)):
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "mx" / "config.json").read_text())
    described = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "mx" / "config.json").write_text(
        json.dumps(config | {"quantization_config": described})
    )
    return folder / "mx", folder / "dense"


def test_mxfp4_is_read_into_dense_experts_with_a_word_about_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = mxfp4_folders(tmp_path)
    with LLM(large, device="cpu", dtype="float32", kv_memory="4MiB") as llm:
        expected = llm.generate(PROMPTS, zoo.greedy(48))
    assert "MXFP4" not in caplog.text
    with LLM(small, device="cpu", dtype="float32", kv_memory="4MiB") as llm:
        found = llm.generate(PROMPTS, zoo.greedy(48))
        assert llm.loaded.model.dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert "four times the memory" in caplog.text
