"""A second copy of some of a model's modules, with the weights of another model's block.

It is laid out for the kernels that the model's own are laid out for: queries, keys and values in
one product, gate and up with the gate built in, 4-bit weights as their kernels read them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from ...quant import int4_linears, quantize_output
from ...quant.kernels.activations import use_8_bits
from ..blocks.chain import Block, Chain
from ..cpu_kernels.packing import can_pack, pack, packed_bytes
from ..model.loading import LoadedModel, weight_bytes
from .anatomy import Call
from .reading import read_block
from .sites import Sites


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model's weights are kept, and so their copies.

    Attributes:
        is_packed: laid out for the CPU's kernels.
        repeatable, lm_head_bits, activation_bits: as of `load_model`.
    """

    dtype: torch.dtype
    device: torch.device
    is_packed: bool
    repeatable: bool
    lm_head_bits: int | None
    activation_bits: int

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        *,
        repeatable: bool,
        lm_head_bits: int | None,
        activation_bits: int,
    ) -> "Layout":
        """That of a model which was loaded so."""
        return cls(
            dtype=loaded.dtype,
            device=loaded.device,
            is_packed=packed_bytes(loaded.model) > 0 and can_pack(loaded.dtype),
            repeatable=repeatable,
            lm_head_bits=lm_head_bits,
            activation_bits=activation_bits,
        )


@dataclass(frozen=True)
class BlockCopy:
    """A block's modules, by the names that they have in the model.

    Attributes:
        num_bytes: of their weights.
    """

    modules: Mapping[str, nn.Module]
    num_bytes: int


def copy_block(chain: Chain, block: Block, sites: Sites, layout: Layout) -> BlockCopy:
    """Read a block and lay its modules out.

    Raises BadCheckpoint if it cannot be read, ChainMismatch if it cannot be computed for some rows
    at a time, UnsupportedModel if its kind of weight is unknown.
    """
    part, is_read = read_block(chain, block, layout.dtype, layout.device)
    names = sites.find(part, is_read)
    if layout.lm_head_bits is not None:
        _quantise_head(part, names, layout.lm_head_bits)
    body = _Body(part, names)
    del part
    body.to(layout.device)
    calls = [sites.anatomy.calls[name] for name in names]
    if layout.activation_bits == 8 and any(True for _ in int4_linears(body)):
        use_8_bits(body, layout.dtype, lambda: body.run(calls))
    if layout.is_packed:
        pack(body, lambda: body.run(calls), repeatable=layout.repeatable)
    for _, linear in int4_linears(body):  # those that packing left where they are
        linear.settle(layout.dtype)
    return BlockCopy(dict(body.copies()), weight_bytes(body))


class _Body(nn.Module):
    """Modules of a model beneath parents like those that they have there, and nothing else."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        for name in names:
            parent, _, child = name.rpartition(".")
            key = _key(parent)
            if key not in dict(self.named_children()):
                self.add_module(key, nn.Module())
            self.get_submodule(key).add_module(child, model.get_submodule(name))

    def copies(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules as they are now, by the model's names."""
        for name in self._names:
            parent, _, child = name.rpartition(".")
            yield name, self.get_submodule(f"{_key(parent)}.{child}")

    def run(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        """What they make of what the model's own were called with."""
        outs: list[Any] = []
        with torch.inference_mode():
            for (_, module), call in zip(self.copies(), calls, strict=True):
                outs += tree_flatten(module(*call.args, **call.kwargs))[0]
        return [out for out in outs if isinstance(out, torch.Tensor) and out.is_floating_point()]


def _key(parent: str) -> str:
    return parent.replace(".", "/") or "model"


def _quantise_head(model: PreTrainedModel, names: Sequence[str], bits: int) -> None:
    """Exchange the output layer, if it is in the block, as `load_model` does."""
    head: Any = model.get_output_embeddings()
    for name in names:
        if model.get_submodule(name) is head and type(head) is nn.Linear:
            model.set_submodule(name, quantize_output(head, bits))
