"""`vkv bench stall`: whether backing slots with pages is hidden behind the computation.

Decode iterations over real slots, as the engine runs them: every slot grows by a token, the next
tokens' memory is asked for ahead, and every layer stores its keys and values and attends. That is
all a step computes here, without the linears that a model has besides, so there is less to hide
behind than in an engine. Runs with look-ahead, where pages are mapped in the background, and
without, where `grow` maps them itself, take turns over the same slots, which start each time from
the same lengths, with no free page left.

A step is slow for many reasons; because of mapping it is slow by what `grow` waited where it had to
map, or the background was mapping. Where nothing was, what `grow` took shows how busy the machine
was. It is timed around the calls, step by step: the cache counts the same time (`mapping_time_s`,
kept for each run), but asking it takes its lock and visits every page, which in each step would
give the background time to catch up. What mapping in the background takes away from the
computation, the processor's time above all, shows in the length of the steps meanwhile.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...allocator import KVCache, KVLayout, LayerGeometry, PagePool, Slot
from ...attention_backends import (
    AttentionBackend,
    AttentionBatch,
    AttentionNeeds,
    LayerAttention,
    choose_backend,
)
from ...runtime.engine.build import READY_ROWS, host_page_bytes
from ...runtime.engine.config import available_memory
from ...runtime.execution.step_inputs import StepInputs, StepValues
from ...runtime.frontend.progress import counted
from ...vmem import open_driver
from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe, synchronise
from ..record import Findings, Record, Table, record_name
from .options import StallOptions
from .stall_results import Run, draw, stall_tables

_LAYERS_PER_RANGE = {"cpu": 1, "cuda": None}  # the engine's choice
_WARM_UP = 3  # passes before a run


def run(options: StallOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises InvalidConfig if no page is crossed in so few steps, or memory is too small.
    """
    shape, layers = options.shape, options.num_layers
    least = min(layers, options.steps, options.repeats, options.look_ahead_tokens)
    if min(least, shape.batch, shape.context) < 1:
        raise InvalidConfig(
            "batch, context, layers, steps, repeats and look-ahead tokens must be at least 1"
        )
    name = record_name("stall", options.label)
    config = asdict(options) | {"shape": asdict(shape), "layers": layers}
    record = Record(folder, name, device=options.device, config=config, command=command)
    probe = LimitsProbe(options.device, options.dtype)
    runs: dict[str, list[Run]] = {}
    facts: dict[str, Any] = {}

    def steps() -> Generator[None, None, None]:
        with _bench(options) as bench, counted("stall", 2 * options.repeats) as advance:
            facts.update(bench.facts())
            for _ in range(options.repeats):
                probe.measure()
                for mode, ahead in (("on", options.look_ahead_tokens), ("off", 0)):
                    runs.setdefault(mode, []).append(bench.run(ahead))
                    advance()
                    yield
            bench.cache.check_invariants()

    def findings() -> Findings:
        return Findings(
            results={**facts, "runs": {m: [asdict(r) for r in done] for m, done in runs.items()}},
            tables=stall_tables(runs, facts, _in_words(options)),
            draw=partial(draw, runs, facts["crossings"]),
        )

    return record.grow(steps(), findings, probe)


def _in_words(options: StallOptions) -> str:
    shape = options.shape
    return (
        f"{shape.batch} x {shape.context:,} tokens, {options.num_layers} layers of "
        f"{shape.num_heads}:{shape.num_kv_heads}x{shape.head_dim}, "
        f"{str(options.dtype).removeprefix('torch.')}"
    )


# -- the slots -------------------------------------------------------------------------------


@contextmanager
def _bench(options: StallOptions) -> Iterator["_Bench"]:
    """Slots backed and filled up to their first lengths; closed at the end."""
    shape, kind = options.shape, options.device.type
    max_len = shape.context + options.steps
    rough = options.num_layers * shape.kv_bytes(options.dtype) // shape.context * max_len
    if rough > (available := available_memory(options.device)):
        raise InvalidConfig(
            f"the slots take {rough} bytes, and {available} are available; lower --batch, "
            "--context or --layers"
        )
    backend = choose_backend(
        AttentionNeeds(
            device=kind,
            dtype=options.dtype,
            head_dims=frozenset({(shape.head_dim, shape.head_dim)}),
        )
    )
    geometry = (
        LayerGeometry(
            num_kv_heads=shape.num_kv_heads, key_dim=shape.head_dim, value_dim=shape.head_dim
        ),
    ) * options.num_layers
    page_bytes, layers_per_range = options.page_bytes, _LAYERS_PER_RANGE[kind]
    if page_bytes is None and kind == "cpu":
        page_bytes = host_page_bytes(geometry, options.dtype, layers_per_range, rough)
    with ExitStack() as stack:
        driver = stack.enter_context(open_driver(options.device, page_bytes))
        layout = KVLayout(
            geometry,
            options.dtype,
            max_len,
            driver.page_bytes,
            layers_per_range=layers_per_range,
            over_read_tokens=backend.capabilities.over_read_tokens,
        )
        pool = PagePool(
            driver,
            shape.batch * layout.num_pages(max_len) * layout.page_bytes,
            low_watermark=READY_ROWS * layout.num_ranges,
        )
        cache = KVCache(layout, pool, num_slots=shape.batch)
        stack.callback(cache.shutdown)
        yield _Bench(options, cache, backend)


