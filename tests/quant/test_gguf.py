"""GGUF files: the weights of the file, exactly, its tokenizer, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import gguf
import gguf_zoo
import numpy as np
import pytest
import torch
import zoo
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from vkv import LLM
from vkv.quant import Int4Linear
from vkv.quant.gguf_files import load_gguf, load_gguf_tokenizer
from vkv.runtime.model.fingerprint import model_files
from vkv.runtime.model.loading import load_model
from vkv.vmem.errors import BadCheckpoint, UnsupportedModel

CPU = torch.device("cpu")


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("architecture", gguf_zoo.ARCHITECTURES)
def test_the_logits_of_the_files_own_weights(
    architecture: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.gguf"
    reference = gguf_zoo.make(architecture, path, kind)
    with caplog.at_level(logging.WARNING):
        model = load_gguf(path, torch.float32, "eager")
    ids = torch.tensor([zoo.random_prompts([40])[0]])
    expected = reference(ids).logits
    torch.testing.assert_close(
        model(ids).logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max()
    )
    exact = [name for name, module in model.named_modules() if isinstance(module, Int4Linear)]
    assert bool(exact) == (kind in ("Q4_0", "Q4_1", "Q8_0"))
    if architecture == "qwen3moe" and exact:
        assert any(".experts.3." in name for name in exact), "experts too"
    assert ("dequantised" in caplog.text) == (kind != "F32"), "a word about memory"


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_codes_and_scales_are_the_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    reference = gguf_zoo.make("llama", path, kind)
    model: Any = load_gguf(path, torch.bfloat16, "eager")
    for name in ("q_proj", "k_proj", "o_proj"):  # rows of the first two are in another order there
        linear = getattr(model.model.layers[1].self_attn, name)
        weight = linear.weight_int4.dequantize(torch.float64)
        expected = getattr(reference.model.layers[1].self_attn, name).weight.double()
        assert torch.equal(weight, expected)


def test_k_quants_are_dequantised(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (3, 210), dtype=np.uint8)  # blocks of 256
    data[:, 208:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "one.gguf").tensors
    from vkv.quant import gguf_files

    found = gguf_files._dequantized(tensor, tmp_path)
    assert found.shape == (3, 256)
    scales = data[0, 192:208].view(np.int8).astype(np.float32)
    low = (data[0, 0] & 15) | ((data[0, 128] & 3) << 4)  # the first element's six bits
    assert found[0, 0] == pytest.approx(np.float32(np.float16(0.01)) * scales[0] * (int(low) - 32))


def test_an_llm_takes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    reference = gguf_zoo.make("llama", path, "Q8_0")
    loaded = load_model(path, device=CPU, dtype="float32")
    assert loaded.tokenizer is None
    prompts = zoo.random_prompts([30, 5])
    with LLM(path, dtype="float32") as llm:
        outs = llm.generate(prompts, zoo.greedy(10))
    for prompt, out in zip(prompts, outs, strict=True):
        assert list(out.outputs[0].token_ids) == zoo.generate_alone(reference, prompt, 10)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_an_output_layer_in_another_part_is_not_tied(kind: str, tmp_path: Path) -> None:
    reference = gguf_zoo.make("llama", tmp_path / "model.gguf", kind, split=8)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) > 1
    assert "output.weight" not in [tensor.name for tensor in gguf.GGUFReader(parts[0]).tensors]
    model: Any = load_gguf(parts[0], torch.float32, "eager")
    ids = torch.tensor([zoo.random_prompts([40])[0]])
    expected = reference(ids).logits
    torch.testing.assert_close(
        model(ids).logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max()
    )
    assert [file.path for file in model_files(parts[0])] == parts, "all of them tell models apart"


# -- the tokenizer ---------------------------------------------------------------------------------

TEXTS = [
    "Hello, world!  It's 12345 o'clock\n\n\tnow",
    "naïve café — 你好 🙂",
    "a<|end|>b  ",
    "x=[1,2]",
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*TEXTS, *(str(n) for n in range(2000))], trainer)
    return tokenizer


def tokenizer_fields(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    import json

    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    end = state["vocab"]["<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i == end else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|end|>",
    }


@pytest.mark.parametrize(
    ("pre", "split"), [("llama-bpe", LLAMA_3), ("qwen2", LLAMA_3.replace("{1,3}", ""))]
)
def test_the_tokenizer_is_the_files(pre: str, split: str, tmp_path: Path) -> None:
    source = byte_level(split)
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **tokenizer_fields(source, pre))
    found = load_gguf_tokenizer(path)
    for text in TEXTS:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == source.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == text
    assert found("a")["input_ids"] == source.encode("a").ids, "no token is put in front"
    assert found.eos_token == "<|end|>"
    assert found.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi<|end|>"
    assert load_gguf(path, None, "eager").config.eos_token_id == [found.eos_token_id]


def test_a_token_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    source = byte_level(LLAMA_3)
    fields = tokenizer_fields(source, "llama-bpe")
    begin = fields["tokenizer.ggml.eos_token_id"]
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **fields, **{"tokenizer.ggml.bos_token_id": begin})
    assert load_gguf_tokenizer(path)("a")["input_ids"] == [begin, *source.encode("a").ids]


@pytest.mark.parametrize(("pre", "is_whole"), [("llama-bpe", True), ("qwen2", False)])
def test_a_word_that_no_merge_leads_to(pre: str, is_whole: bool, tmp_path: Path) -> None:
    """It is a token to Llama 3, whose words are looked up before they are put together."""
    fields = tokenizer_fields(byte_level(LLAMA_3), pre)
    fields["tokenizer.ggml.tokens"].append("quxzq")
    fields["tokenizer.ggml.token_type"].append(1)
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **fields)
    ids = load_gguf_tokenizer(path)("quxzq", add_special_tokens=False)["input_ids"]
    assert (ids == [len(fields["tokenizer.ggml.tokens"]) - 1]) == is_whole
    assert is_whole or len(ids) > 1


def test_a_tokenizer_beside_the_file_is_not_taken(tmp_path: Path) -> None:
    source = byte_level(LLAMA_3)
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **tokenizer_fields(source, "llama-bpe"))
    other = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    other.save(str(tmp_path / "tokenizer.json"))
    found = load_gguf_tokenizer(path)
    for text in TEXTS:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == source.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_space_in_front_is_the_files_to_say(prefix: bool | None, tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab"]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if prefix is not None:
        fields["tokenizer.ggml.add_space_prefix"] = prefix
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **fields)
    found = load_gguf_tokenizer(path)
    ids = found("ab", add_special_tokens=False)["input_ids"]
    assert [tokens[i] for i in ids] == (["ab"] if prefix is False else ["▁ab"])
    assert found("ab")["input_ids"] == [1, *ids]
    assert found.decode(ids) == "ab"
    if prefix is False:
        assert found.decode(found(" ab", add_special_tokens=False)["input_ids"]) == " ab"


def test_another_way_to_cut_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **tokenizer_fields(byte_level(LLAMA_3), "poro-chat"))
    with pytest.raises(UnsupportedModel, match=r"'poro-chat'.*pass tokenizer="):
        load_gguf_tokenizer(path)


# -- refusals --------------------------------------------------------------------------------------


def test_what_a_file_says_and_nobody_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **{"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedModel, match=r"llama\.rope\.scaling\.type to 'yarn'"):
        load_gguf(path, None, "eager")


@pytest.mark.parametrize(
    ("key", "found"), [("rope.dimension_count", 8), ("attention.value_length", 32)]
)
def test_heads_that_are_read_otherwise_are_refused(key: str, found: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_zoo.make("qwen3", path, "F32", **{f"qwen3.{key}": found})
    with pytest.raises(UnsupportedModel, match=rf"qwen3\.{key} to {found}.*have 16 elements"):
        load_gguf(path, None, "eager")


@pytest.mark.parametrize(
    ("architecture", "key", "tensor"),
    [
        ("qwen2", "attention.head_count_kv", r"attn_k"),
        ("llama", "feed_forward_length", r"ffn_"),
        ("qwen3moe", "expert_feed_forward_length", r"ffn_\w+_exps"),
        ("qwen3moe", "expert_count", r"mlp\.gate\.weight"),
    ],
)
def test_codes_of_another_shape_than_the_headers_are_refused(
    architecture: str, key: str, tensor: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    gguf_zoo.make(architecture, path, "Q8_0")
    (field,) = (f for n, f in gguf.GGUFReader(path).fields.items() if n.endswith(key))
    content = bytearray(path.read_bytes())
    start = field.offset + sum(part.nbytes for part in field.parts[:-1])
    content[start : start + 4] = (2 * int(field.contents())).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=rf"{tensor}.* is \["):
        load_gguf(path, torch.float32, "eager")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "F32", **{"general.type": "adapter"})
    with pytest.raises(UnsupportedModel, match="holds an adapter"):
        load_gguf(path, None, "eager")
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="architecture 'mamba'"):
        load_gguf(path, None, "eager")


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_zoo.make("llama", path, "Q8_0")
    whole = path.read_bytes()
    for content in (whole[:-5000], whole[:300], whole[:20], b"PK" + whole[2:], b""):
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint, match="download it again"):
            load_gguf(path, None, "eager")
    path.unlink()
    with pytest.raises(BadCheckpoint, match="is not there"):
        load_gguf(path, None, "eager")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(whole)
    with pytest.raises(BadCheckpoint, match=r"-00002-of-00002\.gguf is not there"):
        load_gguf(tmp_path / "m-00001-of-00002.gguf", None, "eager")


@torch.inference_mode()
def test_rotary_factors_of_llama_3_are_read_and_others_refused(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # What llama.cpp's converter writes for a head of 16, by the formula of Llama 3's own code.
    turns = 8192 * 10_000.0 ** (-torch.arange(0, 16, 2) / 16) / (2 * torch.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    factors = 1 / ((1 - smooth) / 32 + smooth)
    assert len(factors.unique()) > 2, "some frequencies are between"
    path = tmp_path / "model.gguf"
    reference = gguf_zoo.make("llama", path, "F32", rope=rope, rope_factors=factors)
    model: Any = load_gguf(path, torch.float32, "eager")
    assert model.config.rope_parameters == rope
    ids = torch.tensor([zoo.random_prompts([300])[0]])
    expected = reference(ids).logits
    atol = 1e-5 * expected.abs().max()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=atol)
    gguf_zoo.make("llama", path, "F32", rope_factors=factors + 1)
    with pytest.raises(UnsupportedModel, match="factors that are not Llama 3's"):
        load_gguf(path, None, "eager")


def test_q4_1_keeps_its_offsets_and_is_close_to_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    reference = gguf_zoo.make("llama", path, "Q4_1")
    model: Any = load_gguf(path, torch.bfloat16, "eager")
    linear = model.model.layers[0].mlp.down_proj
    assert linear.offsets.dtype == torch.float32
    assert model.to(torch.bfloat16).model.layers[0].mlp.down_proj.offsets.dtype == torch.float32
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = x.double() @ reference.model.layers[0].mlp.down_proj.weight.double().T
    torch.testing.assert_close(linear(x).double(), exact, rtol=2**-7, atol=2**-7)
    with LLM(path) as llm:
        first = [out.outputs[0].token_ids for out in llm.generate(zoo.random_prompts([9, 30]))]
    assert all(first)
