"""`vkv bench attention`: contiguous against paged attention, the kernels alone.

The caches are the engine's own: slots of mapped virtual memory in several layouts, and the paged
baseline with its shuffled blocks, all holding the same numbers. A pass goes through as many layers
as it takes for keys and values to come from memory rather than from the processor's caches;
contestants take turns, pass by pass. On a GPU a pass is one CUDA graph, timed by events: what the
kernels take, not what launching them takes.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...allocator import (
    KVCache,
    KVLayout,
    LayerGeometry,
    PagedKVCache,
    PagedLayout,
    PagePool,
    SlotCache,
)
from ...attention_backends import (
    AttentionBackend,
    AttentionBatch,
    AttentionNeeds,
    LayerAttention,
    create_backend,
)
from ...runtime.frontend.progress import counted
from ...vmem import open_driver
from ..limits import LimitsProbe
from ..peers.peer import WORKERS, Worker, interpreter_of
from ..record import Findings, Record, Table, record_name
from .attention_layouts import HeadMajor, SlotLayout
from .attention_results import attention_table, draw
from .attention_shapes import Shape
from .options import AttentionOptions

PEERS: Mapping[str, str] = {"vllm": "vllm_attention_worker.py"}
_MAX_LAYERS = 24
_MIN_LAYERS = 4  # where they fit; fewer would not show what interleaving layers costs
_ENOUGH_BYTES = {"cpu": 1 << 40, "cuda": 1 << 30}  # far beyond a GPU's caches
_BLOCK_TOKENS = 16
_SPIN_S = 0.05
_PAGE_BYTES = {"cpu": 256 << 10, "cuda": None}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A backend over a filled cache."""

    name: str
    backend: AttentionBackend
    cache: SlotCache | HeadMajor
    batch: AttentionBatch


def run(options: AttentionOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    name, config = record_name("attention", options.label), asdict(options)
    record = Record(folder, name, device=options.device, config=config, command=command)
    commands = {
        f"{name}, its kernel": [interpreter_of(name, path, PEERS), str(WORKERS / PEERS[name])]
        for name, path in options.peers.items()
    }
    probe = LimitsProbe(options.device, options.dtype)
    left_out = _too_large(options)
    fitting = [shape for shape in options.problems if shape not in left_out]
    results: list[dict[str, Any]] = []
    reasons = [{"shape": asdict(shape), "why": why} for shape, why in left_out.items()]

    def steps() -> Generator[None, None, None]:
        with (
            _started(commands, options.dtype) as peers,
            counted("attention", len(fitting)) as advance,
        ):
            for shape in fitting:
                probe.measure()
                results.append(_cell(shape, options, peers))
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()  # what the paged cache had, slots may have now
                advance()
                yield

    def findings() -> Findings:
        return Findings(
            results={"cells": results, "left_out": reasons},
            tables=[attention_table(results, reasons, options.dtype, probe.limits())],
            draw=partial(draw, results),
        )

    return record.grow(steps(), findings, probe)


def _too_large(options: AttentionOptions) -> dict[Shape, str]:
    """The problems of which not even one layer fits, and why."""
    limit = options.max_bytes
    sizes = {shape: shape.kv_bytes(options.dtype) for shape in options.problems}
    return {
        shape: f"keys and values take {_mib(size)} a layer, above --max-memory ({_mib(limit)})"
        for shape, size in sizes.items()
        if size > limit
    }


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.6g} MiB"


