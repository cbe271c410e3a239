"""GGUF files: the model, its weights and its tokenizer from the one file that llama.cpp reads.

The `gguf` package reads the container, `transformers` knows what configs and tensors are called.
Linears in Q4_0, Q4_1 and Q8_0 stay as they are, exactly, in groups of 32. All else
is dequantised tensor by tensor, from the mapped file, with a word about the memory that takes. What
this module does not know of a file, and could change a result, is refused by name.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights

from ..vmem.errors import BadCheckpoint, UnsupportedModel
from .experts import Expert, Experts, FusedExperts, Role
from .int8 import int8_weight
from .linear import Int4Linear
from .offset_linear import OffsetLinear
from .weight import SYMMETRIC_ZERO, Int4Weight

_log = logging.getLogger(__name__)

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3")
_GROUP = 32  # inputs of a block, in the types that are kept
_EXACT = ("Q4_0", "Q4_1", "Q8_0")
# Of an architecture's keys, beside those that make its config: they say nothing that is not there.
_HARMLESS_KEYS = frozenset(
    (
        *("attention.key_length", "attention.value_length", "rope.dimension_count"),
        *("vocab_size", "attention.layer_norm_rms_epsilon", "expert_feed_forward_length"),
        *("attention.sliding_window", "rope.scaling.finetuned"),
    )
)
_SPLITS = {  # how text is cut before merges, by `tokenizer.ggml.pre`
    "llama": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_PRE = {
    "llama-bpe": "llama",
    "llama3": "llama",
    "llama-v3": "llama",
    "qwen2": "qwen",
    "deepseek-r1-qwen": "qwen",
}


def is_gguf(home: str | Path) -> bool:
    """Whether a model's source is a GGUF file, by its name."""
    return str(home).endswith(".gguf")


class GgufFile:
    """An open file, or the parts that one was split in.

    Raises BadCheckpoint for what is no whole GGUF file, UnsupportedModel for one of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._readers = [_open(part) for part in parts_of(path)]
        self.fields = self._readers[0].fields
        found = sum(len(reader.tensors) for reader in self._readers)
        wanted = self.value("split.tensors.count", found)
        if found != wanted:
            raise BadCheckpoint(f"{path} has {found} of the {wanted} tensors that it should have")
        self.architecture: str = self.value("general.architecture", "")
        kind = self.value("general.type", "model")
        if kind != "model" or self.architecture == "clip":
            raise UnsupportedModel(
                f"{path} holds {'a vision tower' if kind != 'adapter' else 'an adapter'}, not a "
                "model by itself; give the GGUF file of the language model"
            )
        if self.architecture not in _ARCHITECTURES:
            raise UnsupportedModel(
                f"{path} is of architecture {self.architecture!r}, and GGUF files are read of "
                f"{', '.join(_ARCHITECTURES)}; use the model's folder with *.safetensors"
            )

    def value(self, key: str, default: Any = None) -> Any:
        """What a key of the header says."""
        field = self.fields.get(key)
        return default if field is None else field.contents()

    def tensors(self) -> Iterator[Any]:
        """The `gguf` package's, mapped and not read."""
        for reader in self._readers:
            yield from reader.tensors


def load_gguf(path: Path, dtype: torch.dtype | None, attention: str) -> PreTrainedModel:
    """The model of a GGUF file. `dtype` None is bfloat16."""
    file = GgufFile(path)
    dtype = dtype or torch.bfloat16
    config = _config(file)
    with no_init_weights():  # parameters that nobody writes to take no memory
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.eos_token_id = config.eos_token_id
    _fill(model, file, dtype)
    return model


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, with its chat template; None if it has none."""
    file = GgufFile(path)
    kind = file.value("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    pre = file.value("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and pre not in _PRE:
        raise UnsupportedModel(
            f"{path} cuts text as {pre!r} does (tokenizer.ggml.pre), which is not known here, and "
            "other tokens would be other answers; pass tokenizer= with the model's own folder"
        )
    # In a folder of its own: a tokenizer.json beside the file would be taken instead.
    with TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path.absolute())
        tokenizer: Any = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
    tokenizer.name_or_path = str(path.parent)
    if kind == "gpt2":
        _set_byte_level(tokenizer.backend_tokenizer, file, _PRE[pre])
    elif kind == "llama" and not file.value("tokenizer.ggml.add_space_prefix", True):
        _leave_beginning(tokenizer.backend_tokenizer)
    tokenizer.chat_template = file.value("tokenizer.chat_template")
    return tokenizer


def _set_byte_level(backend: Any, file: GgufFile, kind: str) -> None:
    """How text is normalised and cut, and whether it begins with a token of its own."""
    from tokenizers import Regex, normalizers, pre_tokenizers, processors

    backend.normalizer = normalizers.NFC() if kind == "qwen" else None
    backend.model.ignore_merges = kind == "llama"  # a word that is a token is that token
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLITS[kind]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    begin = file.value("tokenizer.ggml.bos_token_id")
    if begin is not None and file.value("tokenizer.ggml.add_bos_token", kind == "llama"):
        token = backend.id_to_token(begin)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, begin)]
        )


def _leave_beginning(backend: Any) -> None:
    """No space in front of a text, where a tokenizer of SentencePiece's kind puts one."""
    from tokenizers import decoders, pre_tokenizers

    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):  # Gemma's puts none
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


