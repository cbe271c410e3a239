"""4-bit checkpoints through `transformers`' own `from_pretrained`.

`transformers` lets a quantiser exchange modules before weights are read and after. Ours is
registered under a name of its own, beside the built-in ones and whatever they need installed:
`adopt` rewrites a config to it. Before reading, each quantised linear makes way for one that has
the tensors of the checkpoint; after it, that one for an `Int4Linear`. The module that holds all
experts of a layer makes way likewise (`stored_experts`).
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..vmem import linux
from ..vmem.errors import QuantError, UnsupportedQuantization
from .formats.scheme import Scheme
from .formats.table import (
    codes_name,
    features,
    parse_config,
    read_layer,
    renamed,
    renamings,
    tensor_names,
)
from .linear import Int4Linear
from .names import ModelNames, bind_to_weights
from .stored_experts import expert_linear, stored_experts
from .weight import Int4Weight
from .weight_memory import drop_file_pages, lies_in, trim_heap

_log = logging.getLogger(__name__)
_METHOD = "vkv_int4"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_READ_AS_DENSE = {
    "compressed-tensors-fp8": ("FP8", "two"),
    "fp8": ("FP8", "two"),
    "bitsandbytes-4bit": ("bitsandbytes' 4 bits", "four"),
}
# What the tensor `weight` of an expert is called while it is read: those of that name are for
# `transformers`, which makes one tensor of all.
_EXPERT_CODES = "expert_codes"
_KV_SCALES = r"\.[kv]_(scale|zero_point)$"
_Header = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]  # by name of tensor


def described_in(config: PretrainedConfig) -> Any:
    """What a config says of quantised weights: itself, or in its text's part; None if nothing."""
    own = getattr(config, "quantization_config", None)
    return own or getattr(config.get_text_config(decoder=True), "quantization_config", None)


def adopt(
    config: PretrainedConfig,
    device: torch.device,
    tensors: Mapping[str, torch.Tensor] | None = None,
    files: Sequence[str | Path] = (),
) -> bool:
    """Have `from_pretrained` read the checkpoint of this config with vkv's readers.

    `tensors` are the checkpoint's, where it is given them (`state_dict`) and not its files; `files`
    are then those that they are mapped from.

    Returns False, with nothing changed, if its weights are not quantised or another quantiser of
    `transformers` reads them: on a GPU also that of `fp8`, which has kernels there. That of MXFP4
    is told to dequantise, for its kernels are a GPU's and downloaded while it runs. Raises
    UnsupportedQuantization for what nobody reads.
    """
    described = described_in(config)
    if described is None:
        return False
    if not isinstance(described, dict):
        described = described.to_dict()
    scheme = parse_config(described)
    if scheme is None or (scheme.format == "fp8" and device.type != "cpu"):
        method = described.get("quant_method")
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise UnsupportedQuantization(
                f"quantization_config.quant_method is {method!r}, which is unknown; there are "
                "readers for gptq, awq, compressed-tensors, auto-round, bitsandbytes and fp8"
            )
        if method == "mxfp4":
            config.quantization_config = {**described, "dequantize": True}  # type: ignore[attr-defined]
            _log.warning(
                "weights in MXFP4 are dequantised while they are read, and take about four times "
                "the memory of their files"
            )
        return False
    _register()
    header = {name: (one.dtype, tuple(one.shape)) for name, one in (tensors or {}).items()}
    said = {"described": described, "header": header, "files": tuple(files)}
    config.quantization_config = {"quant_method": _METHOD, **said}  # type: ignore[attr-defined]
    return True


