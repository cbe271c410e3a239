"""Folders of models for text beside images or sound: their text runs as the whole model's does."""

import json
from pathlib import Path

import pytest
import torch
import zoo
from multimodal_zoo import NAMES, text_prompts, tiny_multimodal
from quantized import quantize_folder
from safetensors.torch import load_file
from transformers import PreTrainedModel
from typer.testing import CliRunner
from vkv import LLM
from vkv.quant import Experts
from vkv.quant.quantise.model import quantize_model
from vkv.quant.quantise.rounding import Rounding
from vkv.runtime.cli import main as cli
from vkv.runtime.cpu_kernels.packing import int4_products
from vkv.runtime.model.loading import load_tokenizer
from vkv.vmem.errors import BadCheckpoint, UnsupportedModel

LENGTHS = [5, 40, 1, 17]


def scores_of(
    source: Path | PreTrainedModel, prompts: list[list[int]], count: int = 12
) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens of each prompt, and all log probabilities, [count, vocab]."""
    options = {"max_batch_tokens": 11, "max_len": 128, "kv_memory": "4MiB"}
    with LLM(source, device="cpu", dtype="float32", **options) as llm:
        outs = llm.generate(prompts, zoo.greedy(count, logprobs=zoo.VOCAB_SIZE))
    found = []
    for out in outs:
        tables = out.outputs[0].logprobs
        assert tables is not None
        scores = [[table[i].logprob for i in range(zoo.VOCAB_SIZE)] for table in tables]
        found.append((list(out.outputs[0].token_ids), torch.tensor(scores)))
    return found


@pytest.mark.parametrize("model_type", NAMES)
def test_a_folders_text_runs_as_the_whole_models(tmp_path: Path, model_type: str) -> None:
    model = tiny_multimodal(model_type)
    model.save_pretrained(tmp_path)
    prompts = text_prompts(LENGTHS)
    found = scores_of(tmp_path, prompts)
    for prompt, (tokens, scores) in zip(prompts, found, strict=True):
        expected = zoo.full_logits(model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        assert tokens == expected.argmax(-1).tolist()
        torch.testing.assert_close(scores, expected.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert len({token for tokens, _ in found for token in tokens}) > 8, "they say something"


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("paligemma", r"it is not causal; use a model with causal"),
        ("mllama", r"2 layers that should attend, of which 1 .*: use a model in which all attend"),
    ],
)
def test_what_cannot_run_is_refused_by_name(tmp_path: Path, model_type: str, message: str) -> None:
    tiny_multimodal(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        LLM(tmp_path, device="cpu", dtype="float32")


def test_encoders_with_decoders_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "florence2"}))
    with pytest.raises(UnsupportedModel, match="florence2 has no causal language model"):
        LLM(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("llava", "gptq"),
        ("mistral3", "awq"),
        ("qwen2_5_vl", "compressed-tensors"),
        ("qwen3_vl_moe", "gptq"),
        ("qwen3_5_moe", "awq"),
        ("voxtral", "awq"),
        ("qwen3_5", "compressed-tensors"),
    ],
)
def test_their_text_in_4_bits(tmp_path: Path, model_type: str, kind: str) -> None:
    """With a dense tower, under the names of published folders."""
    tiny_multimodal(model_type).save_pretrained(tmp_path / "source")
    int4, same = quantize_folder(tmp_path / "source", tmp_path, kind, group_size=8)
    prompts = text_prompts([5, 23])
    found, expected = scores_of(int4, prompts, 32), scores_of(same, prompts, 32)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    with LLM(int4, device="cpu", kv_memory="4MiB") as llm:
        kinds = {type(module) for module in llm.loaded.model.modules()}
        assert list(int4_products(llm.loaded.model))
        assert (Experts in kinds) == model_type.endswith("moe")


def test_a_config_that_speaks_of_4_bits_in_its_texts_part(tmp_path: Path) -> None:
    tiny_multimodal("qwen2_5_vl").save_pretrained(tmp_path / "source")
    int4, same = quantize_folder(tmp_path / "source", tmp_path, "gptq", group_size=8)
    config = json.loads((int4 / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (int4 / "config.json").write_text(json.dumps(config))
    prompts = text_prompts([5])
    (found, _), (expected, _) = scores_of(int4, prompts)[0], scores_of(same, prompts)[0]
    assert found == expected
    done = CliRunner().invoke(cli.app, ["quantize", str(int4), str(tmp_path / "out")])
    assert "quantised already" in str(done.exception)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "qwen3_vl_moe"])
def test_the_command_quantises_their_text(tmp_path: Path, model_type: str) -> None:
    model = zoo.gemma3() if model_type == "gemma3" else tiny_multimodal(model_type)
    model.save_pretrained(tmp_path / "source")
    arguments = [tmp_path / "source", tmp_path / "out", "--group", "8"]
    arguments += ["--format", "compressed-tensors"]
    done = CliRunner().invoke(cli.app, ["quantize", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    names = load_file(tmp_path / "out" / "model.safetensors")
    towers = [name for name in names if "vis" in name and name.endswith("weight")]
    assert len(towers) > 10
    with LLM(tmp_path / "out", device="cpu", kv_memory="4MiB") as llm:
        kinds = {type(module) for module in llm.loaded.model.modules()}
        assert (Experts in kinds) == (model_type == "qwen3_vl_moe")
        assert list(int4_products(llm.loaded.model))
    quantize_model(model, rounding=Rounding(group_size=8))  # which holds the same numbers then
    prompts = text_prompts([5, 23])
    found, expected = scores_of(tmp_path / "out", prompts, 32), scores_of(model, prompts, 32)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


def test_the_chat_template_that_a_processor_kept(tmp_path: Path) -> None:
    tokenizer = zoo.letter_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    found = load_tokenizer(tmp_path)
    assert found is not None
    assert found.chat_template == template
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="cannot read the chat template"):
        load_tokenizer(tmp_path)
