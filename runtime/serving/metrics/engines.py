"""What engines hold and have done, as of their last pulses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...adapters.adapters import AdapterStats
from ...chains.chains import ChainStats
from ...engine.stats import Borrowed, EngineStats, Lent, SegmentStats, SwapStats
from ...link.engine_link import EngineLink
from ...link.face import Face
from ...speculation import SpeculationStats

LABELS = ("model_name", "engine")

_Values = Mapping[tuple[str, ...], float]
"""By what further labels say."""


class Reported(NamedTuple):
    """An engine's labels, and what it last said of itself."""

    labels: tuple[str, ...]
    stats: EngineStats


class _Family(NamedTuple):
    """A gauge or a counter: its name and help, further labels, and its values."""

    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    what: str
    more: tuple[str, ...]
    values: Callable[[EngineStats], _Values]


class EngineCollector:
    """Of a server with one engine.

    Args:
        model_name: the label of all of it.
    """

    def __init__(self, face: Face, model_name: str, engine: EngineLink) -> None:
        self._face = face
        self._labels = (model_name, "0")
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        labels, engine = self._labels, self._engine
        yield _one("vkv:engine_up", "1 while the engine is there", labels, engine.is_ready)
        yield _one("vllm:engine_sleep_state", "1 while asleep", labels, engine.is_asleep)
        yield cache_config(("engine",), [(("0",), self._face)])
        if self._engine.stats is not None:
            yield from of_engines(LABELS, [Reported(self._labels, self._engine.stats)])


def _one(name: str, what: str, labels: tuple[str, ...], value: float) -> Metric:
    """A gauge of a single value."""
    family = GaugeMetricFamily(name, what, labels=LABELS)
    family.add_metric(labels, float(value))
    return family


def cache_config(names: tuple[str, ...], faces: Sequence[tuple[tuple[str, ...], Face]]) -> Metric:
    """How the caches of engines were made, each under its labels."""
    family = GaugeMetricFamily(
        "vllm:cache_config_info",
        "How the cache was made",
        labels=(*names, "page_bytes", "max_model_len", "cache_dtype"),
    )
    for labels, face in faces:
        values = (str(face.page_bytes), str(face.admission.max_len), face.dtype)
        family.add_metric((*labels, *values), 1)
    return family


def of_engines(names: tuple[str, ...], engines: Sequence[Reported]) -> Iterator[Metric]:
    """All that is told of engines: a family for each figure, and in it a value an engine.

    Args:
        names: of the labels that each has.
    """
    has_swap = any(engine.stats.swap is not None for engine in engines)
    has_segments = any(engine.stats.segments is not None for engine in engines)
    guesses = any(engine.stats.speculation is not None for engine in engines)
    some = (
        *(_SWAP if has_swap else ()),
        *(_SEGMENTS if has_segments else ()),
        *(_SPECULATION if guesses else ()),
    )
    for family in (*_FIGURES, *some, *_TENANTS, *_ADAPTERS, *_MODELS):
        made = family.kind(family.name, family.what, labels=(*names, *family.more))
        for engine in engines:
            for labels, value in family.values(engine.stats).items():
                made.add_metric((*engine.labels, *labels), float(value))
        yield made


# -- the figures ---------------------------------------------------------------------------------


def _gauge(name: str, what: str, value: Callable[[EngineStats], float]) -> _Family:
    return _Family(GaugeMetricFamily, name, what, (), lambda stats: {(): value(stats)})


def _counter(name: str, what: str, value: Callable[[EngineStats], float]) -> _Family:
    return _Family(CounterMetricFamily, name, what, (), lambda stats: {(): value(stats)})


def _used(stats: EngineStats) -> float:
    return (stats.pages_held - stats.pages_parked) / max(1, stats.pages_limit)


def _preemptions(stats: EngineStats) -> _Values:
    num_copied = 0 if stats.swap is None else stats.swap.num_preempted
    return {("recompute",): stats.num_preemptions - num_copied, ("swap",): num_copied}


