"""Loading an unmodified `transformers` model, and learning what its layers ask of attention."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from ...allocator import LayerGeometry
from ...attention_backends import AttentionNeeds, LayerAttention
from ...quant import QuantError, adopt, int4_linears, quantize_output
from ...quant.gguf_files import is_gguf, load_gguf, load_gguf_tokenizer
from ...quant.kernels.activations import use_8_bits
from ...vmem.errors import BadCheckpoint, InvalidConfig, UnsupportedModel
from ..cpu_kernels.packing import can_pack, pack, packed_bytes
from .attention_hook import ATTENTION_NAME, register
from .ends import eos_token_ids
from .fingerprint import FileMark, model_files
from .probing import Probed, probe_attention, probe_outputs
from .reading import reading, resolve
from .recurrent_state import STATE_LAYER_TYPES, keeps_state

_KNOWN_LAYER_TYPES = {"full_attention", "attention", "sliding_attention"}
_WITHOUT_MEMORY = {"moe", "mlp"}  # layers in their own right in some hybrids
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Tensors that older checkpoints hold, though they follow from the config: rotary frequencies and
# causal masks. A value head stands beside the language model, as does what speaks, and does not
# change what it says.
_HARMLESS_TENSORS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.attn\.(bias|masked_bias)"
    r"|\.attention\.(bias|masked_bias)|(^|\.)position_ids|^v_head\..*"
    r"|^(talker|token2wav|code2wav)\..*)$"
)


class StoredTensors(Protocol):
    """The tensors of a checkpoint, for a folder that has all but these."""

    @property
    def tensor_files(self) -> Sequence[Path]:
        """Where they are mapped from."""
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By name."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for the engine, with all that the engine needs to know of it.

    Attributes:
        attention_layers: the layers of the model that attend: all, unless some keep state.
        attention: per layer that attends, scale, window, soft cap and sinks.
        geometry: per layer that attends, the shape of its keys and values.
        eos_token_ids: tokens that end a generation.
        max_positions: the longest sequence the model was made for.
        sampling_defaults: what a generation config says of sampling, by `SamplingParams`' names.
        files: what its numbers were read from, as it was then; empty for a model handed over.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    dtype: torch.dtype
    attention_layers: tuple[int, ...]
    attention: tuple[LayerAttention, ...]
    geometry: tuple[LayerGeometry, ...]
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_positions: int
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileMark, ...] = ()

    @property
    def keeps_state(self) -> bool:
        """True if some layers have recurrent or convolution state instead of keys and values."""
        return keeps_state(self.model.config)

    @property
    def has_forward_hooks(self) -> bool:
        """True if somebody asked to be called when a module runs."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())

    @property
    def weight_bytes(self) -> int:
        """As of the function of that name."""
        return weight_bytes(self.model)

    def needs(self, *, paged: bool) -> AttentionNeeds:
        """What the attention backend must offer."""
        return AttentionNeeds(
            device=self.device.type,
            dtype=self.dtype,
            head_dims=frozenset((g.key_dim, g.value_dim) for g in self.geometry),
            window=any(layer.window is not None for layer in self.attention),
            softcap=any(layer.softcap is not None for layer in self.attention),
            sinks=any(layer.sinks is not None for layer in self.attention),
            paged=paged,
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters, tied ones counted once, of packed weights and of 4-bit ones."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    int4 = sum(linear.num_bytes for _, linear in int4_linears(model))
    return parameters + packed_bytes(model) + int4


def load_model(
    source: str | Path | PreTrainedModel | None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: torch.device,
    dtype: str | torch.dtype = "auto",
    pack_weights: bool | None = None,
    repeatable: bool = False,
    lm_head_bits: int | None = None,
    activation_bits: int = 16,
    stored: StoredTensors | None = None,
) -> LoadedModel:
    """Load a causal language model and prepare it for contiguous slots.

    Args:
        source: a checkpoint folder, a hub id, a model built elsewhere (which is then switched to
            vkv's attention), or None for the built-in tiny chat model.
        tokenizer: where it is, if not with the model.
        dtype: of weights and KV; "auto" is the checkpoint's own.
        pack_weights: lay linear weights out for the CPU's kernels (`packing`); None does so for
            models loaded here, and leaves a model built elsewhere as it is.
        repeatable: lay them out, in any case, for kernels of which a row's result depends on no
            other row.
        lm_head_bits, activation_bits: as of `EngineConfig`, of a model loaded here.
        stored: the weights, where `source` is a folder without them.

    Raises BadCheckpoint of what cannot be read, UnsupportedModel of what cannot run here.
    """
    register()
    wanted_dtype = parse_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        _check_object(source)
        model, files, mapped, home = source, (), (), None
        model.set_attn_implementation(ATTENTION_NAME)
        _cast(model, wanted_dtype)
    else:
        home = resolve(source)
        model, files, mapped = _with_files(home, wanted_dtype, device, stored)
    model = model.to(device).eval()  # type: ignore[arg-type]
    text_config = model.config.get_text_config()
    _check_interface(model)
    probed = probe_attention(model)
    _check_logits(model, probed.num_logits)
    model_dtype = model.dtype  # which packing takes away with the weights
    _prepare_weights(model, home, mapped, pack_weights, repeatable, lm_head_bits, activation_bits)
    held_tokenizer = load_tokenizer(tokenizer if tokenizer is not None else home)
    return LoadedModel(
        name=_name(source, home),
        model=model,
        tokenizer=held_tokenizer,
        device=device,
        dtype=model_dtype,
        attention_layers=probed.layers,
        attention=probed.attention,
        geometry=probed.geometry,
        vocab_size=model.get_input_embeddings().weight.shape[0],  # type: ignore[union-attr]
        eos_token_ids=eos_token_ids(model, held_tokenizer, probed.num_logits),
        max_positions=min(_max_positions(text_config), _max_without_window(model, probed)),
        files=files,
    )


def _cast(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Have a model in `dtype`, as `from_pretrained` reads one; None leaves it as it is.

    Rotary frequencies, which are computed, stay in float32: in 16 bits the angles of later tokens
    would be those of other positions. So does what the architecture keeps in it.
    """
    if dtype is None:
        return
    kept = "|".join(["inv_freq$", *model._get_dtype_plan(dtype)]).replace("*", ".*")
    exact = {
        name: tensor.data
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dtype == torch.float32 and re.search(kept, name)
    }
    model.to(dtype)  # type: ignore[arg-type]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in exact:
            tensor.data = exact[name]


def _name(source: str | Path | PreTrainedModel | None, home: str | Path | None) -> str:
    if isinstance(source, PreTrainedModel):
        return source.config.name_or_path or type(source).__name__
    return str(home) if source is not None else "the built-in tiny model"


def _prepare_weights(
    model: PreTrainedModel,
    home: str | Path | None,
    files: Sequence[Path],
    pack_weights: bool | None,
    repeatable: bool,
    lm_head_bits: int | None,
    activation_bits: int,
) -> None:
    """Lay weights out for the kernels that will read them, as `load_model` says."""
    dtype, loaded_here = model.dtype, home is not None
    if lm_head_bits is not None:
        _quantize_head(model, lm_head_bits, loaded_here=loaded_here)
    if activation_bits == 8:
        _round_activations(model, loaded_here=loaded_here)
    wants_packing = repeatable or (pack_weights if pack_weights is not None else loaded_here)
    if wants_packing and model.device.type == "cpu" and can_pack(dtype):
        pack(model, lambda: probe_outputs(model), repeatable=repeatable, files=files)
    if loaded_here:
        for _, linear in int4_linears(model):  # those that packing left where they are
            linear.settle(dtype)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype from its name; None for "auto"."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return None
    if dtype not in _DTYPES:
        raise InvalidConfig(f"dtype is {dtype!r}; use 'auto' or one of {sorted(_DTYPES)}")
    return _DTYPES[dtype]


def _with_files(
    home: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    stored: StoredTensors | None,
) -> tuple[PreTrainedModel, tuple[FileMark, ...], tuple[Path, ...]]:
    """A model, its files as they were before they were read, and those that it is mapped from."""
    files = model_files(home)
    model = read_checkpoint(home, dtype, device, stored)
    files = files or model_files(home, model.config)  # of a hub id, known by now
    elsewhere = () if stored is None else stored.tensor_files
    return model, files, (*(file.path for file in files), *elsewhere)


def read_checkpoint(
    home: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    stored: StoredTensors | None = None,
    *,
    attention: str = ATTENTION_NAME,
) -> PreTrainedModel:
    """A model as `transformers` loads it, on the CPU; arguments as of `load_model`.

    Args:
        attention: as `transformers` names it.
    """
    if is_gguf(home):
        return reading("weights", home, lambda: load_gguf(Path(home), dtype, attention))
    config: PretrainedConfig = reading(
        "config", home, lambda: AutoConfig.from_pretrained(home, trust_remote_code=False)
    )
    config = writing_part(config)
    auto = auto_class(config)
    model_class: Any = auto._model_mapping[type(config)]  # type: ignore[index]
    _check_architecture(config, model_class)
    tensors = None if stored is None else dict(stored.tensors())
    mapped = () if stored is None else stored.tensor_files
    quantized = reading("quantisation", home, lambda: adopt(config, device, tensors, mapped))
    if quantized and device.type == "cpu" and dtype is None and config.dtype == torch.float16:
        dtype = torch.bfloat16  # the checkpoint's float16 is a GPU's; a CPU has no kernels for it
    loaded: Any = reading(
        "weights",
        home,
        lambda: (auto if tensors is None else model_class).from_pretrained(
            home if tensors is None else cast(Any, None),  # it takes tensors in place of a folder
            trust_remote_code=False,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention,
            output_loading_info=True,
            state_dict=tensors,
        ),
    )
    model, report = loaded
    check_report(home, model, report)
    if tensors is not None:  # of which `transformers` does not know the folder
        model.config.name_or_path = str(home)
        if (Path(home) / "generation_config.json").is_file():
            model.generation_config = reading(
                "generation config", home, lambda: GenerationConfig.from_pretrained(home)
            )
    return model


def writing_part(config: PretrainedConfig) -> PretrainedConfig:
    """The config of what writes the text in a model that speaks as well; any other's own."""
    part = getattr(config, "thinker_config", None)
    if part is None:
        return config
    part.dtype = part.dtype or config.dtype
    if (described := getattr(config, "quantization_config", None)) is not None:
        part.quantization_config = described
    return part


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM | AutoModelForMultimodalLM]:
    """What loads a checkpoint's language model: alone, or with the towers that it came with.

    Raises UnsupportedModel if `transformers` has none that goes on with a text.
    """
    alone, whole = AutoModelForCausalLM, AutoModelForMultimodalLM
    if not config.is_encoder_decoder:
        has_whole = type(config) in whole._model_mapping
        if type(config) in alone._model_mapping and not (has_whole and _is_mere_part(config)):
            return alone
        if has_whole:
            return whole
    raise UnsupportedModel(
        f"{config.model_type} has no causal language model in transformers; use one that "
        "generates text"
    )


def _is_mere_part(config: PretrainedConfig) -> bool:
    """Whether the causal model is a larger one's part, and does not know of the other parts."""
    part: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return part.config_class is not type(config) and not part._keys_to_ignore_on_load_unexpected


def check_report(home: str | Path, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with tensors too few, or with others that the model has no place for."""
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with noise
        raise BadCheckpoint(
            f"{home} lacks {len(missing)} of the model's tensors, among them {missing[0]}; check "
            "that all of its *.safetensors are there"
        )
    foreign = [name for name in report["unexpected_keys"] if not _HARMLESS_TENSORS.search(name)]
    if foreign:
        raise UnsupportedModel(
            f"{home} has {len(foreign)} tensors that {type(model).__name__} has no place for, "
            f"among them {min(foreign)}; without them it would compute something else: use a "
            "checkpoint of that architecture, or take them out of its *.safetensors"
        )


def _quantize_head(model: PreTrainedModel, bits: int, *, loaded_here: bool) -> None:
    """Exchange the output layer. A tied embedding stays, in its own type."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if not loaded_here or type(head) is not nn.Linear or name is None:
        found = "is the caller's own" if not loaded_here else f"is a {type(head).__name__}"
        raise InvalidConfig(
            f"lm_head_bits is {bits}, and the output layer of {type(model).__name__} {found}; only "
            "plain linear layers of models loaded by vkv are quantised: leave lm_head_bits out"
        )
    try:
        model.set_submodule(name, quantize_output(head, bits))
    except QuantError as error:
        raise InvalidConfig(f"lm_head_bits is {bits}: {error}") from error


def _round_activations(model: PreTrainedModel, *, loaded_here: bool) -> None:
    """Have layers in 4 bits round their inputs to 8."""
    if not loaded_here:
        raise InvalidConfig(
            "activation_bits is 8, and the model is the caller's own; only layers of models loaded "
            "by vkv are given other kernels: leave activation_bits out"
        )
    try:
        use_8_bits(model, model.dtype, lambda: probe_outputs(model))
    except QuantError as error:
        raise InvalidConfig(f"activation_bits is 8: {error}; or leave it out") from error


def _check_architecture(config: PretrainedConfig, model_class: type) -> None:
    """Refuse what is known not to work before its weights are read."""
    name = model_class.__name__
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if getattr(config.get_text_config(), "is_causal", True) is False:
        raise UnsupportedModel(
            f"{name} has is_causal=False in its config, so that tokens attend to those after them, "
            "and slots hold those before; use a model that generates from left to right"
        )
    stateful = keeps_state(config)
    known = _KNOWN_LAYER_TYPES | STATE_LAYER_TYPES | (_WITHOUT_MEMORY if stateful else set())
    if foreign := sorted(layer_types - known):
        raise UnsupportedModel(
            f"{name} has layers of type {', '.join(foreign)}, and slots hold keys and values of "
            "every token, for full and sliding-window attention, beside recurrent and convolution "
            "state; use a model of these alone"
        )
    if stateful and layer_types <= {"linear_attention", "conv"} | _WITHOUT_MEMORY:
        raise UnsupportedModel(
            f"{name} has recurrent state only, and slots, which the engine schedules by, hold keys "
            "and values; use a model in which some layers attend"
        )
    if getattr(model_class, "_is_stateful", False) and not stateful:
        raise UnsupportedModel(
            f"{name} keeps recurrent state of its own kind, which cannot be told apart by "
            "request; use an attention model, or a hybrid with transformers' state layers"
        )


def _check_object(model: PreTrainedModel) -> None:
    """Refuse a model object that cannot work, says no tokens, or whose weights are elsewhere."""
    _check_architecture(model.config, type(model))
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no output layer over the vocabulary, so it generates no "
            "text; use the architecture's model for causal language modelling"
        )
    if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise UnsupportedModel(
            f"{type(model).__name__} has {len(away)} parameters that are not in memory, among them "
            f"{away[0]}; load it without offloading to disk or CPU"
        )


def _check_logits(model: PreTrainedModel, num_logits: int) -> None:
    """Refuse logits that are over something else than tokens, such as labels."""
    num_tokens = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", num_tokens)
    if num_logits not in (num_tokens, vocab_size):
        raise UnsupportedModel(
            f"{type(model).__name__} puts out {num_logits} scores a token, and its vocabulary has "
            f"{vocab_size}; use a model that generates text"
        )


def _check_interface(model: PreTrainedModel) -> None:
    """Refuse a model that did not take our attention; `transformers` itself only warns."""
    if model.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise UnsupportedModel(
            f"{type(model).__name__} does not use transformers' attention interface, so its "
            "attention cannot be pointed at contiguous slots; use a model that does"
        )


def _max_positions(config: Any) -> int:
    """The longest sequence whose keys depend on nothing but the sequence itself.

    A long rotary embedding changes all frequencies once the longest sequence of a batch passes
    the original length: keys in the slots would become wrong, and neighbours would feel it.
    """
    limit = getattr(config, "max_position_embeddings", None) or 32_768
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # flat, or by type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            limit = min(limit, parameters.get("original_max_position_embeddings") or limit)
    return limit


def _max_without_window(model: PreTrainedModel, probed: Probed) -> int:
    """The longest sequence for which a window makes no difference that only `transformers` has.

    Moshi names a window in its config, of which its attention learns nothing, while the cache of
    `generate` drops what lies behind it.
    """
    attends = dict(zip(probed.layers, probed.attention, strict=True))
    windows = [
        layer.sliding_window
        for index, layer in enumerate(DynamicCache(config=model.config).layers)
        if isinstance(layer, DynamicSlidingWindowLayer)
        and index in attends
        and attends[index].window is None
    ]
    return min(windows, default=sys.maxsize)


def load_tokenizer(
    source: PreTrainedTokenizerBase | str | Path | None,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None for a folder without one: prompts are then token ids."""
    if source is None or isinstance(source, PreTrainedTokenizerBase):
        return source
    path = Path(source)
    if is_gguf(source):
        return reading("tokenizer", source, lambda: load_gguf_tokenizer(path))
    if path.is_dir() and not any(path.glob("*token*")) and not any(path.glob("*vocab*")):
        return None
    found = reading(
        "tokenizer", source, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    )
    template = path / "chat_template.json"  # where a processor of images kept it
    if not found.chat_template and template.is_file():
        found.chat_template = reading(
            "chat template", source, lambda: json.loads(template.read_text())["chat_template"]
        )
    return found
