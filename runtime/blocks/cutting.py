"""Where a checkpoint is cut: which tensors belong together, by the model's own structure.

The model is built without memory, on PyTorch's meta device. Its layers are the largest list of as
many modules as the config has layers. In a layer, what attends is the child whose `forward` takes
the cache. All other children are the feed-forward's, but for norms: those that the layer's
`forward` calls ahead of attention belong to that, those behind the feed-forward to this, and so
does the last of those between, unless the layer norms only what comes out of its parts.
"""

import ast
import inspect
import math
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...quant.formats.table import parse_config, tensor_names
from ...quant.loading import described_in
from ...quant.names import ModelNames
from ..model.loading import auto_class

Kind = Literal["embedding", "attention", "feed_forward", "layer", "norm", "head", "other"]
_RANKS = ("embedding", "other", "layer", "norm", "head")  # the order of computing
_CACHES = {"past_key_values", "past_key_value", "layer_past", "cache_params"}  # as arguments
_Place = tuple[Kind, int | None, str]  # kind, layer, and the module for what is in no layer


@dataclass(frozen=True)
class Cut:
    """Tensors that make a block.

    Attributes:
        layer: counted from 0; None outside of layers.
        names: in the checkpoint, in order.
        prefix: what all of them begin with, and the block leaves out: "" or up to a point.
    """

    kind: Kind
    layer: int | None
    names: tuple[str, ...]
    prefix: str


def cut(config: PretrainedConfig, names: Iterable[str]) -> tuple[Cut, ...]:
    """Cut a checkpoint of this config into blocks, in the order in which they compute.

    Args:
        names: of the checkpoint's tensors, each of which will be in one block.

    Raises UnsupportedModel if `transformers` has no causal language model for the config.
    """
    model = _without_memory(config)
    modules: dict[str, torch.nn.Module] = dict(model.named_modules())
    roots = dict(_roots(model))
    in_model = _names_in(model, config)
    places: dict[_Place, list[str]] = {}
    for name in sorted(names):
        module = _deepest(in_model(name), modules, model.base_model_prefix)
        places.setdefault(_place(module, roots), []).append(name)
    found = [
        Cut(kind, layer, tuple(names), common_prefix(names))
        for (kind, layer, _), names in places.items()
    ]
    return tuple(sorted(found, key=_order))


def _order(one: Cut) -> tuple[int, int, int, str]:
    rank = "layer" if one.layer is not None else one.kind
    return _RANKS.index(rank), one.layer or 0, one.kind == "feed_forward", one.names[0]


def common_prefix(names: Iterable[str]) -> str:
    """What names have in common, up to a point, and without all of any."""
    split = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(f"{parts[0]}.")
    return "".join(common)


