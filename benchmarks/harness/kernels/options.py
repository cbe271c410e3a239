"""What the benches of kernels, driver calls and slots can be told, each of which has no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ...runtime.cli.options import option
from ...vmem.errors import InvalidConfig
from ..options import (
    device_option,
    dtype_option,
    label_option,
    num_bytes,
    peers_option,
    seed_option,
    sizes,
    whole_numbers,
    words,
)
from .attention_layouts import DEFAULT, SlotLayout, slot_layouts
from .attention_shapes import Shape, default_shapes, shapes_of_heads

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_HEADS = "Query heads:KV heads x size"


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What `vkv bench attention` runs.

    Attributes:
        layouts: of slots; all backends are run in the first.
        max_bytes: keys and values of one cache; larger problems are left out, and named.
        peers: interpreters by name.
        shapes: the problems themselves; none for those of `heads`, `batches`, `contexts`, `chunk`.
    """

    dtype: "torch.dtype" = dtype_option("bfloat16")
    device: "torch.device" = device_option()
    batches: tuple[int, ...] = option(
        "1,8,32", parse=whole_numbers, help="Sequences of a decode, with commas."
    )
    contexts: tuple[int, ...] = option(
        "1024,8192,32768", parse=whole_numbers, help="Tokens of each sequence, with commas."
    )
    chunk: int = option(512, least=0, help="Queries of a prompt chunk; 0 for none, with --heads.")
    heads: str = option(
        "",
        help=f"{_HEADS}, such as 32:8x128. Default: 16:4x64, and one decode each with 32:8x128, "
        "32:4x128 and 8:8x64.",
    )
    contiguous: tuple[str, ...] = option(
        "auto,sdpa",
        parse=words,
        help="Backends over slots; the first is run in every layout.",
    )
    layouts: tuple[SlotLayout, ...] = option(
        DEFAULT,
        names=("--layers-per-range",),
        parse=lambda listed: slot_layouts(words(listed)),
        help="Layouts of slots, with commas: how many layers share a range, such as 1,2,4,all; "
        "-split for keys and values in ranges of their own; head-major for the tokens of each "
        "head, not the heads of each token, side by side.",
    )
    paged: tuple[str, ...] = option("auto", parse=words, help="Backends over the paged cache.")
    repeats: int = option(7, least=1, help="Passes of each contestant.")
    max_bytes: int = option(
        "128MiB",
        names=("--max-memory",),
        parse=num_bytes,
        help="Keys and values of one cache; larger problems are named, not run.",
    )
    peers: Mapping[str, str] = peers_option()
    label: str = label_option()
    seed: int = seed_option()
    shapes: Sequence[Shape] = ()

    @property
    def problems(self) -> Sequence[Shape]:
        """What is run. Raises InvalidConfig for impossible heads, and for no chunk without any."""
        if self.shapes:
            return self.shapes
        if self.heads:
            return shapes_of_heads(self.heads, self.batches, self.contexts, self.chunk)
        if not self.chunk:
            raise InvalidConfig("--chunk 0 leaves prompts out, which takes --heads")
        return default_shapes(self.batches, self.contexts, self.chunk)


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """What `vkv bench linear` runs.

    Attributes:
        rows: numbers of rows, M.
        kernels: int4 kernels; "auto" is the choice by batch.
        max_bytes: dense weights of all copies of a layer; at least one is made.
    """

    dtype: "torch.dtype" = dtype_option("bfloat16")
    device: "torch.device" = device_option()
    layers: tuple[str, ...] = option(
        "llama-455m,llama3-8b,llama2-70b/8",
        parse=words,
        help="Whose layers: llama-455m, llama3-8b, llama2-70b/8, 8192x8192; with commas.",
    )
    rows: tuple[int, ...] = option(
        "1,2,4,8,16,32,64,128,256", parse=whole_numbers, help="Rows of a product, with commas."
    )
    kernels: tuple[str, ...] = option(
        "auto",
        parse=words,
        help="Int4 kernels, with commas: auto, their names, or all; none for dense products alone.",
    )
    group_size: int = option(128, names=("--group",), least=8, help="Columns that share a scale.")
    repeats: int = option(7, least=1, help="Passes of each contestant.")
    max_bytes: int = option(
        "256MiB",
        names=("--max-memory",),
        parse=num_bytes,
        help="Dense weights of all copies of a layer.",
    )
    label: str = label_option()
    seed: int = seed_option()