_FIGURES = (
    _gauge("vllm:num_requests_running", "Requests with a slot", lambda s: s.num_running),
    _gauge("vllm:num_requests_waiting", "Requests without", lambda s: s.num_waiting),
    _gauge("vllm:kv_cache_usage_perc", "Part of the pages that live requests hold", _used),
    _gauge("vkv:kv_virtual_bytes", "Address space of slots", lambda s: s.virtual_bytes),
    _gauge("vkv:kv_physical_bytes", "Memory behind it", lambda s: s.physical_bytes),
    _gauge("vkv:kv_limit_bytes", "The most there may be", lambda s: s.pages_limit * s.page_bytes),
    _gauge("vkv:kv_parked_bytes", "Of finished requests", lambda s: s.pages_parked * s.page_bytes),
    _gauge("vkv:kv_ahead_bytes", "Mapped ahead of tokens", lambda s: s.pages_ahead * s.page_bytes),
    _gauge("vkv:working_bytes", "Beside weights and pages, at most", lambda s: s.working_bytes),
    _gauge("vkv:recordings", "Recorded decode steps", lambda s: s.num_recordings),
    _counter("vllm:num_preemptions", "Slots taken away", lambda s: s.num_preemptions),
    _counter("vllm:prompt_tokens", "Computed of prompts", lambda s: s.num_prompt_tokens),
    _counter("vllm:generation_tokens", "Generated", lambda s: s.num_output_tokens),
    _counter("vllm:prompt_tokens_cached", "Found computed", lambda s: s.prefix_hit_tokens),
    _counter("vllm:prefix_cache_hits", "Tokens found", lambda s: s.prefix_hit_tokens),
    _counter(
        "vllm:prefix_cache_queries",
        "Tokens looked for",
        lambda s: s.prefix_hit_tokens + s.num_prompt_tokens,
    ),
    _counter("vkv:steps", "Steps", lambda s: s.num_steps),
    _counter("vkv:step_seconds", "Time in steps", lambda s: s.step_time_s),
    _counter("vkv:replays", "Steps replayed", lambda s: s.num_replays),
    _counter("vllm:spec_decode_num_draft_tokens", "Guessed ahead", lambda s: s.num_drafted),
    _counter("vllm:spec_decode_num_accepted_tokens", "Guessed right", lambda s: s.num_accepted),
    _counter("vkv:failed_requests", "Ended by an error", lambda s: s.num_failed),
    _counter("vkv:mapping_seconds", "Steps waited for memory", lambda s: s.mapping_time_s),
    _counter("vkv:background_mapping_seconds", "Mapped meanwhile", lambda s: s.background_time_s),
    _Family(
        CounterMetricFamily,
        "vkv:driver_calls",
        "System or driver calls",
        ("call",),
        lambda s: {(name,): count for name, count in s.driver_calls.items()},
    ),
    _Family(CounterMetricFamily, "vkv:preemptions", "By kind", ("kind",), _preemptions),
)


def _of_swap(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    what: str,
    value: Callable[[SwapStats], float],
) -> _Family:
    def values(stats: EngineStats) -> _Values:
        return {} if stats.swap is None else {(): value(stats.swap)}

    return _Family(kind, name, what, (), values)


def _both_ways(name: str, what: str, field: str) -> _Family:
    def values(stats: EngineStats) -> _Values:
        if stats.swap is None:
            return {}
        moves = {("store",): stats.swap.stored, ("load",): stats.swap.fetched}
        return {way: getattr(moved, field) for way, moved in moves.items()}

    return _Family(CounterMetricFamily, f"vkv:swap_{name}", what, ("way",), values)


