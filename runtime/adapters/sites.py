"""Where adapters act in a model: its linear modules, whatever kind of weight they have.

A site is a linear as the model's author named it. Its module stays where it is, and gets a
`forward` of its own that adds what the step's adapters say; without such a step it is the module's.
Gate and up of a feed-forward layer may have become one product with the gate built in
(`cpu_kernels`): there the addends go in ahead of the gate.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...vmem.errors import BadAdapter
from ..cpu_kernels.packing import PackedGatedLayer
from ..cpu_kernels.shared_inputs import single_homes
from ..model.extras.overlays import Overlay, overlays_of
from ..model.probing import probe_outputs
from .steps import current_step

_EXPERTS = "experts"  # the part of a module's name that a mixture's experts stand behind


@dataclass(frozen=True, eq=False)
class Site:
    """A linear that adapters may act on.

    Attributes:
        index: its place in an adapter's table.
        module: what computes it; of gate and up, the layer that both are in.
        part: 0 for a gate and 1 for an up that are in one layer; None for a module of its own.
        is_head: the output layer, which a step may compute for some tokens only.
    """

    index: int
    name: str
    in_features: int
    out_features: int
    module: nn.Module
    part: int | None = None
    is_head: bool = False


class Sites:
    """All sites of a model, and those among them that adapters act on by now.

    Args:
        model: as it computes, packed or not.
        dtype: of what its linears are given.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._by_name = {site.name: site for site in _sites(model)}
        self._installed: set[str] = set()
        self._overlays: list[Overlay] = []

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._by_name.values())

    def find(self, name: str, where: object) -> Site:
        """The site of a module's name. Raises BadAdapter, naming `where` it was asked for."""
        site = self._by_name.get(name)
        if site is not None:
            return site
        kind = type(self._model).__name__
        if f".{_EXPERTS}." in f".{name}.":
            raise BadAdapter(
                f"{where} adapts {name}, an expert of a mixture, and adapters act on attention "
                "and on layers that all tokens pass; merge it into the model"
            )
        module = dict(self._model.named_modules()).get(name)
        found = "there is none" if module is None else f"it is a {type(module).__name__}"
        raise BadAdapter(
            f"{where} adapts {name}, a linear module that {kind} lacks ({found}); use an adapter "
            "of this architecture"
        )

    def install(self, names: Collection[str]) -> bool:
        """Have adapters act on these sites from now on; whether any is new.

        A few tokens are run to see that the model calls each with a row for every token. Raises
        BadAdapter, with nothing changed, for one that it does not.
        """
        new = [self._by_name[name] for name in names if name not in self._installed]
        if not new:
            return False
        _check_called(self._model, self._dtype, new)
        modules = {id(site.module): site.module for site in new}
        for module in modules.values():
            self._adapt(module)
        self._installed.update(site.name for site in new)
        return True

    def _adapt(self, module: nn.Module) -> None:
        if any(isinstance(one, _Adapted | _AdaptedGates) for one in overlays_of(module)):
            return  # for its other part
        sites = [site for site in self if site.module is module]
        if isinstance(module, PackedGatedLayer):
            self._overlays.append(_AdaptedGates(module, sites))
        else:
            self._overlays.append(_Adapted(module, sites[0]))

    def uninstall(self) -> None:
        """Leave the model as it was."""
        for overlay in self._overlays:
            overlay.take_off()
        self._overlays.clear()
        self._installed.clear()


class _Adapted(Overlay):
    """A linear's `forward`, and what adapters add to it."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        super().__init__(module)
        self._site = site

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        out = self.inner(inputs)
        step = current_step()
        if step is not None:
            step.add(self._site, inputs, out)
        return out


class _AdaptedGates(Overlay):
    """The `forward` of a layer that has gate and up in one product."""

    def __init__(self, layer: PackedGatedLayer, sites: Sequence[Site]) -> None:
        super().__init__(layer)
        self._layer = layer
        self._sites = sites

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        step = current_step()
        if step is None:
            return self.inner(inputs)
        addend = step.addend(self._sites, inputs)
        return self._layer.down_proj(self._layer.product.gated(inputs, addend))


def _sites(model: PreTrainedModel) -> list[Site]:
    """The outermost linears that hang in one place, in the order of the model."""
    homes = single_homes(model)
    head = model.get_output_embeddings()
    sites: list[Site] = []
    taken = ""  # the name of the last linear, whose own parts are no sites
    for name, module in model.named_modules():
        if id(module) not in homes or (taken and name.startswith(f"{taken}.")):
            continue
        if f".{_EXPERTS}." in f".{name}.":
            continue
        if isinstance(module, PackedGatedLayer):
            width = module.product.in_features
            for part, what in enumerate(("gate_proj", "up_proj")):
                out = module.product.out_features[part]
                sites.append(Site(len(sites), f"{name}.{what}", width, out, module, part))
        elif (shape := _shape(module)) is not None:
            sites.append(Site(len(sites), name, *shape, module, is_head=module is head))
            taken = name
    return sites


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear; None for what is none."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(shape[0], int) and isinstance(shape[1], int):
        return shape  # type: ignore[return-value]
    return None


def _check_called(model: PreTrainedModel, dtype: torch.dtype, sites: Sequence[Site]) -> None:
    """Raises BadAdapter unless the model calls each once in a run, with a row of `dtype` for every
    token."""
    calls: dict[int, list[tuple[int, torch.dtype]]] = {id(site.module): [] for site in sites}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        width = inputs[0].shape[-1]
        calls[id(module)].append((inputs[0].numel() // width, inputs[0].dtype))

    modules = {id(site.module): site.module for site in sites}
    hooks = [module.register_forward_pre_hook(note) for module in modules.values()]
    try:
        num_tokens = len(probe_outputs(model)[0])
    finally:
        for hook in hooks:
            hook.remove()
    for site in sites:
        found = calls[id(site.module)]
        if found != [(num_tokens, dtype)]:
            how = " and ".join(f"for {rows} rows of {kind}" for rows, kind in found) or "not at all"
            raise BadAdapter(
                f"{type(model).__name__} computes {num_tokens} tokens and calls {site.name} {how}; "
                f"adapters act on modules that are called once, for all tokens and in {dtype}: "
                "merge the adapter into the model"
            )