@dataclass(frozen=True, kw_only=True)
class VmmOptions:
    """What `vkv bench vmm` runs.

    Attributes:
        page_bytes: page sizes; none for those that suit the device.
        max_bytes: the most memory taken at once; longer runs are left out.
    """

    device: "torch.device" = device_option()
    page_bytes: tuple[int, ...] = option(
        "",
        names=("--pages",),
        parse=sizes,
        help="Page sizes, such as 64KiB,2MiB; none for the device's own.",
    )
    runs: tuple[int, ...] = option(
        "1,2,8,32,128,512", parse=whole_numbers, help="Lengths of runs, in pages."
    )
    repeats: int = option(7, least=1, help="Lives of each run.")
    max_bytes: int = option(
        "512MiB",
        names=("--max-memory",),
        parse=num_bytes,
        help="The most memory to take at once.",
    )


@dataclass(frozen=True, kw_only=True)
class MoveOptions:
    """What `vkv bench move` runs.

    Attributes:
        kv_bytes: of keys and values that move at a time.
        page_bytes: size of a page.
    """

    kv_bytes: tuple[int, ...] = option(
        "16MiB,64MiB,256MiB,512MiB",
        names=("--sizes",),
        parse=sizes,
        help="Bytes of KV to move at a time, with commas.",
    )
    page_bytes: int = option("2MiB", names=("--page",), parse=num_bytes, help="Size of a page.")
    repeats: int = option(7, least=1, help="Moves of each size by each channel.")


@dataclass(frozen=True, kw_only=True)
class StallOptions:
    """What `vkv bench stall` runs.

    Attributes:
        page_bytes: size of a page; None for the engine's choice.
    """

    layers: int | None = option(
        None, least=1, help="Layers of a step. Default: 32 on a GPU, 8 on a CPU."
    )
    heads: str = option("", help=f"{_HEADS}. Default: 32:8x128 on a GPU, 16:4x64 on a CPU.")
    dtype: "torch.dtype" = dtype_option("bfloat16")
    device: "torch.device" = device_option()
    batch: int = option(4, least=1, help="Sequences that decode.")
    context: int | None = option(
        None,
        least=1,
        help="Tokens that they start with, about. Default: 32768 on a GPU, 4096 on a CPU.",
    )
    steps: int = option(500, least=1, help="Decode steps of a run.")
    look_ahead_tokens: int = option(16, least=1, help="Tokens mapped ahead of each sequence.")
    page_bytes: int | None = option(
        None,
        names=("--page",),
        kind=str,
        parse=num_bytes,
        help="Page size, such as 64KiB; none for the engine's choice.",
    )
    repeats: int = option(3, least=1, help="Runs with look-ahead, and as many without.")
    label: str = label_option()
    seed: int = seed_option()

    @property
    def num_layers(self) -> int:
        """Layers of a step, on this device."""
        return self._on_a(gpu=32, cpu=8) if self.layers is None else self.layers

    @property
    def shape(self) -> Shape:
        """Heads, sequences, and the tokens that the longest of them starts with."""
        heads = self.heads or self._on_a(gpu="32:8x128", cpu="16:4x64")
        context = self._on_a(gpu=32_768, cpu=4096) if self.context is None else self.context
        (shape,) = shapes_of_heads(heads, (self.batch,), (context,), 0)
        return shape

    def _on_a(self, *, gpu: _T, cpu: _T) -> _T:
        return gpu if self.device.type == "cuda" else cpu
