"""Quantising a model in place, layer after layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import QuantError, UnsupportedQuantization
from .gptq import Hessian, gptq
from .layers import LayerInputs, decoder_layers, gather_hessians, linears
from .rounding import Rounding, round_to_nearest
from .weight import Int4Weight

Method = Literal["rtn", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")

# Routers of mixtures of experts: next to nothing in bytes, and every choice hangs on them.
ROUTERS = ("*.gate", "*.router", "*.shared_expert_gate")


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """How well one linear layer came through.

    Attributes:
        method: "rtn" also for a layer that GPTQ had no inputs of.
        weight: the error of the weight, relative to its size (root mean squares).
        output: that of the layer's outputs on the calibration text; None without one.
    """

    name: str
    method: Method
    weight: float
    output: float | None


@dataclass(kw_only=True)
class QuantizedModel:
    """A model whose linear layers were quantised; it computes with the dequantised weights.

    Attributes:
        weights: by the name of the linear layer.
        dense: linear layers of the decoder, and the output head, that were left as they are.
        errors: one for every weight, in the order of the model.
    """

    model: PreTrainedModel
    rounding: Rounding
    method: Method
    weights: dict[str, Int4Weight] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    errors: list[LayerError] = field(default_factory=list)


def quantize_model(
    model: PreTrainedModel,
    *,
    method: Method = "rtn",
    rounding: Rounding | None = None,
    calibration: torch.Tensor | None = None,
    ignore: tuple[str, ...] = ROUTERS,
    on_linear: Callable[[LayerError], None] = lambda _: None,
) -> QuantizedModel:
    """Quantise the linear layers of the decoder to 4 bits, in place.

    Embeddings and the output head stay dense, and so do linear layers that match a pattern of
    `ignore` and those whose input features do not divide into groups. With a calibration, layers
    are gone through in order, each on what the quantised ones before it put out, so that memory
    holds the hidden states of the text and the Hessians of one layer, besides the model.

    Args:
        model: any decoder-only model of transformers; afterwards it holds dequantised weights.
        method: "rtn" rounds to nearest; "gptq" makes up for errors and needs a calibration.
        rounding: group size, symmetry, clipping; `Rounding()` if None.
        calibration: token ids, int64 [S, T]. For "rtn" it weighs errors and measures them.
        on_linear: called after every linear layer, for progress.

    Raises QuantError if a value is wrong, UnsupportedQuantization if the model has no list of
    layers to go through.

    Example:
        >>> result = quantize_model(model, method="gptq", calibration=tokens)
        >>> save_quantized(result, "out", format="gptq")
    """
    rounding = rounding or Rounding()
    _check(method, rounding, calibration)
    prefix, layers = decoder_layers(model)
    result = QuantizedModel(model=model, rounding=rounding, method=method)
    result.dense = _left_dense(model, prefix, layers, rounding, ignore)
    inputs = None if calibration is None else LayerInputs.record(model, calibration)
    for index, layer in enumerate(layers):
        modules = {
            name: module
            for name, module in linears(layer, f"{prefix}.{index}", ignore).items()
            if name not in result.dense
        }
        hessians: dict[str, Hessian] = {}
        if inputs is not None:
            hessians = gather_hessians(inputs, layer, index, modules)
        for name, module in modules.items():
            error = _quantize_linear(result, name, module, hessians.get(name))
            on_linear(error)
        if inputs is not None:
            inputs.advance(layer, index)
    if not result.weights:
        raise UnsupportedQuantization(
            f"no linear layer of {type(model).__name__} can be quantised in groups of "
            f"{rounding.group_size}; choose a group size that divides the input features"
        )
    return result


def count_linears(
    model: PreTrainedModel, rounding: Rounding, ignore: tuple[str, ...] = ROUTERS
) -> int:
    """How many linear layers `quantize_model` will go through."""
    prefix, layers = decoder_layers(model)
    return sum(
        _divides(module, rounding)
        for index, layer in enumerate(layers)
        for module in linears(layer, f"{prefix}.{index}", ignore).values()
    )


def _check(method: str, rounding: Rounding, calibration: torch.Tensor | None) -> None:
    if method not in METHODS:
        raise QuantError(f"the method is {method!r}; use one of {', '.join(METHODS)}")
    if method == "gptq" and calibration is None:
        raise QuantError("gptq needs a calibration text; give one, or use the method 'rtn'")
    if rounding.group_size != -1 and rounding.group_size < 8:
        raise QuantError(
            f"the group size is {rounding.group_size}; use 32, 64 or 128, or -1 for whole rows"
        )


def _left_dense(
    model: PreTrainedModel,
    prefix: str,
    layers: nn.ModuleList,
    rounding: Rounding,
    ignore: tuple[str, ...],
) -> tuple[str, ...]:
    everything = linears(layers, prefix, ())
    wanted = linears(layers, prefix, ignore)
    dense = [
        name
        for name, module in everything.items()
        if name not in wanted or not _divides(module, rounding)
    ]
    head = model.get_output_embeddings()
    dense += [name for name, module in model.named_modules() if head is not None and module is head]
    return tuple(dense)


def _divides(module: nn.Linear, rounding: Rounding) -> bool:
    columns = rounding.columns_per_group(module.in_features)
    # Eight codes to a word, in the direction of either side, is what all formats store.
    return not (module.in_features % columns or module.in_features % 8 or module.out_features % 8)


def _quantize_linear(
    result: QuantizedModel, name: str, module: nn.Linear, hessian: Hessian | None
) -> LayerError:
    before = module.weight.detach().to(torch.float32, copy=True)  # the layer is overwritten
    if result.method == "gptq" and hessian is not None:
        method: Method = "gptq"
        weight = gptq(before, hessian, result.rounding)
    else:
        method = "rtn"
        importance = None if hessian is None else hessian.diagonal()
        weight = round_to_nearest(before, result.rounding, importance)
    after = weight.dequantize()
    module.weight.data.copy_(after)
    error = LayerError(
        name=name,
        method=method,
        weight=float((after - before).norm() / before.norm().clamp(min=1e-30)),
        output=None if hessian is None else hessian.output_error(before, after),
    )
    result.weights[name] = weight.to("cpu")
    result.errors.append(error)
    return error
