"""Quantising a model in place, layer after layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ...vmem.errors import QuantError
from ..experts import Experts, FusedExperts, taken_apart
from ..names import published_names
from ..weight import Int4Weight
from .gptq import Hessian, gptq
from .layers import LayerInputs, decoder_layers, fused_experts, gather_hessians, linears
from .rounding import Rounding, round_to_nearest

Method = Literal["rtn", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")

# Routers of mixtures of experts: next to nothing in bytes, and every choice hangs on them.
ROUTERS = ("*.gate", "*.gate.*", "*.router", "*.router.*", "*.shared_expert_gate")
_MOST_HESSIAN_BYTES = 4 << 30  # at a time; a layer with many experts is run several times


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
        dense: linear layers that were left as they are, but for the head and routers.
        routers: of mixtures of experts, which are dense too, as checkpoints call them.
        head: the name of the output head, which is dense too.
        experts: modules of all experts of a layer, whose weights are there expert by expert.
        errors: one for every weight, in the order of the model.
    """

    model: PreTrainedModel
    rounding: Rounding
    method: Method
    weights: dict[str, Int4Weight] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    head: str | None = None
    experts: dict[str, FusedExperts] = field(default_factory=dict)
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

    Raises QuantError if a value is wrong, UnsupportedQuantization for models that cannot be gone
    through.

    Example:
        >>> result = quantize_model(model, method="gptq", calibration=tokens)
        >>> save_quantized(result, "out", format="gptq")
    """
    rounding = rounding or Rounding()
    _check(method, rounding, calibration)
    planned = plan(model, rounding, ignore)
    result = QuantizedModel(
        model=model,
        rounding=rounding,
        method=method,
        dense=planned.dense,
        routers=planned.routers,
        head=planned.head,
        experts={name: fused for name, (fused, _) in planned.experts.items()},
    )
    with _in_place(model, {name: apart for name, (_, apart) in planned.experts.items()}):
        _, layers = decoder_layers(model)
        inputs = None if calibration is None else LayerInputs.record(model, calibration)
        for index, (layer, modules) in enumerate(zip(layers, planned.linears, strict=True)):
            for some in _affordable(modules):
                hessians: dict[str, Hessian] = {}
                if inputs is not None:
                    hessians = gather_hessians(inputs, layer, index, some)
                for name, module in some.items():
                    on_linear(_quantize_linear(result, name, module, hessians.get(name)))
            for name, module in modules.items():  # now, so that all were calibrated alike
                module.weight.data.copy_(result.weights[name].dequantize())
            if inputs is not None:
                inputs.advance(layer, index)
    return result


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a model will be quantised.

    Attributes:
        linears: to be quantised, by name, a list for each decoder layer.
        experts: modules of all experts of a layer whose linears are among these, by name, and
            what takes their place meanwhile.
        dense: linear layers that are left as they are, but for the head and routers: some of the
            decoder's, and all outside it, such as those of a vision tower.
        routers: of mixtures of experts, as checkpoints call them.
        head: the name of the output head, which is left dense too; None if there is none.
    """

    linears: list[dict[str, nn.Linear]]
    experts: dict[str, tuple[FusedExperts, Experts]]
    dense: tuple[str, ...]
    routers: tuple[str, ...]
    head: str | None

    @property
    def num_linears(self) -> int:
        return sum(len(modules) for modules in self.linears)


def plan(model: PreTrainedModel, rounding: Rounding, ignore: tuple[str, ...] = ROUTERS) -> Plan:
    """Which linear layers `quantize_model` would go through.

    Raises QuantError if nothing is left to quantise, UnsupportedQuantization for models that
    cannot be gone through.
    """
    prefix, layers = decoder_layers(model)

    def is_wanted(name: str, module: nn.Linear) -> bool:
        return _divides(module, rounding) and not any(fnmatchcase(name, p) for p in ignore)

    found = linears(layers, prefix)
    wanted = {name: module for name, module in found.items() if is_wanted(name, module)}
    experts: dict[str, tuple[FusedExperts, Experts]] = {}
    dense: list[str] = []
    for home, fused in fused_experts(layers, prefix).items():
        apart = taken_apart(fused)
        inside = linears(apart, home)
        if all(is_wanted(name, module) for name, module in inside.items()):
            wanted |= inside
            experts[home] = fused, apart
        else:  # all of them: readers take the experts of a layer for alike
            dense += inside
    if not wanted:
        raise QuantError(
            f"no linear layer of {type(model).__name__} can be quantised in groups of "
            f"{rounding.group_size}; choose a group size that divides the input features, such as "
            "32, 64 or -1 for whole rows"
        )
    head = model.get_output_embeddings()
    routers = [name for name in _routers(layers, prefix) if name not in wanted]
    dense += [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in {*wanted, *routers}
    ]
    return Plan(
        linears=[
            {n: m for n, m in wanted.items() if n.startswith(f"{prefix}.{index}.")}
            for index in range(len(layers))
        ],
        experts=experts,
        dense=tuple(dense),
        routers=published_names(model, routers),
        head=next((n for n, m in model.named_modules() if head is not None and m is head), None),
    )


def _routers(layers: nn.ModuleList, prefix: str) -> list[str]:
    """What chooses experts: linear layers, or modules of their own that hold such a weight."""
    found: list[str] = []
    for name, module in layers.named_modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, nn.Parameter) and weight.dim() == 2
        if is_matrix and any(fnmatchcase(f"{prefix}.{name}", pattern) for pattern in ROUTERS):
            found.append(f"{prefix}.{name}")
    return found


@contextmanager
def _in_place(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have other modules in the model meanwhile."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _affordable(modules: dict[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """A layer's linears, as many at a time as there may be Hessians of."""
    some: dict[str, nn.Linear] = {}
    num_bytes = 0
    for name, module in modules.items():
        needed = 4 * module.in_features**2
        if some and num_bytes + needed > _MOST_HESSIAN_BYTES:
            yield some
            some, num_bytes = {}, 0
        some[name] = module
        num_bytes += needed
    if some:
        yield some


def _check(method: str, rounding: Rounding, calibration: torch.Tensor | None) -> None:
    if method not in METHODS:
        raise QuantError(f"the method is {method!r}; use one of {', '.join(METHODS)}")
    if method == "gptq" and calibration is None:
        raise QuantError("gptq needs a calibration text; give one, or use the method 'rtn'")
    if rounding.group_size != -1 and rounding.group_size < 8:
        raise QuantError(
            f"the group size is {rounding.group_size}; use 32, 64 or 128, or -1 for whole rows"
        )


def _divides(module: nn.Linear, rounding: Rounding) -> bool:
    columns = rounding.columns_per_group(module.in_features)
    # Eight codes to a word, in the direction of either side, is what all formats store.
    return not (module.in_features % columns or module.in_features % 8 or module.out_features % 8)


def _quantize_linear(
    result: QuantizedModel, name: str, module: nn.Linear, hessian: Hessian | None
) -> LayerError:
    before = module.weight.detach().to(torch.float32)
    if result.method == "gptq" and hessian is not None:
        method: Method = "gptq"
        weight = gptq(before, hessian, result.rounding)
    else:
        method = "rtn"
        importance = None if hessian is None else hessian.diagonal()
        weight = round_to_nearest(before, result.rounding, importance)
    after = weight.dequantize()
    error = LayerError(
        name=name,
        method=method,
        weight=float((after - before).norm() / before.norm().clamp(min=1e-30)),
        output=None if hessian is None else hessian.output_error(before, after),
    )
    result.weights[name] = weight.to("cpu")
    result.errors.append(error)
    return error