# -- the container -------------------------------------------------------------------------------


def parts_of(path: Path) -> list[Path]:
    """The file, or all that it was split in, of which the first was given."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    return [path.with_name(f"{stem}-{i + 1:05d}-of-{count}.gguf") for i in range(int(count))]


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UnsupportedModel(
            f"{path} is a GGUF file, and the package that reads them is not installed; "
            "pip install 'vkv[gguf]'"
        ) from error
    if not path.is_file():
        raise BadCheckpoint(f"{path} is not there; give a GGUF file with all its parts beside it")
    with path.open("rb") as opened:
        head = opened.read(8)
    if head[:4] != b"GGUF":
        raise BadCheckpoint(f"{path} does not begin as a GGUF file does; download it again")
    if head[4:8] == head[4:8][::-1] or head[4] == 0:
        raise UnsupportedModel(f"{path} is big-endian; use one for little-endian machines")
    try:
        reader = GGUFReader(path)
        end = max((t.data_offset + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise BadCheckpoint(
            f"{path} is damaged or cut short: {error}; download it again"
        ) from error
    if end > path.stat().st_size:
        raise BadCheckpoint(f"{path} is cut short; download it again")
    return reader


# -- the config ----------------------------------------------------------------------------------


def _config(file: GgufFile) -> Any:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    arch = file.architecture
    known = GGUF_CONFIG_MAPPING[arch.replace("qwen3moe", "qwen3_moe")].keys() | _HARMLESS_KEYS
    for key in file.fields:
        name = key.removeprefix(f"{arch}.")
        if key.startswith(f"{arch}.") and name not in known:
            raise UnsupportedModel(
                f"{file.path} sets {key} to {file.value(key)!r}, which nothing here reads, and it "
                "may change what the model computes; use the model's folder with *.safetensors"
            )
    _check_heads(file, arch)
    config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    # Of all parts: `transformers` looks for an output layer in the first alone.
    config.tie_word_embeddings = all(tensor.name != "output.weight" for tensor in file.tensors())
    ends = [file.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None] or None
    config.bos_token_id = file.value("tokenizer.ggml.bos_token_id")
    head_dim = file.value(f"{arch}.attention.key_length")
    if head_dim is not None:
        config.head_dim = head_dim
    if (width := file.value(f"{arch}.expert_feed_forward_length")) is not None:
        config.moe_intermediate_size = width
    return config


def _check_heads(file: GgufFile, arch: str) -> None:
    """Refuse heads that are rotated in part, or whose values have another size than their keys."""
    width = file.value(f"{arch}.embedding_length", 0)
    heads = file.value(f"{arch}.attention.head_count", 1)
    head_dim = file.value(f"{arch}.attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := file.value(f"{arch}.{name}", head_dim)) != head_dim:
            raise UnsupportedModel(
                f"{file.path} sets {arch}.{name} to {found}, and its heads have {head_dim} "
                "elements; heads of one size, rotated whole, are read: use the model's folder"
            )


# -- the tensors ---------------------------------------------------------------------------------


def _fill(model: PreTrainedModel, file: GgufFile, dtype: torch.dtype) -> None:
    """Give the model its weights."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(
        config=model.config.to_dict()
    )
    names = get_gguf_hf_weights_map(model, processor)
    experts = _experts_in_codes(model, file)
    merged: dict[str, Any] = {"tensors": {}}  # experts, which the file keeps role by role
    missing = {name for name, _ in model.named_parameters()}
    missing -= {f"{layer}.{part}" for layer in experts for part in ("gate_up_proj", "down_proj")}
    widened = [0, 0]  # bytes of quantised tensors, as they are and dequantised
    for tensor in file.tensors():
        if tensor.name == "rope_freqs.weight":
            _check_rope(model, file, tensor)
            continue
        if (place := _expert_role(tensor)) is not None and place[0] in experts:
            experts[place[0]][place[1]] = tensor
            continue
        if tensor.name not in names and "_exps." not in tensor.name:
            raise UnsupportedModel(
                f"{file.path} has tensor {tensor.name}, which {type(model).__name__} has no place "
                "for; without it another result would come: use the model's folder"
            )
        name = names.get(tensor.name, "")
        layer, _, last = name.rpartition(".")
        module = model.get_submodule(layer) if layer and name in missing else None
        if type(module) is nn.Linear and last == "weight":
            exact = _exactly(tensor, processor, module, file.path)
            if exact is not None:
                model.set_submodule(layer, exact)
                missing.discard(name)
                continue
        values = _dequantized(tensor, file.path)
        done = processor.process(
            weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=merged
        )
        if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
            widened[0] += int(tensor.n_bytes)
            widened[1] += math.prod(int(n) for n in tensor.shape) * dtype.itemsize
        if done.name in names:
            _assign(model, names[done.name], torch.from_numpy(np.array(done.weights)), dtype, file)
            missing.discard(names[done.name])
    for name, values in merged["tensors"].items():
        _assign(model, name, torch.as_tensor(np.asarray(values)), dtype, file)
        missing.discard(name)
    _finish(model, file, experts, missing, widened)


