"""`vkv bench memory`: memory held against tokens held, over a ragged workload.

The same requests run through vkv's engine over virtual and over paged KV, sampled at every step.
Beside them stand the caches of `transformers` as a padded batch fills them: static (allocated
for the longest of the batch at once) and dynamic (one concatenation a step). Those are the real
cache objects, filled with the lengths of the workload; no model runs over them, since their size
does not depend on what they hold.

Waste is the share of that memory which holds no token of a live request: on average over the
steps, when the tokens are most, and, as "never used", what was left of each request's memory when
it had its last token.

After the last request the engine rests, and memory goes back by itself (`IdleTrim`); the samples
go on until then and as long again. The paged pool was allocated whole and stays. The time to memory
returned counts from the end of the last request, the rest that the engine waits out included.

Driver calls a token are those of the second half of the output tokens: by then finished requests
have left memory that the next ones take over.
"""

import os
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ...runtime.engine.config import EngineConfig
from ...runtime.engine.engine import EngineStats
from ...runtime.frontend.llm import LLM
from ...runtime.model.loading import load_model
from ...vmem.errors import InvalidConfig
from ..driver import Driver
from ..limits import LimitsProbe
from ..load.workloads import WorkItem, ragged
from ..record import Findings, Record, Table, record_name
from .checkpoints import cache_bytes_per_token, gains_table, parse_format, save_checkpoints
from .memory_results import (
    FinalUse,
    MemorySample,
    columns,
    draw,
    engine_table,
    memory_table,
    return_time_s,
    steady_calls_per_token,
    summarise,
)
from .options import MemoryOptions
from .shapes import build_model, kv_geometry

_PATIENCE_S = 10.0  # for a trim that is late
_WHEN_DUE_S = 1e-3  # between samples then

KINDS = ("virtual", "paged", "static", "dynamic")


def run(options: MemoryOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    parse_format(options.quant)
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        raise InvalidConfig(f"{', '.join(unknown)}: use some of {', '.join(KINDS)}")
    name = record_name("memory", options.shape)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    model = build_model(options.shape, dtype=options.dtype, device=options.device)
    work = ragged(
        options.num_requests,
        prompt_lens=options.prompt_lens,
        output_lens=options.output_lens,
        vocab_size=model.config.vocab_size,
        seed=options.seed,
    )
    found = _Found()
    probe = LimitsProbe(options.device, options.dtype)

    def steps() -> Generator[None, None, None]:
        for kind in options.kinds:
            probe.measure()
            found.add(kind, model, work, options)
            yield
        if options.quant is not None:
            found.weight_bytes = _weigh(options)
            yield

    def findings() -> Findings:
        title = (
            f"{options.num_requests} ragged requests, at most {options.max_seqs} at once, "
            f"{options.shape}"
        )
        return Findings(
            results=found.as_record(),
            tables=found.tables(cache_bytes_per_token(model, options.dtype)),
            draw=lambda path: draw(found.samples, found.rest, title=title, path=path),
        )

    return record.grow(steps(), findings, probe)


@dataclass
class _Found:
    """What has been measured, by kind of cache; `rest` and `engines` of vkv's own alone."""

    samples: dict[str, list[MemorySample]] = field(default_factory=dict)
    rest: dict[str, list[MemorySample]] = field(default_factory=dict)
    ends: dict[str, FinalUse] = field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)

    def add(
        self, kind: str, model: PreTrainedModel, work: Sequence[WorkItem], options: MemoryOptions
    ) -> None:
        """Run the workload over one kind of cache."""
        ends = FinalUse()
        if kind in ("virtual", "paged"):
            samples, self.rest[kind], self.engines[kind] = _run_engine(
                model, work, options, kind, ends
            )
        else:
            samples = list(_fill_caches(model, work, options, kind, ends))
        self.samples[kind], self.ends[kind] = samples, ends

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        return {kind: summarise(rows, self.ends[kind]) for kind, rows in self.samples.items()}

    def tables(self, kv_bytes_per_token: int) -> list[Table]:
        found = [memory_table(self.summary)]
        if self.engines:
            found.append(engine_table(self.engines))
        if self.weight_bytes:
            found.append(gains_table(self.weight_bytes, kv_bytes_per_token))
        return found

    def as_record(self) -> dict[str, Any]:
        return {
            "summary": self.summary,
            "engines": self.engines,
            "weight_bytes": self.weight_bytes,
            "samples": {kind: columns(rows) for kind, rows in self.samples.items()},
            "rest": {kind: columns(rows) for kind, rows in self.rest.items()},
        }


