"""Whole models through the quantiser, the writers and back, in the library and the command."""

import json
import random
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner
from vkv import LLM, SamplingParams
from vkv.quant import QuantError, adopt
from vkv.quant.quantise.layers import LayerInputs, perplexity, split_text
from vkv.quant.quantise.model import plan, quantize_model
from vkv.quant.quantise.rounding import Rounding
from vkv.quant.quantise.save import FORMATS, quantization_config, save_quantized
from vkv.runtime.cli import main as cli
from vkv.tiny_chat import model_path
from vkv.tiny_chat.calibration_text import conversation_text
from vkv.vmem.errors import BadCheckpoint, InvalidConfig

torch.set_num_threads(1)
GROUP_32 = Rounding(group_size=32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def text(tokenizer) -> str:
    return "".join(conversation_text(tokenizer, random.Random(i), 250) for i in range(8))


@pytest.fixture(scope="module")
def tokens(tokenizer, text) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return split_text(torch.tensor(ids), 256, 8)[0]


def tiny_chat() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32").eval()


def loaded(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    assert adopt(config, torch.device("cpu"))
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="float32").eval()


def run(*arguments: str | Path):
    return CliRunner().invoke(cli.app, ["quantize", *map(str, arguments)])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_what_is_written_is_read_back_to_the_bit(tmp_path, format, group_size, tokens):
    rounding = Rounding(group_size=group_size, symmetric=format != "awq")
    result = quantize_model(tiny_chat(), rounding=rounding)
    save_quantized(result, tmp_path / "out", format=format)
    model = loaded(tmp_path / "out")
    assert len(result.weights) == 28
    for name, weight in result.weights.items():
        read = model.get_submodule(name).weight_int4
        assert torch.equal(read.packed, weight.packed), name
        assert torch.equal(read.scales, weight.scales), name
        assert torch.equal(read.dequantize(), weight.dequantize()), name
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens[:1]).logits, result.model(tokens[:1]).logits, rtol=1e-4, atol=1e-4
        )
    # The head is tied to the embeddings, and both are as they were.
    assert torch.equal(model.get_input_embeddings().weight, tiny_chat().lm_head.weight)


def test_the_model_then_holds_the_dequantised_weights():
    model = tiny_chat()
    result = quantize_model(model, rounding=GROUP_32)
    for name, weight in result.weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.dequantize())
    error = result.errors[0]
    before = tiny_chat().get_submodule(error.name).weight.detach()
    after = result.weights[error.name].dequantize()
    assert error.weight == pytest.approx(float((after - before).norm() / before.norm()))
    assert error.output is None


def test_gptq_moves_the_outputs_of_the_model_less_than_rounding_does(tokens):
    with torch.no_grad():
        expected = tiny_chat()(tokens[:2]).logits
    errors, means = [], []
    for method in ("rtn", "gptq"):
        model = tiny_chat()
        result = quantize_model(model, method=method, rounding=GROUP_32, calibration=tokens)
        with torch.no_grad():
            errors.append(float((model(tokens[:2]).logits - expected).norm()))
        means.append(sum(error.output for error in result.errors) / len(result.errors))
        assert {error.method for error in result.errors} == {method}
    assert errors[1] < 0.9 * errors[0]
    assert means[1] < 0.7 * means[0]


def test_layers_run_one_at_a_time_give_what_the_model_gives(tokens):
    model = tiny_chat()
    inputs = LayerInputs.record(model, tokens[:2])
    for index, layer in enumerate(model.model.layers):
        inputs.advance(layer, index)
    with torch.no_grad():
        expected = model(tokens[:2], output_hidden_states=True).hidden_states[-1]
        found = model.model.norm(torch.cat(inputs.hidden))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3", "phi3", "gpt_neox", "olmo2"])
def test_other_architectures_are_gone_through_alike(model_type):
    model = zoo.tiny_model(model_type)
    tokens = torch.randint(0, zoo.VOCAB_SIZE, (6, 48))
    result = quantize_model(
        model, method="gptq", rounding=Rounding(group_size=8), calibration=tokens
    )
    assert {error.method for error in result.errors} == {"gptq"}
    assert max(error.output for error in result.errors) < 0.3
    assert not result.dense