def int4_linears(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """The 4-bit layers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            yield name, module


class _StoredLinear(nn.Module):
    """A linear as the checkpoint stores it: one buffer for each of its tensors."""

    def __init__(self, header: _Header, like: nn.Linear, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.size = like.out_features, like.in_features
        self.dtype = like.weight.dtype
        self.tensor_names = tuple(header)
        for name, (dtype, shape) in header.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_buffer("bias", bias)

    def read(
        self, layer: str, scheme: Scheme, files: Sequence[tuple[int, int]]
    ) -> Int4Linear | nn.Linear:
        """The linear that runs, with no code in the mapped `files`."""
        tensors = {name: getattr(self, name) for name in self.tensor_names}
        if _EXPERT_CODES in tensors:
            tensors["weight"] = tensors.pop(_EXPERT_CODES)
        bias = cast(torch.Tensor | None, self.bias)
        weight = read_layer(layer, tensors, scheme)
        if isinstance(weight, Int4Weight):
            if lies_in(weight.packed, files):
                weight = replace(weight, packed=weight.packed.clone())
            return Int4Linear(weight, bias)
        if weight.shape != self.size:
            raise QuantError(
                f"tensor {layer}.{codes_name(scheme.format)} holds a weight of "
                f"{list(weight.shape)} (outputs, inputs), and the model's layer is "
                f"{list(self.size)}; use weights and config.json of one checkpoint"
            )
        linear = nn.Linear(*reversed(self.size), bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear


class _Int4Config(QuantizationConfigMixin):
    """What `adopt` has to say: the checkpoint's own words, and its tensors if it was given them."""

    def __init__(
        self,
        *,
        described: dict[str, Any],
        header: _Header | None = None,
        files: Sequence[str | Path] = (),
        **_: Any,
    ) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.described = described
        self.header = header or {}
        self.files = files


class _Int4Quantizer(HfQuantizer):
    def __init__(self, quantization_config: _Int4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        scheme = parse_config(quantization_config.described)
        assert scheme is not None, "adopt() has seen to it"
        self.scheme = scheme
        self.given, quantization_config.header = quantization_config.header, {}
        self.files, quantization_config.files = quantization_config.files, ()
        self.of_experts: set[tuple[str, str]] = set()  # renamings of their `weight`

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    def update_weight_conversions(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, weight_conversions: list[WeightTransform], *args: PreTrainedModel
    ) -> list[WeightTransform]:
        bind_to_weights(weight_conversions)
        own = [WeightRenaming(*pair) for pair in renamings(self.scheme.format)]
        own += [WeightRenaming(*pair) for pair in sorted(self.of_experts)]
        return super().update_weight_conversions([*own, *weight_conversions], *args)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        required, optional = tensor_names(self.scheme.format)
        names = ModelNames(model, (*required, *optional))
        self.files = (*self.files, *(checkpoint_files or ()))
        stored = self.given or _read_headers(checkpoint_files or ())
        kind = self.scheme.format
        in_files = {names(renamed(name, kind)): name for name in stored}
        header = {name: stored[in_file] for name, in_file in in_files.items()}
        for layer, tensors in _layers(header, self.scheme).items():
            linear = expert_linear(model, layer)
            if linear is None and _is_left_out(model, layer):
                continue
            of_expert = linear is not None
            linear = linear or _linear(model, layer, next(iter(tensors)))
            _check_size(linear, layer, tensors, self.scheme)
            _refuse_others(layer, header, {*tensors, "bias"})
            if of_expert and "weight" in tensors:
                self.of_experts.add(_renaming_of(in_files[f"{layer}.weight"]))
                tensors[_EXPERT_CODES] = tensors.pop("weight")
            bias = None
            if linear.bias is not None or f"{layer}.bias" in header:
                bias = torch.empty(linear.out_features, dtype=linear.weight.dtype, device="meta")
            model.all_tied_weights_keys.pop(f"{layer}.weight", None)  # it has a weight of its own
            model.set_submodule(layer, _StoredLinear(tensors, linear, bias))
        for name, experts in stored_experts(model):
            experts.check(name)
        if self.scheme.rounds_kv:  # by scales of their own; here keys and values stay as they are
            passed_over = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*passed_over, _KV_SCALES}
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        stored = [(n, m) for n, m in model.named_modules() if isinstance(m, _StoredLinear)]
        if self.scheme.format in _READ_AS_DENSE:
            _log.warning(
                "weights in %s are read as dense ones in the model's type, and take %s times the "
                "memory of their files in bfloat16",
                *_READ_AS_DENSE[self.scheme.format],
            )
        files = linux.mapped_files(self.files)
        while stored:  # one at a time, so that a layer's tensors go before the next is read
            layer, module = stored.pop()
            model.set_submodule(layer, module.read(layer, self.scheme, files))
            for tensor in module.buffers():
                drop_file_pages(tensor, files)
            del module
            trim_heap()
        for name, experts in stored_experts(model):
            model.set_submodule(name, experts.read())
            trim_heap()
        return model


@cache
def _register() -> None:
    register_quantization_config(_METHOD)(_Int4Config)
    register_quantizer(_METHOD)(_Int4Quantizer)


def _read_headers(files: Sequence[str]) -> _Header:
    header: _Header = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    part = opened.get_slice(name)
                    header[name] = (_DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
        except SafetensorError as error:
            raise QuantError(f"{file} is damaged or no safetensors file: {error}") from error
    return header


def _renaming_of(weight: str) -> tuple[str, str]:
    """A renaming of an expert's `weight` in the files, and of those that differ in numbers."""
    layer = re.sub(r"\d+", r"\\d+", re.escape(weight.removesuffix(".weight")))
    return rf"^({layer})\.weight$", rf"\1.{_EXPERT_CODES}"


def _layers(header: _Header, scheme: Scheme) -> dict[str, _Header]:
    """The tensors of each quantised layer, found by the one that all such layers have."""
    required, optional = tensor_names(scheme.format)
    layers: dict[str, _Header] = {}
    for full_name in header:
        layer, _, last = full_name.rpartition(".")
        if last in (*required, *optional) and last != "weight":  # which dense ones have too
            layers.setdefault(layer, {})[last] = header[full_name]
    for layer, tensors in layers.items():
        if "weight" in required and f"{layer}.weight" in header:
            tensors["weight"] = header[f"{layer}.weight"]
    for layer, tensors in layers.items():
        for name in required:
            if name not in tensors:
                raise QuantError(
                    f"tensor {layer}.{name} is missing, beside {layer}.{next(iter(tensors))}; "
                    "check that all of the checkpoint's *.safetensors are there"
                )
    if not layers:
        raise QuantError(
            f"config.json says {scheme.format}, and no tensor is called *.{required[0]}; check "
            "that all of the checkpoint's *.safetensors are there"
        )
    return layers


def _refuse_others(layer: str, header: _Header, read: set[str]) -> None:
    """Refuse tensors of a quantised layer that nobody would read, such as its rotation's."""
    for full_name in header:
        if full_name.startswith(f"{layer}.") and full_name.removeprefix(f"{layer}.") not in read:
            raise UnsupportedQuantization(
                f"tensor {full_name} belongs to a quantised layer, and nothing here reads it; its "
                "weights would mean something else without it: use a checkpoint in a plain format"
            )


def _is_left_out(model: PreTrainedModel, layer: str) -> bool:
    """Whether the model says itself that it has no use for such a layer (to predict ahead, say)."""
    try:
        model.get_submodule(layer)
    except AttributeError:
        patterns = model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, f"{layer}.weight") for pattern in patterns)
    return False