def _finish(
    model: PreTrainedModel,
    file: GgufFile,
    experts: Mapping[str, Mapping[Role, Any]],
    missing: set[str],
    widened: Sequence[int],
) -> None:
    """Put experts in their places, see that nothing is missing, and say what was dequantised."""
    for layer, tensors in experts.items():
        fused = FusedExperts.of(model.get_submodule(layer))
        assert fused is not None, "_experts_in_codes has looked"
        for role, tensor in tensors.items():
            shape = (fused.num_experts, *fused.weight(role, 0).shape)
            _check_shape(tensor, shape, file.path)
        model.set_submodule(layer, _experts(fused, tensors))
    model.tie_weights()
    if model.config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing:
        raise BadCheckpoint(f"{file.path} lacks {len(missing)} tensors, among them {min(missing)}")
    if widened[1]:
        _log.warning(
            "%s: tensors of %.1f GiB were dequantised and take %.1f GiB; linear layers in Q4_0, "
            "Q4_1 and Q8_0 stay as they are",
            file.path.name,
            widened[0] / 2**30,
            widened[1] / 2**30,
        )


def _assign(
    model: PreTrainedModel, name: str, values: torch.Tensor, dtype: torch.dtype, file: GgufFile
) -> None:
    layer, _, last = name.rpartition(".")
    module = model.get_submodule(layer)
    if isinstance(module, OffsetLinear):
        module = module.codes  # whose bias it is
    held = getattr(module, last)
    if held.shape != values.shape:
        raise BadCheckpoint(
            f"{file.path}: {name} is {list(values.shape)}, and the model's is {list(held.shape)}"
        )
    setattr(module, last, nn.Parameter(values.to(dtype), requires_grad=False))


def _expert_role(tensor: Any) -> tuple[str, Role] | None:
    """Whose experts a tensor belongs to, and what it is of each; None if it is none of theirs."""
    match = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", tensor.name)
    if match is None:
        return None
    roles: dict[str, Role] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return f"model.layers.{match[1]}.mlp.experts", roles[match[2]]