def _num_layers(kv_bytes: int, options: AttentionOptions) -> int:
    """How many layers of `kv_bytes` a pass goes through."""
    enough = max(_MIN_LAYERS, _ENOUGH_BYTES[options.device.type] // kv_bytes)
    return int(min(_MAX_LAYERS, enough, options.max_bytes // kv_bytes))


def _cell(shape: Shape, options: AttentionOptions, peers: Mapping[str, Worker]) -> dict[str, Any]:
    """One problem: what each contestant took."""
    layers = _num_layers(shape.kv_bytes(options.dtype), options)
    with _contestants(shape, layers, options) as contestants:
        seconds = _measure(contestants, shape, layers, options, peers)
    return {"shape": asdict(shape), "layers": layers, "layer_s": seconds}


# -- contestants -----------------------------------------------------------------------------


@contextmanager
def _contestants(
    shape: Shape, layers: int, options: AttentionOptions
) -> Iterator[list[Contestant]]:
    """All backends over their caches, which hold the same keys and values."""
    contestants: list[Contestant] = []
    with ExitStack() as stack:
        for index, layout in enumerate(options.layouts):
            names = options.contiguous if index == 0 else options.contiguous[:1]
            backends = [create_backend(name, _needs(shape, options, False)) for name in names]
            cache, batch = _filled(stack, shape, layers, options, layout)
            contestants += [
                Contestant(name=f"{b.name}, {layout}", backend=b, cache=cache, batch=batch)
                for b in backends
            ]
        filled: dict[int, tuple[SlotCache | HeadMajor, AttentionBatch]] = {}
        for name in options.paged:
            backend = create_backend(name, _needs(shape, options, True))
            size = math.lcm(_BLOCK_TOKENS, backend.capabilities.block_multiple)
            if size not in filled:
                filled[size] = _filled(stack, shape, layers, options, size)
            cache, batch = filled[size]
            contestants.append(
                Contestant(name=backend.name, backend=backend, cache=cache, batch=batch)
            )
        for contestant in contestants:
            contestant.backend.check_cache(*contestant.cache.layer(0))
        yield contestants


def _needs(shape: Shape, options: AttentionOptions, paged: bool) -> AttentionNeeds:
    dims = frozenset({(shape.head_dim, shape.head_dim)})
    return AttentionNeeds(
        device=options.device.type, dtype=options.dtype, head_dims=dims, paged=paged
    )


def _empty(
    stack: ExitStack,
    geometry: Sequence[LayerGeometry],
    context: int,
    num_slots: int,
    options: AttentionOptions,
    how: SlotLayout | int,
) -> SlotCache:
    """A cache with memory for so many slots of `context` tokens, closed by `stack`."""
    cache: SlotCache
    if isinstance(how, int):
        paged = PagedLayout(tuple(geometry), options.dtype, context, how)
        limit = num_slots * paged.num_pages(context) * paged.page_bytes
        cache = PagedKVCache(paged, limit, num_slots=num_slots, device=options.device)
    else:
        driver = open_driver(options.device, _PAGE_BYTES[options.device.type])
        stack.callback(driver.close)
        layout = KVLayout(
            tuple(geometry),
            options.dtype,
            context,
            driver.page_bytes,
            layers_per_range=how.layers_per_range,
            split_kv=how.split_kv,
        )
        limit = num_slots * layout.num_pages(context) * layout.page_bytes
        cache = KVCache(layout, PagePool(driver, limit), num_slots=num_slots)
    stack.callback(cache.shutdown)
    return cache


def _filled(
    stack: ExitStack,
    shape: Shape,
    layers: int,
    options: AttentionOptions,
    how: SlotLayout | int,
) -> tuple[SlotCache | HeadMajor, AttentionBatch]:
    """A cache of the shape's sequences, closed by `stack`.

    Args:
        how: the layout of contiguous slots; or the tokens of a block, for the paged cache.
    """
    heads_apart = isinstance(how, SlotLayout) and how.head_major
    lanes = shape.num_kv_heads if heads_apart else 1  # slots of a sequence
    geometry = LayerGeometry(
        num_kv_heads=shape.num_kv_heads // lanes, key_dim=shape.head_dim, value_dim=shape.head_dim
    )
    cache = _empty(stack, (geometry,) * layers, shape.context, shape.batch * lanes, options, how)
    slots = [cache.open() for _ in range(shape.batch * lanes)]
    for slot in slots:
        cache.grow(slot, shape.context)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    token = (shape.num_kv_heads, shape.head_dim)
    rows = torch.randn(
        2, shape.context, *token, generator=generator, device=options.device, dtype=torch.float32
    ).to(options.dtype)
    for index, slot in enumerate(slots):
        where = [part.to(options.device) for part in cache.locate([slot], [0], [shape.context])]
        lane = slice(index % lanes, index % lanes + 1) if heads_apart else slice(None)
        for layer in range(layers):
            for tensor, values in zip(cache.layer(layer), rows, strict=True):
                tensor.index_put_(tuple(where), values[:, lane])
    slots = slots[: shape.batch]  # by the numbers that a backend sees
    starts, counts = [shape.context - shape.queries] * shape.batch, [shape.queries] * shape.batch
    ids = [slot.index for slot in slots]

    def int32(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=options.device)

    seen = HeadMajor(cache, shape.num_kv_heads) if heads_apart else cache
    return seen, AttentionBatch(
        query_lens=tuple(counts),
        kv_lens=(shape.context,) * shape.batch,
        slots=tuple(ids),
        cu_seqlens_q=int32([shape.queries * i for i in range(shape.batch + 1)]),
        seqused_k=int32([shape.context] * shape.batch),
        slot_ids=int32(ids),
        write_index=cache.locate(slots, starts, counts),
        block_tables=cache.block_tables(slots),
    )


# -- measuring -------------------------------------------------------------------------------


@contextmanager
def _started(
    commands: Mapping[str, Sequence[str]], dtype: torch.dtype
) -> Iterator[dict[str, Worker]]:
    """The peers' processes. Raises WorkerFailed if one does not load."""
    own = {"threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch.")}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="vkv-bench-")))
        peers: dict[str, Worker] = {}
        for index, (name, command) in enumerate(commands.items()):
            peers[name] = Worker(command, own, scratch / f"{index}.log")
            stack.callback(peers[name].close)
        yield peers