def _linear(model: PreTrainedModel, layer: str, tensor: str) -> nn.Linear:
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        if module is None:
            held, remedy = "no module", "use a checkpoint of that architecture"
        else:
            held, remedy = f"a {type(module).__name__}", "use a checkpoint that leaves it dense"
        raise UnsupportedQuantization(
            f"tensor {layer}.{tensor} is quantised, and {type(model).__name__} has {held} of that "
            f"name where a linear layer or an expert's is expected; {remedy}"
        )
    return module


def _check_size(linear: nn.Linear, layer: str, tensors: _Header, scheme: Scheme) -> None:
    """Refuse codes for another size than that of the linear which makes way for them.

    That the other tensors fit the codes is seen to when they are read.
    """
    codes = codes_name(scheme.format)
    _, shape = tensors[codes]
    if len(shape) != 2:
        return  # which its reader refuses
    found, expected = features(scheme, shape), (linear.out_features, linear.in_features)
    if found is not None and found != expected:
        raise QuantError(
            f"tensor {layer}.{codes} is {list(shape)}, in {scheme.bits} bits a weight of "
            f"{list(found)} (outputs, inputs), and the model's layer is {list(expected)}; use "
            f"weights and config.json of one checkpoint, with {scheme.bits} bits in all quantised "
            "layers"
        )