def _without_memory(config: PretrainedConfig) -> PreTrainedModel:
    dense = type(config).from_dict(config.to_dict())
    for part in (dense, dense.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    with torch.device("meta"):
        return auto_class(dense).from_config(dense)


def _names_in(model: PreTrainedModel, config: PretrainedConfig) -> ModelNames:
    described = described_in(config)
    if described is not None and not isinstance(described, dict):
        described = described.to_dict()
    scheme = parse_config(described) if described else None
    required, optional = tensor_names(scheme.format) if scheme else ((), ())
    return ModelNames(model, (*required, *optional))


def _deepest(name: str, modules: dict[str, nn.Module], base: str) -> str:
    """The innermost module that a tensor is in; "" for the model itself."""
    for full in (name, f"{base}.{name}", name.removeprefix(f"{base}.")):
        parts = full.split(".")[:-1]
        while parts and ".".join(parts) not in modules:
            parts.pop()
        if parts and parts != [base]:
            return ".".join(parts)
    return ""


def _place(module: str, roots: dict[str, _Place]) -> _Place:
    """The block that what is in a module belongs to."""
    parts = module.split(".")
    upwards = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    for name in upwards:
        if name in roots:
            return roots[name]
    # The outermost module that holds nothing which has a block of its own.
    alone = [n for n in upwards if not any(root.startswith(f"{n}.") for root in roots)]
    return "other", None, alone[-1] if alone else ""


# -- the model's structure ---------------------------------------------------------------------


def _roots(model: PreTrainedModel) -> Iterator[tuple[str, _Place]]:
    """Modules that are blocks, or parts of one, by name."""
    names = {module: name for name, module in model.named_modules()}
    layers = _layers(model)
    around = names[layers].rpartition(".")[0] if layers is not None else None
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        beside = around is not None and name.rpartition(".")[0] == around
        if module is model.get_input_embeddings():
            yield name, ("embedding", None, name)
        elif module is head:
            yield name, ("head", None, name)
        elif beside and isinstance(module, nn.Embedding):
            yield name, ("embedding", None, name)
        elif beside and _is_norm(module):
            yield name, ("norm", None, name)
    for index, layer in enumerate(layers or ()):
        for child, kind in _parts(layer).items():
            yield f"{names[layer]}.{child}", (kind, index, "")
        whole = "feed_forward" if _attending(layer) else "layer"
        yield names[layer], (whole, index, "")


def _layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list of a model's layers: of as many modules, the one with most numbers."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return max(lists, key=_num_elements, default=None)


def _num_elements(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters())


def _parts(layer: nn.Module) -> dict[str, Kind]:
    """What each child of a layer belongs to."""
    children = dict(layer.named_children())
    attends = _attending(layer)
    if not attends:
        return dict.fromkeys(children, "layer")
    norms = [name for name in children if _is_norm(children[name])]
    kinds: dict[str, Kind] = {
        name: "attention" if name in attends else "feed_forward" for name in children
    }
    called = _in_order_of_calls(layer, children)
    first, last = _ends(called, attends)
    rest = [name for name in called if kinds[name] == "feed_forward" and name not in norms]
    begin, end = _ends(called, rest) if rest else (len(called), len(called))
    before = [name for name in called[:first] if name in norms]
    between = [name for name in called[last + 1 : begin] if name in norms]
    if len(between) == 1 and not before and end + 1 < len(called):  # it norms what comes out
        kinds[between[0]] = "attention"
    for name in (*before, *between[:-1]):
        kinds[name] = "attention"
    return kinds


def _ends(called: list[str], names: Iterable[str]) -> tuple[int, int]:
    places = [called.index(name) for name in names]
    return min(places), max(places)


def _in_order_of_calls(layer: nn.Module, children: Collection[str]) -> list[str]:
    """A layer's children as its `forward` calls them; those that it does not name, at the end."""
    try:
        text = inspect.getsource(inspect.unwrap(type(layer).forward))
    except (OSError, TypeError):  # which Python has no source of
        return list(children)
    used = dict.fromkeys(_attributes(ast.parse(textwrap.dedent(text))))
    return list(dict.fromkeys([*(name for name in used if name in children), *children]))


def _attributes(node: ast.AST) -> Iterator[str]:
    """Names of attributes in the order of computing: a call's arguments come ahead of it."""
    inner = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Call):
        inner = [*inner[1:], inner[0]]
    for one in inner:
        yield from _attributes(one)
    if isinstance(node, ast.Attribute):
        yield node.attr


def _attending(layer: nn.Module) -> set[str]:
    """The children of a layer that attend, or keep what else there is to keep of a token."""
    return {n for n, child in layer.named_children() if any(map(_takes_cache, child.modules()))}


def _takes_cache(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return not _CACHES.isdisjoint(inspect.signature(forward).parameters)


def _is_norm(module: nn.Module) -> bool:
    """A few numbers for each channel, and no matrix."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.dim() <= 1 for p in parameters)


BlockModules = Mapping[tuple[Kind, int | None, int], Sequence[str]]


def block_modules(model: PreTrainedModel) -> BlockModules:
    """The modules that a model's blocks are made of, by kind, layer, and which of these.

    Among those of a layer is the layer itself, for its own parameters alone.
    """
    found: dict[_Place, list[str]] = {}
    for name, place in _roots(model):
        found.setdefault(place, []).append(name)
    seen: Counter[tuple[Kind, int | None]] = Counter()
    numbered = {}
    for kind, layer, name in sorted(found, key=lambda place: (place[0], place[1] or 0, place[2])):
        numbered[kind, layer, seen[kind, layer]] = tuple(found[kind, layer, name])
        seen[kind, layer] += 1
    return numbered


def layer_names(modules: BlockModules) -> dict[int, str]:
    """What the layers themselves are called."""
    found: dict[int, str] = {}
    for (_, layer, _), names in modules.items():
        if layer is not None:
            found[layer] = min((*names, found.get(layer, names[0])), key=len)
    return found