def _measure(
    contestants: Sequence[Contestant],
    shape: Shape,
    layers: int,
    options: AttentionOptions,
    peers: Mapping[str, Worker],
) -> dict[str, list[float]]:
    """Seconds a layer of each contestant, one figure a pass; all must agree on the result."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    query = torch.randn(
        shape.batch * shape.queries, shape.num_heads, shape.head_dim, generator=generator
    ).to(options.device, options.dtype)
    layer = LayerAttention(scale=shape.head_dim**-0.5)
    expected = _pass(contestants[0], query, layer, layers)
    for contestant in contestants[1:]:  # also warms up
        torch.testing.assert_close(
            _pass(contestant, query, layer, layers), expected, atol=3e-2, rtol=3e-2
        )
    clock = _host_clock if options.device.type == "cpu" else graph_clock
    clocks = {c.name: clock(partial(_pass, c, query, layer, layers)) for c in contestants}
    for name, peer in peers.items():
        peer.ask({"shape": asdict(shape), "layers": layers, "seed": options.seed})
        shown = torch.tensor(peer.ask({"pass": True, "result": True})["result"])
        flat = expected.flatten()[: len(shown)].float()
        torch.testing.assert_close(shown, flat, atol=3e-2, rtol=3e-2)
        clocks[name] = partial(_peer_clock, peer)
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(options.repeats):
        for name, measured in clocks.items():
            seconds[name].append(measured() / layers)
    return seconds


def _host_clock(run: Callable[[], object]) -> Callable[[], float]:
    """Runs a pass, each time it is called, and returns the seconds that it took.

    One runs before it: the first after another contestant's turn wakes threads and waits for a
    clock that had slowed down, which is no fault of the kernel's.
    """

    def measured() -> float:
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return measured


def _peer_clock(peer: Worker) -> float:
    """Between pauses: threads of OpenMP spin for some milliseconds when they are done, and would
    take the cores from another process."""
    time.sleep(_SPIN_S)
    seconds = peer.ask({"pass": True})["seconds"]
    time.sleep(_SPIN_S)
    return seconds


def graph_clock(run: Callable[[], object]) -> Callable[[], float]:
    """As `_host_clock`, of the pass captured in a CUDA graph, between two events."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    graph.replay()  # the first is slower

    def measured() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return measured


@torch.inference_mode()
def _pass(
    contestant: Contestant, query: torch.Tensor, layer: LayerAttention, layers: int
) -> torch.Tensor:
    """All layers once; returns the last one's result."""
    out = torch.empty_like(query)
    for index in range(layers):
        keys, values = contestant.cache.layer(index)
        contestant.backend.forward(query, keys, values, contestant.batch, layer, out=out)
    return out
