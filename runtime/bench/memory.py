"""`vkv bench memory`: memory held against tokens held, over a ragged workload.

The same requests run through vkv's engine over virtual and over paged KV, sampled at every step.
Beside them stand the caches of `transformers` as a padded batch fills them: static (allocated
for the longest of the batch at once) and dynamic (one concatenation a step). Those are the real
cache objects, filled with the lengths of the workload; no model runs over them, since their size
does not depend on what they hold.

Waste is the share of that memory which holds no token of a live request: on average over the
steps, when the tokens are most, and, as "never used", what was left of each request's memory when
it had its last token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ...allocator import KVCache, PagedKVCache
from ..config import EngineConfig
from ..llm import LLM
from ..sampling_params import SamplingParams
from .record import Table, require_matplotlib, write_record
from .shapes import build_model
from .workloads import WorkItem, ragged

KINDS = ("virtual", "paged", "static", "dynamic")


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """Memory at one step, in bytes.

    Attributes:
        output_tokens: tokens generated so far.
        live_requests: requests that run.
        token_bytes: KV of their tokens.
        kv_bytes: memory that backs it, used or not.
        ahead_bytes: memory mapped ahead of their growth.
        parked_bytes: memory of finished requests, kept for the next.
        physical_bytes: all memory that exists for KV.
    """

    output_tokens: int
    live_requests: int
    token_bytes: int
    kv_bytes: int
    ahead_bytes: int = 0
    parked_bytes: int = 0
    physical_bytes: int = 0


@dataclass
class FinalUse:
    """What requests ended with, summed: bytes of their tokens, and the bytes that backed them."""

    token_bytes: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What to run; see `vkv bench memory --help`."""

    shape: str = "llama-tiny"
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    num_requests: int = 64
    prompt_lens: tuple[int, int] = (16, 2000)
    output_lens: tuple[int, int] = (16, 256)
    max_seqs: int = 16
    look_ahead_tokens: int = 16
    kinds: tuple[str, ...] = KINDS
    seed: int = 0