def test_layers_that_do_not_divide_stay_dense_and_are_listed(tmp_path):
    rounding = Rounding(group_size=64)  # 160 input features do not divide, 128 and 384 do
    planned = plan(tiny_chat(), rounding)
    assert planned.num_linears == 8
    assert "model.layers.0.mlp.gate_proj" in planned.dense
    assert planned.head == "lm_head"
    with pytest.raises(QuantError, match="20 would stay dense, among them model"):
        quantization_config("gptq", rounding, planned.dense, planned.head)
    result = quantize_model(tiny_chat(), rounding=rounding)
    save_quantized(result, tmp_path / "out", format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {*planned.dense, "lm_head"}
    model = loaded(tmp_path / "out")
    before = tiny_chat().get_submodule(planned.dense[0]).weight
    assert torch.equal(model.get_submodule(planned.dense[0]).weight, before)


def test_what_cannot_be_quantised_is_refused_by_name():
    with pytest.raises(QuantError, match="in groups of 100"):
        quantize_model(tiny_chat(), rounding=Rounding(group_size=100))
    with pytest.raises(QuantError, match="needs a calibration text"):
        quantize_model(tiny_chat(), method="gptq")
    with pytest.raises(QuantError, match="the method is 'best'"):
        quantize_model(tiny_chat(), method="best")  # type: ignore[arg-type]
    with pytest.raises(QuantError, match="has 100 tokens; it takes at least 128"):
        split_text(torch.arange(100), 64, 8)


def test_text_is_split_into_a_body_and_a_tail_held_out():
    body, tail = split_text(torch.arange(1000), 10, 30)
    assert body.shape == (30, 10)
    assert tail.shape == (10, 10)
    assert body[0, 0] == 0
    assert body.max() < tail.min() == 900


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary():
    model = tiny_chat()
    model.model.norm.weight.data.zero_()
    tokens = torch.randint(0, 1536, (2, 20))
    assert perplexity(model, tokens) == pytest.approx(1536, rel=1e-3)


def test_the_command_writes_a_folder_that_vkv_runs(tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "out"
    options = ["--method", "gptq", "--group", "32", "--calibration", tmp_path / "text.txt"]
    result = run(model_path(), out, *options, "--sequence-tokens", "256")
    assert result.exit_code == 0, result.output
    assert "perplexity on the text's tail" in result.output
    assert "0.5 MiB, where 16 bits took 1.9 MiB" in result.output
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    report = json.loads((out / "quantization_report.json").read_text())
    assert len(report["layers"]) == 28
    assert report["perplexity_before"] != report["perplexity_after"]
    rounded = report["perplexity_activation_bits_8"]
    assert rounded != report["perplexity_after"]
    assert rounded == pytest.approx(report["perplexity_after"], rel=0.05)
    assert f"with activation_bits=8 besides: {rounded:.4g}" in result.output
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.qweight"].dtype == (
        torch.int32
    )
    with LLM(out, device="cpu", kv_memory="16MiB") as llm:
        messages = [{"role": "user", "content": "my gate code is 4821"}]
        messages += [{"role": "assistant", "content": "okay, noted."}]
        messages += [{"role": "user", "content": "what is my gate code?"}]
        (output,) = llm.chat([messages], SamplingParams(temperature=0, max_tokens=20))
    assert "4821" in output.outputs[0].text


def test_the_command_says_what_it_does_not_measure(tmp_path, text):
    """Experts are tensors while they are quantised, of which no module has the inputs."""
    source, out = tmp_path / "source", tmp_path / "out"
    zoo.tiny_model("qwen3_moe", vocab_size=1536).save_pretrained(source)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(source)
    (tmp_path / "text.txt").write_text(text[:4000])
    options = ["--group", "8", "--calibration", tmp_path / "text.txt", "--sequence-tokens", "64"]
    result = run(source, out, "--method", "rtn", *options)
    assert result.exit_code == 0, result.output
    assert "with activation_bits=8 besides: not measured, of mixtures of experts" in result.output
    report = json.loads((out / "quantization_report.json").read_text())
    assert "perplexity_after" in report
    assert "perplexity_activation_bits_8" not in report


def test_the_command_says_what_is_wrong(tmp_path):
    def message(*arguments: str | Path, error: type[Exception]) -> str:
        result = run(*arguments)
        assert isinstance(result.exception, error), result.output
        return str(result.exception)

    tiny, out = model_path(), tmp_path / "out"
    assert "--calibration" in message(tiny, out, "--method", "gptq", error=InvalidConfig)
    assert "gguf" in message(tiny, out, "--format", "gguf", error=InvalidConfig)
    assert "method is 'x'" in message(tiny, out, "--method", "x", error=InvalidConfig)
    assert "stay dense" in message(tiny, out, error=InvalidConfig)
    assert not out.exists()
    missing = tmp_path / "none.txt"
    options = ("--group", "32", "--calibration", missing)
    assert "none.txt" in message(tiny, out, *options, error=InvalidConfig)
    (tmp_path / "file").write_text("here already")
    occupied = message(tiny, tmp_path / "file", "--group", "32", error=InvalidConfig)
    assert "exists and is not empty" in occupied
    nowhere = message(tiny, tmp_path / "file" / "out", "--group", "32", error=InvalidConfig)
    assert "cannot be written to" in nowhere
    assert run(tiny, out, "--group", "32").exit_code == 0
    assert "quantised already" in message(out, tmp_path / "again", error=BadCheckpoint)


@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
def test_dense_layers_outside_the_decoder_are_named_and_read_back(tmp_path, format):
    """A vision tower and its projections are not taken for 4-bit ones."""
    model = zoo.gemma3()
    rounding = Rounding(group_size=8, symmetric=format != "awq")
    planned = plan(model, rounding)
    outside = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "vision" in name
    }
    assert len(outside) > 10
    assert outside <= set(planned.dense)
    with pytest.raises(QuantError, match=r"would stay dense, among them model\.vision_tower"):
        quantization_config("gptq", rounding, planned.dense, planned.head)
    result = quantize_model(model, rounding=rounding)
    save_quantized(result, tmp_path / "out", format=format)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    listed = config["modules_to_not_convert"] if format == "awq" else config["ignore"]
    assert set(listed) == {*planned.dense, "lm_head"}
    again = loaded(tmp_path / "out")
    for name, weight in result.weights.items():
        assert torch.equal(again.get_submodule(name).weight_int4.dequantize(), weight.dequantize())
    for name in outside:
        assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight)


def test_the_command_does_not_quantise_noise(tmp_path):
    """Tensors that are missing would be filled with it."""
    source = tmp_path / "source"
    tiny_chat().save_pretrained(source)
    held = load_file(source / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    result = run(source, tmp_path / "out", "--group", "32")
    assert isinstance(result.exception, BadCheckpoint), result.output
    assert "model.layers.1.mlp.up_proj.weight" in str(result.exception)