def _weigh(options: MemoryOptions) -> dict[str, int]:
    """Bytes of the weights as vkv keeps them: dense, in 4 bits, and with a 4-bit output layer."""
    with tempfile.TemporaryDirectory(prefix="vkv-bench-") as scratch:
        saved = save_checkpoints(
            options.shape, None, options.dtype, options.quant, scratch=Path(scratch)
        )
        assert saved.int4 is not None
        cases = {
            "dense": (saved.dense, None),
            f"{options.quant}": (saved.int4, None),
            f"{options.quant}, 4-bit output layer": (saved.int4, 4),
        }
        return {
            name: load_model(
                folder, device=options.device, dtype=options.dtype, lm_head_bits=bits
            ).weight_bytes
            for name, (folder, bits) in cases.items()
        }


# -- vkv's own caches ------------------------------------------------------------------------


def _run_engine(
    model: PreTrainedModel,
    work: Sequence[WorkItem],
    options: MemoryOptions,
    kind: str,
    ends: FinalUse,
) -> tuple[list[MemorySample], list[MemorySample], dict[str, Any]]:
    """Run the workload through the engine, with a sample after every step, and let it rest.

    Returns the samples of the work, those of the rest, and figures of the engine.
    """
    config = EngineConfig(
        kv=kind,  # type: ignore[arg-type]
        max_seqs=options.max_seqs,
        max_len=max(item.num_tokens for item in work),
        look_ahead_tokens=options.look_ahead_tokens,
        kv_memory=_fair_limit(model, work, options),
        pack_weights=True,  # as for a checkpoint: its steps are what waiting is compared with
    )
    samples: list[MemorySample] = []
    with LLM(model, dtype=options.dtype, device=options.device, **asdict(config)) as llm:
        driver = Driver(llm)
        token_bytes, row_bytes = driver.token_bytes, driver.row_bytes
        start = time.perf_counter()
        for index, item in enumerate(work):
            driver.submit(str(index), item.prompt, item.num_output_tokens)
        worst_waste = 0.0
        last_seen: dict[str, tuple[int, int]] = {}  # of each request: bytes of tokens, of pages
        while driver.has_work:
            driver.step()
            for request in driver.running():
                used = request.num_held_tokens * token_bytes
                backed = driver.backed_bytes(request.num_held_tokens)
                last_seen[request.request_id] = used, backed
                worst_waste = max(worst_waste, (backed - used) / row_bytes)
            samples.append(_sample(driver.stats(), token_bytes, time.perf_counter() - start))
        ends.token_bytes = sum(used for used, _ in last_seen.values())
        ends.kv_bytes = sum(backed for _, backed in last_seen.values())
        stats = llm.stats()
        rest = list(_rest(driver, options.idle_s, token_bytes, start))
        after = llm.stats()
    facts = _facts(stats, samples, rest) | {
        "worst_waste_rows_per_request": worst_waste,
        "idle_s": options.idle_s,
        "physical_bytes_after_rest": after.physical_bytes,
        "pages_held_after_rest": after.pages_held,
    }
    return samples, rest, facts


def _facts(
    stats: EngineStats, samples: Sequence[MemorySample], rest: Sequence[MemorySample]
) -> dict[str, Any]:
    """Figures of an engine, whose counters are those after its last step."""
    return {
        "page_bytes": stats.page_bytes,
        "row_tokens": stats.row_tokens,
        "num_steps": stats.num_steps,
        "num_preemptions": stats.num_preemptions,
        "step_time_s": stats.step_time_s,
        "mapping_time_s": stats.mapping_time_s,
        "mapping_share": stats.mapping_time_s / stats.step_time_s,
        "background_time_s": stats.background_time_s,
        "driver_calls": stats.driver_calls,
        "steady_driver_calls_per_token": steady_calls_per_token(samples),
        "return_time_s": return_time_s(samples[-1], rest),
        "physical_bytes_before_rest": stats.physical_bytes,
    }