def run(options: MemoryOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    require_matplotlib()  # before the work, not after it
    model = build_model(options.shape, dtype=options.dtype, device=options.device)
    work = ragged(
        options.num_requests,
        prompt_lens=options.prompt_lens,
        output_lens=options.output_lens,
        vocab_size=model.config.vocab_size,
        seed=options.seed,
    )
    samples: dict[str, list[MemorySample]] = {}
    ends = {kind: FinalUse() for kind in options.kinds}
    engines: dict[str, dict[str, Any]] = {}
    for kind in options.kinds:
        if kind in ("virtual", "paged"):
            samples[kind], engines[kind] = _run_engine(model, work, options, kind, ends[kind])
        else:
            samples[kind] = list(_fill_caches(model, work, options, kind, ends[kind]))
    summary = {kind: _summary(rows, ends[kind]) for kind, rows in samples.items()}
    tables = [_memory_table(summary)]
    if engines:
        tables.append(_engine_table(engines))
    path = write_record(
        folder,
        f"memory-{options.shape}",
        device=options.device,
        config=asdict(options) | {"dtype": str(options.dtype), "device": str(options.device)},
        results={
            "summary": summary,
            "engines": engines,
            "samples": {kind: _columns(rows) for kind, rows in samples.items()},
        },
        tables=tables,
        command=command,
    )
    _plot(samples, options, path.with_suffix(".png"))
    return path, tables


# -- vkv's own caches ------------------------------------------------------------------------


def _run_engine(
    model: PreTrainedModel,
    work: Sequence[WorkItem],
    options: MemoryOptions,
    kind: str,
    ends: FinalUse,
) -> tuple[list[MemorySample], dict[str, Any]]:
    """Run the workload through the engine, with a sample after every step."""
    config = EngineConfig(
        kv=kind,  # type: ignore[arg-type]
        max_seqs=options.max_seqs,
        max_len=max(item.num_tokens for item in work),
        look_ahead_tokens=options.look_ahead_tokens,
        kv_memory=_fair_limit(model, work, options),
    )
    samples: list[MemorySample] = []
    with LLM(model, dtype=options.dtype, device=options.device, **asdict(config)) as llm:
        cache = llm.engine.cache
        assert isinstance(cache, KVCache | PagedKVCache)
        layout = cache.layout
        token_bytes = layout.token_bytes
        for index, item in enumerate(work):
            params = SamplingParams(temperature=0, max_tokens=item.num_output_tokens)
            llm.engine.add_request(str(index), item.prompt, params)
        worst_waste = 0.0
        last_seen: dict[str, tuple[int, int]] = {}  # of each request: bytes of tokens, of pages
        while llm.engine.has_work:
            llm.engine.step()
            stats = llm.stats()
            live_pages = stats.pages_held - stats.pages_parked - stats.pages_ahead
            tokens = (stats.tokens_held - stats.tokens_parked) * token_bytes
            for request in llm.engine.scheduler.running:
                assert request.slot is not None
                used = request.slot.num_tokens * token_bytes
                backed = layout.num_pages(request.slot.num_tokens) * stats.page_bytes
                last_seen[request.request_id] = used, backed
                row_bytes = layout.num_ranges * stats.page_bytes
                worst_waste = max(worst_waste, (backed - used) / row_bytes)
            samples.append(
                MemorySample(
                    output_tokens=stats.num_output_tokens,
                    live_requests=stats.num_running,
                    token_bytes=tokens,
                    kv_bytes=live_pages * stats.page_bytes,
                    ahead_bytes=stats.pages_ahead * stats.page_bytes,
                    parked_bytes=stats.pages_parked * stats.page_bytes,
                    physical_bytes=stats.physical_bytes,
                )
            )
        ends.token_bytes = sum(used for used, _ in last_seen.values())
        ends.kv_bytes = sum(backed for _, backed in last_seen.values())
        stats = llm.stats()
        llm.trim()
        after = llm.stats()
    return samples, {
        "page_bytes": stats.page_bytes,
        "row_tokens": stats.row_tokens,
        "worst_waste_rows_per_request": worst_waste,
        "num_steps": stats.num_steps,
        "num_preemptions": stats.num_preemptions,
        "step_time_s": stats.step_time_s,
        "mapping_time_s": stats.mapping_time_s,
        "mapping_share": stats.mapping_time_s / stats.step_time_s,
        "background_time_s": stats.background_time_s,
        "driver_calls": stats.driver_calls,
        "pages_held_after_trim": after.pages_held,
        "physical_bytes_after_trim": after.physical_bytes,
    }


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


def cache_bytes_per_token(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    config = model.config
    heads = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * heads * dtype.itemsize


def _append(
    cache: StaticCache | DynamicCache,
    model: PreTrainedModel,
    batch_size: int,
    num_tokens: int,
    options: MemoryOptions,
) -> None:
    config = model.config
    new = torch.zeros(
        batch_size, config.num_key_value_heads, num_tokens, config.head_dim, dtype=options.dtype
    )
    for layer in range(config.num_hidden_layers):
        cache.update(new, new, layer)


def _cache_bytes(cache: StaticCache | DynamicCache) -> int:
    tensors = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors)


# -- results -----------------------------------------------------------------------------------


def _summary(samples: Sequence[MemorySample], ends: FinalUse) -> dict[str, float]:
    live = [s for s in samples if s.live_requests]
    peak = max(samples, key=lambda s: s.kv_bytes)
    fullest = max(live, key=lambda s: s.token_bytes)
    return {
        "peak_kv_bytes": peak.kv_bytes,
        "peak_physical_bytes": max(s.physical_bytes for s in samples),
        "mean_kv_bytes": sum(s.kv_bytes for s in live) / len(live),
        "mean_waste": 1 - sum(s.token_bytes for s in live) / sum(s.kv_bytes for s in live),
        "waste_when_fullest": 1 - fullest.token_bytes / fullest.kv_bytes,
        "waste_at_the_end": 1 - ends.token_bytes / ends.kv_bytes,
    }


def _columns(samples: Sequence[MemorySample]) -> dict[str, list[int]]:
    """A list for each field, one number a step."""
    names = [field.name for field in fields(MemorySample)]
    return {name: [getattr(sample, name) for sample in samples] for name in names}


def _memory_table(summary: dict[str, dict[str, float]]) -> Table:
    rows = []
    for kind, row in summary.items():
        rows.append(
            [
                kind,
                f"{row['peak_kv_bytes'] / 2**20:.1f}",
                f"{row['mean_kv_bytes'] / 2**20:.1f}",
                f"{row['peak_physical_bytes'] / 2**20:.1f}",
                f"{row['mean_waste']:.1%}",
                f"{row['waste_when_fullest']:.1%}",
                f"{row['waste_at_the_end']:.1%}",
            ]
        )
    return Table(
        title="KV memory",
        columns=[
            "cache",
            "peak KV, MiB",
            "mean KV, MiB",
            "peak physical, MiB",
            "mean waste",
            "waste when fullest",
            "never used",
        ],
        rows=rows,
    )


def _engine_table(engines: dict[str, dict[str, Any]]) -> Table:
    return Table(
        title="The engine",
        columns=[
            "cache",
            "row, tokens",
            "worst waste, rows a request",
            "steps",
            "step time, s",
            "mapping, share of step",
            "mapped in background, s",
            "pages after trim",
        ],
        rows=[
            [
                kind,
                str(e["row_tokens"]),
                f"{e['worst_waste_rows_per_request']:.2f}",
                str(e["num_steps"]),
                f"{e['step_time_s']:.1f}",
                f"{e['mapping_share']:.2%}",
                f"{e['background_time_s']:.2f}",
                str(e["pages_held_after_trim"]),
            ]
            for kind, e in engines.items()
        ],
    )


def _plot(samples: dict[str, list[MemorySample]], options: MemoryOptions, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5))
    axes = figure.subplots()
    colours = {"virtual": "#0a7", "paged": "#57c", "static": "#c33", "dynamic": "#d90"}
    for kind, rows in samples.items():
        x = [row.output_tokens for row in rows]
        axes.plot(x, [r.kv_bytes / 2**20 for r in rows], label=kind, color=colours[kind])
        if kind == "virtual":
            held = [r.token_bytes / 2**20 for r in rows]
            axes.fill_between(x, held, color="#0a7", alpha=0.2, label="tokens held (virtual)")
    axes.set_xlabel("output tokens so far")
    axes.set_ylabel("KV memory of live requests, MiB")
    axes.set_title(
        f"{options.num_requests} ragged requests, at most {options.max_seqs} at once, "
        f"{options.shape}"
    )
    axes.legend()
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