class _Bench:
    """Runs decode steps over the slots of a cache.

    Their lengths are staggered by a row over the batch, so that they do not all reach the end of
    their pages in the same step.
    """

    def __init__(self, options: StallOptions, cache: KVCache, backend: AttentionBackend) -> None:
        shape = options.shape
        self.cache = cache
        self._options, self._backend = options, backend
        self._layer = LayerAttention(scale=shape.head_dim**-0.5)
        stagger = max(1, cache.row_tokens // shape.batch)
        self._starts = [max(1, shape.context - i * stagger) for i in range(shape.batch)]
        self._crossings = [
            sum(cache.num_pages(n + step + 1) > cache.num_pages(n + step) for n in self._starts)
            for step in range(options.steps)
        ]
        if not any(self._crossings):
            raise InvalidConfig(
                f"no slot needs a page within {options.steps} steps: a page lasts "
                f"{cache.row_tokens} tokens; raise --steps to so many"
            )
        for index in range(options.num_layers):
            backend.check_cache(*cache.layer(index))
        generator = torch.Generator(options.device).manual_seed(options.seed)

        def random(num_tokens: int, num_heads: int) -> torch.Tensor:
            size = (num_tokens, num_heads, shape.head_dim)
            numbers = torch.randn(size, generator=generator, device=options.device)
            return numbers.to(options.dtype)

        self._query = random(shape.batch, shape.num_heads)
        self._key, self._value = (random(shape.batch, shape.num_kv_heads) for _ in range(2))
        self._slots = [cache.open() for _ in self._starts]
        rows = [random(shape.context, shape.num_kv_heads) for _ in range(2)]
        for slot, num_tokens in zip(self._slots, self._starts, strict=True):
            cache.grow(slot, num_tokens)
            for index in range(options.num_layers):
                for tensor, values in zip(cache.layer(index), rows, strict=True):
                    tensor[slot.index, :num_tokens].copy_(values[:num_tokens])

    def facts(self) -> dict[str, Any]:
        """What the record says beside the runs; crossings are slots that need pages, by step."""
        layout = self.cache.layout
        return {
            "backend": self._backend.name,
            "page_bytes": layout.page_bytes,
            "row_tokens": layout.row_tokens,
            "pages_per_crossing": layout.num_ranges,
            "starts": self._starts,
            "crossings": self._crossings,
        }

    @torch.inference_mode()
    def run(self, look_ahead_tokens: int) -> Run:
        """Decode from the first lengths on; without look-ahead if it is 0 tokens."""
        self._reset()
        if look_ahead_tokens:  # the engine asks in the prompt's last step
            self._look_ahead(look_ahead_tokens)
        for _ in range(_WARM_UP):
            self._attend()
        before, done = self.cache.stats(), Run()
        for _ in range(self._options.steps):
            start = time.perf_counter()
            backed = 0
            for slot in self._slots:
                backed += slot.num_tokens == slot.ready_tokens
                self.cache.grow(slot, slot.num_tokens + 1)
            grown = time.perf_counter()
            asked = self._look_ahead(look_ahead_tokens) if look_ahead_tokens else 0
            self._attend()
            end = time.perf_counter()
            done.step_s.append(round(end - start, 7))
            done.wait_s.append(round(grown - start, 7))
            done.backed.append(backed)
            done.asked.append(asked)
        after = self.cache.stats()
        done.mapping_time_s = after.mapping_time_s - before.mapping_time_s
        done.background_time_s = after.background_time_s - before.background_time_s
        return done

    def _reset(self) -> None:
        """Back to the first lengths; what was mapped behind them goes back to the system."""
        self.cache.trim()  # waits for the background, too
        for slot, num_tokens in zip(self._slots, self._starts, strict=True):
            self.cache.truncate(slot, num_tokens)
        self.cache.trim()

    def _look_ahead(self, num_tokens: int) -> int:
        """What the engine does once a step is scheduled; how many slots had need of it."""
        if not self.cache.pool.num_available:
            return 0
        asked = 0
        for slot in self._slots:
            target = min(slot.num_tokens + num_tokens, self.cache.max_len)
            asked += target > slot.ready_tokens
            self.cache.look_ahead(slot, target)
        return asked

    def _attend(self) -> None:
        """Every layer over the slots, until the device is done."""
        batch = self._batch(self._slots)
        for index in range(self._options.num_layers):
            keys, values = self.cache.layer(index)
            self._backend.store(self._key, self._value, keys, values, batch)
            self._backend.forward(self._query, keys, values, batch, self._layer)
        synchronise(self._options.device)

    def _batch(self, slots: Sequence[Slot]) -> AttentionBatch:
        """The last token of each slot."""
        lengths, ones = [slot.num_tokens for slot in slots], [1] * len(slots)
        positions = [length - 1 for length in lengths]
        write_rows, write_offsets = self.cache.locate(slots, positions, ones)
        values = StepValues(
            ids=[0] * len(slots),
            positions=positions,
            write_rows=write_rows,
            write_offsets=write_offsets,
            query_lens=ones,
            kv_lens=lengths,
            slots=[slot.index for slot in slots],
        )
        inputs = StepInputs(len(slots), len(slots), self._options.device)
        inputs.fill(values)
        return inputs.batch(values.query_lens, values.kv_lens, values.slots)