def _rest(driver: Driver, idle_s: float, token_bytes: int, start: float) -> Iterator[MemorySample]:
    """Samples of an engine without work, until its memory has gone back and as long again."""
    begin = time.perf_counter()
    with driver.resting(idle_s):
        while True:
            stats, now = driver.stats(), time.perf_counter()
            yield _sample(stats, token_bytes, now - start)
            patience = _PATIENCE_S if stats.pages_held else 0.0
            if now - begin > 2 * idle_s + patience:
                return
            is_due = stats.pages_held and now - begin > idle_s
            time.sleep(_WHEN_DUE_S if is_due else idle_s / 50)


def _sample(stats: EngineStats, token_bytes: int, time_s: float) -> MemorySample:
    live_pages = stats.pages_held - stats.pages_parked - stats.pages_ahead
    return MemorySample(
        output_tokens=stats.num_output_tokens,
        live_requests=stats.num_running,
        token_bytes=(stats.tokens_held - stats.tokens_parked) * token_bytes,
        kv_bytes=live_pages * stats.page_bytes,
        ahead_bytes=stats.pages_ahead * stats.page_bytes,
        parked_bytes=stats.pages_parked * stats.page_bytes,
        physical_bytes=stats.physical_bytes,
        virtual_bytes=stats.virtual_bytes,
        rss_bytes=_rss_bytes(),
        driver_calls=sum(stats.driver_calls.values()),
        time_s=time_s,
    )


def _rss_bytes() -> int:
    """Memory of this process that is resident now."""
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _fair_limit(model: PreTrainedModel, work: Sequence[WorkItem], options: MemoryOptions) -> int:
    """What a padded static batch takes: every kind may use as much, none must."""
    longest = max(len(item.prompt) for item in work) + max(i.num_output_tokens for i in work)
    return options.max_seqs * longest * cache_bytes_per_token(model, options.dtype)


# -- the caches of transformers ----------------------------------------------------------------


def _fill_caches(
    model: PreTrainedModel,
    work: Sequence[WorkItem],
    options: MemoryOptions,
    kind: str,
    ends: FinalUse,
) -> Iterator[MemorySample]:
    """Static batches of `max_seqs` requests, padded to their longest, until all are done."""
    done = 0
    token_bytes = cache_bytes_per_token(model, options.dtype)
    for start in range(0, len(work), options.max_seqs):
        batch = work[start : start + options.max_seqs]
        prompt = max(len(item.prompt) for item in batch)
        steps = max(item.num_output_tokens for item in batch)
        if kind == "static":
            cache = StaticCache(model.config, max_cache_len=prompt + steps)
        else:
            cache = DynamicCache(config=model.config)
        for step in range(steps):
            _append(cache, model, len(batch), prompt if step == 0 else 1, options)
            done += sum(item.num_output_tokens > step for item in batch)
            live = [item for item in batch if item.num_output_tokens > step]
            yield MemorySample(
                output_tokens=done,
                live_requests=len(live),
                token_bytes=sum(len(i.prompt) + step for i in live) * token_bytes,
                kv_bytes=_cache_bytes(cache),
                physical_bytes=_cache_bytes(cache),
            )
        ends.token_bytes += sum(item.num_tokens - 1 for item in batch) * token_bytes
        ends.kv_bytes += _cache_bytes(cache)


def _append(
    cache: StaticCache | DynamicCache,
    model: PreTrainedModel,
    batch_size: int,
    num_tokens: int,
    options: MemoryOptions,
) -> None:
    num_kv_heads, head_dim = kv_geometry(model.config)
    new = torch.zeros(batch_size, num_kv_heads, num_tokens, head_dim, dtype=options.dtype)
    for layer in range(model.config.num_hidden_layers):
        cache.update(new, new, layer)


def _cache_bytes(cache: StaticCache | DynamicCache) -> int:
    tensors = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors)