_SWAP = (
    _of_swap(
        GaugeMetricFamily,
        "vkv:swap_physical_bytes",
        "Of copies in host memory",
        lambda swap: swap.physical_bytes,
    ),
    _of_swap(
        GaugeMetricFamily,
        "vkv:swap_limit_bytes",
        "The most there may be",
        lambda swap: swap.limit_bytes,
    ),
    _of_swap(
        CounterMetricFamily, "vkv:swap_stall_seconds", "Steps waited", lambda swap: swap.stall_s
    ),
    _both_ways("moves", "Sequences copied", "num_moves"),
    _both_ways("bytes", "Copied", "num_bytes"),
    _both_ways("copies", "Calls that copied", "num_copies"),
    _both_ways("seconds", "Of copying", "time_s"),
    _both_ways("failures", "Copies that came to nothing", "num_failed"),
)


def _of_speculation(
    name: str, what: str, value: Callable[[SpeculationStats], float], *, sums: bool = True
) -> _Family:
    def values(stats: EngineStats) -> _Values:
        found = stats.speculation
        return {} if found is None else {(found.drafter,): value(found)}

    kind = CounterMetricFamily if sums else GaugeMetricFamily
    return _Family(kind, name, what, ("drafter",), values)


_SPECULATION = (
    _of_speculation("vllm:spec_decode_num_drafts", "Guesses", lambda s: s.num_drafts),
    _of_speculation("vkv:drafted_tokens", "Guessed ahead", lambda s: s.num_drafted),
    _of_speculation("vkv:draft_accepted_tokens", "Guessed right", lambda s: s.num_accepted),
    _of_speculation("vkv:draft_seconds", "Steps waited for guesses", lambda s: s.draft_time_s),
    _of_speculation(
        "vkv:draft_kv_bytes", "KV of a model that guesses", lambda s: s.kv_bytes, sums=False
    ),
)


def _of_segments(name: str, what: str, value: Callable[[SegmentStats], float]) -> _Family:
    def values(stats: EngineStats) -> _Values:
        return {} if stats.segments is None else {(): value(stats.segments)}

    return _Family(GaugeMetricFamily, f"vkv:long_{name}", what, (), values)


def _moved(name: str, what: str, field: str) -> _Family:
    def values(stats: EngineStats) -> _Values:
        if stats.segments is None:
            return {}
        moves = {("tier",): stats.segments.moved, ("engines",): stats.segments.lent}
        return {goal: getattr(moved, field) for goal, moved in moves.items()}

    return _Family(CounterMetricFamily, f"vkv:long_moved_{name}", what, ("to",), values)


def _borrowed(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    what: str,
    value: Callable[[Borrowed], float],
) -> _Family:
    """Of what each holder has of an engine's requests."""

    def values(stats: EngineStats) -> _Values:
        borrowed = () if stats.segments is None else stats.segments.borrowed
        return {(one.holder,): value(one) for one in borrowed}

    return _Family(kind, f"vkv:borrowed_{name}", what, ("holder",), values)


def _given(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    what: str,
    value: Callable[[Lent], float],
) -> _Family:
    """Of what an engine has of others' requests."""

    def values(stats: EngineStats) -> _Values:
        given = None if stats.segments is None else stats.segments.given
        return {} if given is None else {(): value(given)}

    return _Family(kind, f"vkv:lent_{name}", what, (), values)


def _ended_loans(stats: EngineStats) -> _Values:
    if stats.segments is None:
        return {}
    ended = {"called back": stats.segments.num_called_back, "lost": stats.segments.num_lost}
    return {(why,): count for why, count in ended.items()}


def _recomputed(stats: EngineStats) -> _Values:
    if stats.segments is None:
        return {}
    tokens = {"loan": stats.segments.mended_tokens, "request": stats.segments.redone_tokens}
    return {(what,): count for what, count in tokens.items()}


