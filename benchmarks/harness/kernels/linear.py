"""`vkv bench linear`: 4-bit and dense linear layers, the products alone, by number of rows.

The shapes are those of a whole layer of real models. A pass goes through as many copies of the
layer as fit into `max_bytes`, so that weights come from memory rather than from the processor's
caches; contestants take turns, pass by pass, and must agree on the result. On a GPU a pass of a
product is one CUDA graph, timed by events, as decode steps are replayed: at few rows, launching the
kernels one by one takes longer than they do.
"""

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ...quant import Int4Linear, Int4Weight
from ...quant.kernels.activations import KERNEL as INT8_INPUTS
from ...quant.kernels.table import MANY_ROWS, available_kernels
from ...runtime.cpu_kernels import kernels as native_kernels
from ...runtime.cpu_kernels.packing import one_dnn_packs
from ...runtime.frontend.progress import counted
from ...vmem.errors import InvalidConfig
from ..limits import Limits, LimitsProbe
from ..record import Findings, Record, Table, record_name
from .attention import graph_clock
from .options import LinearOptions

# [out, in] of a layer's products, those over the same input joined.
LAYERS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "llama-455m": ((1536, 1024), (1024, 1024), (9728, 1024), (1024, 4864)),
    "llama3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama2-70b/8": ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)),  # a slice of eight
    "8192x8192": ((8192, 8192),),  # what MARLIN's figures are of
}
_MAX_COPIES = 12
_Product = Callable[[torch.Tensor], torch.Tensor]