def _experts_in_codes(model: PreTrainedModel, file: GgufFile) -> dict[str, dict[Role, Any]]:
    """The layers whose experts are all in codes, with no tensor of theirs as yet."""
    kinds: dict[str, dict[Role, bool]] = {}
    for tensor in file.tensors():
        if (place := _expert_role(tensor)) is not None:
            is_whole = int(tensor.shape[0]) % _GROUP == 0
            exact = tensor.tensor_type.name in _EXACT and is_whole
            kinds.setdefault(place[0], {})[place[1]] = exact
    whole = [layer for layer, exact in kinds.items() if len(exact) == 3 and all(exact.values())]
    return {layer: {} for layer in whole if FusedExperts.of(model.get_submodule(layer))}


def _experts(fused: FusedExperts, tensors: Mapping[Role, Any]) -> Experts:
    """Experts with linears of their own, from tensors [experts, out, in]."""
    activation = fused.activation()
    experts = []
    for number in range(fused.num_experts):
        linears: dict[Role, nn.Module] = {
            role: _of_blocks(tensor.tensor_type.name, torch.from_numpy(tensor.data[number].copy()))
            for role, tensor in tensors.items()
        }
        experts.append(Expert(linears, activation, interleaved=False))
        experts[-1].join()
    fused.release()
    return Experts(experts)


def _exactly(tensor: Any, processor: Any, linear: nn.Linear, path: Path) -> nn.Module | None:
    """A linear in Q4_0, Q4_1 or Q8_0 by its codes; None for another type."""
    kind = tensor.tensor_type.name
    rows, columns = int(tensor.shape[1]), int(tensor.shape[0])
    if kind not in _EXACT or columns % _GROUP:
        return None
    _check_shape(tensor, linear.weight.shape, path)
    order = processor.process(weights=np.arange(rows).reshape(rows, 1), name=tensor.name)
    data = torch.from_numpy(np.array(tensor.data))
    return _of_blocks(kind, data[torch.from_numpy(np.array(order.weights)).flatten()], linear.bias)


def _check_shape(tensor: Any, wanted: Sequence[int], path: Path) -> None:
    """Refuse a tensor of another shape than the header makes the model's."""
    found = [int(size) for size in reversed(tensor.shape)]
    if found != list(wanted):
        raise BadCheckpoint(
            f"{path}: {tensor.name} is {found}, and by the file's header {list(wanted)}; download "
            "it again"
        )


def _of_blocks(
    kind: str, data: torch.Tensor, bias: torch.Tensor | None = None
) -> Int4Linear | OffsetLinear:
    """A linear of the bytes of its rows, uint8 [out_features, bytes], in a type of `_EXACT`."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = data.view(len(data), -1, size)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if kind == "Q8_0":
        values = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
        return Int4Linear(int8_weight(values, scales), bias)
    packed = blocks[..., -_GROUP // 2 :]  # the first sixteen of a block are low halves
    codes = torch.cat([packed & 15, packed >> 4], dim=-1).flatten(1)
    if kind == "Q4_0":
        return Int4Linear(Int4Weight.from_codes(codes, scales, None), bias)
    least = blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1)
    # From the middle of the codes: the two products are then no larger than their sum.
    middle = least.float() + SYMMETRIC_ZERO * scales.float()
    return OffsetLinear(Int4Weight.from_codes(codes, scales, None), middle, bias)


def _dequantized(tensor: Any, path: Path) -> np.ndarray:
    from gguf import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{path}: {tensor.name} is in {tensor.tensor_type.name}, which is not read; use a file "
            "in Q4_0, Q8_0 or a K-quant (Q4_K_M, say)"
        ) from error


def _check_rope(model: PreTrainedModel, file: GgufFile, tensor: Any) -> None:
    """What divides the rotary frequencies for long contexts, as Llama 3 has it: into the config."""
    factors = torch.from_numpy(np.array(tensor.data)).flatten().float()
    config: Any = model.config
    rotary: Any = model.model.rotary_emb
    plain = config.rope_parameters
    for factor in (8.0, 32.0):  # of 3.1 and 3.3, and of 3.2
        config.rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": plain["rope_theta"],
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        scaled = type(rotary)(config=config)
        expected = rotary.inv_freq / scaled.inv_freq
        if factors.shape == expected.shape and torch.allclose(factors, expected, rtol=1e-4):
            model.model.rotary_emb = scaled
            return
    raise UnsupportedModel(
        f"{file.path} scales its rotary embedding (rope_freqs.weight) by factors that are not "
        "Llama 3's; use the model's folder with *.safetensors"
    )