_SEGMENTS = (
    _of_segments("requests", "That outgrew the pool", lambda segments: segments.num_requests),
    _of_segments("tokens", "Of theirs, elsewhere", lambda segments: segments.num_tokens),
    _moved("tokens", "That moved as they grew", "num_tokens"),
    _moved("bytes", "That moved as they grew", "num_bytes"),
    _borrowed(GaugeMetricFamily, "tokens", "That others have", lambda one: one.num_tokens),
    _borrowed(GaugeMetricFamily, "loans", "In how many stretches", lambda one: one.num_loans),
    _borrowed(CounterMetricFamily, "steps", "That asked there", lambda one: one.num_steps),
    _borrowed(CounterMetricFamily, "sent_bytes", "Queries", lambda one: one.sent_bytes),
    _borrowed(CounterMetricFamily, "received_bytes", "Results", lambda one: one.received_bytes),
    _borrowed(CounterMetricFamily, "wait_seconds", "For results", lambda one: one.waited_s),
    _Family(CounterMetricFamily, "vkv:borrowed_ended", "By others", ("why",), _ended_loans),
    _Family(
        CounterMetricFamily,
        "vkv:borrowed_recomputed_tokens",
        "As loans had ended: theirs alone, or all of their requests",
        ("what",),
        _recomputed,
    ),
    _given(GaugeMetricFamily, "tokens", "Of others' requests", lambda given: given.num_tokens),
    _given(GaugeMetricFamily, "loans", "In how many stretches", lambda given: given.num_loans),
    _given(
        CounterMetricFamily,
        "called_back",
        "Loans ended for want of memory",
        lambda given: given.num_called_back,
    ),
    _given(
        GaugeMetricFamily,
        "slowest_call_back_seconds",
        "Until the memory of a loan was back",
        lambda given: given.slowest_call_back_s,
    ),
)


def _of_tenants(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, what: str, field: str
) -> _Family:
    """What each tenant has and got, as long as it is remembered."""

    def values(stats: EngineStats) -> _Values:
        return {(tenant.tenant,): getattr(tenant, field) for tenant in stats.tenants}

    return _Family(kind, f"vkv:tenant_{name}", what, ("tenant",), values)


_TENANTS = (
    _of_tenants(CounterMetricFamily, "prompt_tokens", "Computed of prompts", "prompt_tokens"),
    _of_tenants(CounterMetricFamily, "generation_tokens", "Generated", "output_tokens"),
    _of_tenants(GaugeMetricFamily, "requests", "That run or wait", "num_unfinished"),
)


def _of_adapters(name: str, what: str, value: Callable[[AdapterStats], float]) -> _Family:
    """What each adapter takes, and who uses it."""

    def values(stats: EngineStats) -> _Values:
        found: dict[tuple[str, ...], float] = {}
        for one in stats.adapters:  # there may be several of a name, of which one is leaving
            found[one.name,] = found.get((one.name,), 0.0) + value(one)
        return found

    return _Family(GaugeMetricFamily, f"vkv:adapter_{name}", what, ("adapter",), values)


_ADAPTERS = (
    _of_adapters("bytes", "Of weights, in memory", lambda one: one.num_bytes * one.is_here),
    _of_adapters("in_memory", "1 while its weights are", lambda one: one.is_here),
    _of_adapters("requests", "That use it, unfinished", lambda one: one.num_requests),
)


def _of_models(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    what: str,
    value: Callable[[ChainStats], float],
) -> _Family:
    """What each model of a zoo, beside the engine's own, takes and does."""

    def values(stats: EngineStats) -> _Values:
        return {(one.name,): value(one) for one in stats.models}

    return _Family(kind, f"vkv:model_{name}", what, ("model",), values)


_MODELS = (
    _of_models(GaugeMetricFamily, "own_bytes", "Of its own blocks, stored", lambda m: m.own_bytes),
    _of_models(GaugeMetricFamily, "shared_bytes", "Of shared blocks", lambda m: m.shared_bytes),
    _of_models(GaugeMetricFamily, "in_memory", "1 while all of it is", lambda m: m.is_here),
    _of_models(GaugeMetricFamily, "requests", "Unfinished", lambda m: m.num_requests),
    _of_models(CounterMetricFamily, "tokens", "Computed by it", lambda m: m.num_rows),
)