def run(options: LinearOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    if unknown := [name for name in options.layers if name not in LAYERS]:
        raise InvalidConfig(f"layers {', '.join(unknown)}: use some of {', '.join(LAYERS)}")
    if options.kernels == ("all",):
        options = replace(options, kernels=all_kernels(options.device, options.dtype))
    if options.kernels == ("none",):
        options = replace(options, kernels=())
    config = asdict(options) | {"shapes": dict(LAYERS)}
    name = record_name("linear", options.label)
    record = Record(folder, name, device=options.device, config=config, command=command)
    probe = LimitsProbe(options.device, options.dtype)
    cells: list[dict[str, Any]] = []

    def steps() -> Generator[None, None, None]:
        with counted("linears", len(options.layers) * len(options.rows)) as advance:
            for name in options.layers:
                probe.measure()
                copies = _copies(name, options)
                for num_rows in options.rows:
                    cells.append(_measure(name, copies, num_rows, options))
                    advance()
                    yield
                del copies  # before the next ones are made

    def findings() -> Findings:
        layers = list(dict.fromkeys(cell["layer"] for cell in cells))
        return Findings(
            results={"cells": cells},
            tables=[_table(name, cells, probe.limits()) for name in layers],
            draw=partial(_plot, layers, cells),
        )

    return record.grow(steps(), findings, probe)


# -- contestants -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """Copies of a layer, every product of each with its own memory.

    Attributes:
        products: for each contestant, for each copy, the layer's products.
        weight_bytes: of one copy of the first contestant's: codes, scales and zeros, or dense.
    """

    products: Mapping[str, Sequence[Sequence[_Product]]]
    weight_bytes: int


def _copies(name: str, options: LinearOptions) -> _Copies:
    """As many copies as `max_bytes` allows."""
    elements = sum(out * inner for out, inner in LAYERS[name])
    copies = max(1, min(_MAX_COPIES, options.max_bytes // (elements * options.dtype.itemsize)))
    generator = torch.Generator().manual_seed(options.seed)
    products: dict[str, list[list[_Product]]] = {}
    weight_bytes = 0
    for _ in range(copies):
        layer: dict[str, list[_Product]] = {}
        weight_bytes = 0
        for out, inner in LAYERS[name]:
            weight = _random_weight(out, inner, options.group_size, generator)
            dense_bytes = out * inner * options.dtype.itemsize
            weight_bytes += weight.num_bytes if options.kernels else dense_bytes
            for contestant, product in _contestants(weight.to(options.device), options):
                layer.setdefault(contestant, []).append(product)
        for contestant, parts in layer.items():
            products.setdefault(contestant, []).append(parts)
    return _Copies(products=products, weight_bytes=weight_bytes)


def _random_weight(out: int, inner: int, group_size: int, generator: torch.Generator) -> Int4Weight:
    codes = torch.randint(0, 16, (out, inner), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, inner // group_size, generator=generator) * inner**-0.5
    return Int4Weight.from_codes(codes, scales.half(), None)


def _contestants(weight: Int4Weight, options: LinearOptions) -> Iterator[tuple[str, _Product]]:
    """The int4 kernels, and vkv's and the dense library's on the dequantised weight."""
    for kernel in options.kernels:
        linear = Int4Linear(weight, kernel_name=None if kernel == "auto" else kernel)
        linear.settle(options.dtype)
        yield f"int4 {kernel}", linear
    dense = weight.dequantize(options.dtype)
    panel = native_kernels.best_panel(options.dtype)
    if options.device.type == "cpu" and panel is not None:
        yield "dense vkv, packed", native_kernels.PanelLinear(dense, None, panel=panel)
    if options.device.type == "cpu" and one_dnn_packs(options.dtype):
        reordered = torch.ops.mkldnn._reorder_linear_weight(dense, 1)
        yield (
            "dense oneDNN, packed",
            lambda inputs: torch.ops.mkldnn._linear_pointwise(
                inputs, reordered, None, "none", [], ""
            ),
        )
    yield "dense", lambda inputs: functional.linear(inputs, dense)


def all_kernels(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """ "auto", and every kernel that takes each batch of a common weight."""
    weight = Int4Weight.from_codes(
        torch.zeros(64, 256, dtype=torch.uint8), torch.zeros(64, 2), None
    )
    fitting = [
        kernel.name
        for kernel in available_kernels()
        if all(kernel.accepts(weight, device, dtype, rows) for rows in (1, MANY_ROWS))
    ]
    return ("auto", *fitting)


# -- measuring -------------------------------------------------------------------------------


@torch.inference_mode()
def _measure(
    name: str,
    copies: _Copies,
    num_rows: int,
    options: LinearOptions,
) -> dict[str, Any]:
    """Seconds of each of a layer's products, by contestant and pass.

    `moved_bytes` is what the first contestant moves at least: its weights, inputs and outputs,
    each once.
    """
    generator = torch.Generator().manual_seed(options.seed + num_rows)
    inputs = [
        torch.randn(num_rows, inner, generator=generator).to(options.device, options.dtype)
        for _, inner in LAYERS[name]
    ]
    reference = next(iter(copies.products.values()))
    for contestant, layers in copies.products.items():  # also warms up
        tolerance = 0.25 if contestant == f"int4 {INT8_INPUTS}" else 5e-2
        for layer, expected in zip(layers, reference, strict=True):
            for product, wanted, x in zip(layer, expected, inputs, strict=True):
                torch.testing.assert_close(product(x), wanted(x), atol=tolerance, rtol=5e-2)
    clock = _host_clock if options.device.type == "cpu" else graph_clock
    clocks = {
        contestant: [
            clock(partial(_pass, [layer[index] for layer in layers], x))
            for index, x in enumerate(inputs)
        ]
        for contestant, layers in copies.products.items()
    }
    seconds: dict[str, list[list[float]]] = {contestant: [] for contestant in clocks}
    for _ in range(options.repeats):
        for contestant, measured in clocks.items():
            seconds[contestant].append([once() / len(reference) for once in measured])
    rows_bytes = sum(x.nbytes for x in inputs)
    rows_bytes += sum(num_rows * out * options.dtype.itemsize for out, _ in LAYERS[name])
    return {
        "layer": name,
        "rows": num_rows,
        "copies": len(reference),
        "moved_bytes": copies.weight_bytes + rows_bytes,
        "product_s": seconds,
    }


def _pass(products: Sequence[_Product], inputs: torch.Tensor) -> None:
    """The same product of all copies."""
    for product in products:
        product(inputs)


def _host_clock(run: Callable[[], object]) -> Callable[[], float]:
    """Runs a pass, each time it is called, and returns the seconds that it took."""

    def measured() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return measured


# -- results ---------------------------------------------------------------------------------


def _layer_seconds(cell: Mapping[str, Any], contestant: str) -> list[float]:
    return [sum(one) for one in cell["product_s"][contestant]]


def _ratio(cell: Mapping[str, Any], contestant: str, first: str) -> float:
    """How many times as long as `first`, the median over passes."""
    ours, theirs = _layer_seconds(cell, first), _layer_seconds(cell, contestant)
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def _table(name: str, cells: Sequence[Mapping[str, Any]], limits: Limits) -> Table:
    mine = [cell for cell in cells if cell["layer"] == name]
    contestants = list(mine[0]["product_s"]) if mine else []
    first = contestants[0] if contestants else ""
    elements = sum(out * inner for out, inner in LAYERS[name])
    rows = []
    for cell in mine:
        seconds = statistics.median(_layer_seconds(cell, first))
        bytes_s = cell["moved_bytes"] / limits.read_bytes_per_s
        products_s = 2 * elements * cell["rows"] / limits.flops_per_s
        rows.append(
            [
                str(cell["rows"]),
                f"{seconds * 1e6:,.0f}",
                f"{bytes_s / seconds:.0%}",
                f"{products_s / seconds:.0%}",
                *(f"{_ratio(cell, other, first):.2f}" for other in contestants[1:]),
            ]
        )
    return Table(
        title=f"Linears of one layer of {name}",
        columns=[
            "rows",
            f"{first}, µs",
            "of bandwidth",
            "of matrix rate",
            *(f"{other}: times as long" for other in contestants[1:]),
        ],
        rows=rows,
    )


def _plot(layers: Sequence[str], cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(layers), 4))
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, name in zip(panels, layers, strict=True):
        mine = [cell for cell in cells if cell["layer"] == name]
        first, *others = mine[0]["product_s"]
        for other in others:
            ratios = [_ratio(cell, other, first) for cell in mine]
            axes.plot([cell["rows"] for cell in mine], ratios, marker="o", label=other)
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(xscale="log", title=name, xlabel="rows", ylabel=f"time over that of {first}")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
