"""What the server counts, under vLLM's names and with its buckets, and what is vkv's own.

Requests are counted where they are answered, so each front process has numbers of its own; several
share them by files (`PROMETHEUS_MULTIPROC_DIR`), which their parent names. What the engine holds
comes from its last pulse.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from ..engine.stats import EngineStats, SwapStats
from ..frontend.text_stream import RequestText
from ..link.engine_link import EngineLink
from ..link.face import Face
from ..request.outputs import FinishReason, RequestMetrics
from ..scheduling.accounts import TenantStats
from .places import REFUSALS

SHARED = "PROMETHEUS_MULTIPROC_DIR"

_FIRST_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LABELS = ("model_name", "engine")


class Metrics:
    """Counts requests, and tells what the engine holds."""

    def __init__(self, face: Face, model_name: str, engine: EngineLink) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model_name, "0")
        tokens = _one_two_five(face.admission.max_len)
        self._first = self._histogram("time_to_first_token_seconds", "To the first token", _FIRST_S)
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an output", _BETWEEN_S
        )
        self._mean_between = self._histogram(
            "request_time_per_output_token_seconds", "The same, a request's mean", _BETWEEN_S
        )
        self._spans = {
            name: self._histogram(f"{name}_seconds", what, _REQUEST_S)
            for name, what in (
                ("e2e_request_latency", "From arrival to the end"),
                ("request_queue_time", "Waiting"),
                ("request_prefill_time", "From a slot to the first token"),
                ("request_decode_time", "From the first token to the end"),
                ("request_inference_time", "With a slot"),
            )
        }
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Of a request", tokens)
        self._output_tokens = self._histogram("request_generation_tokens", "Of a request", tokens)
        self._max_tokens = self._histogram("request_params_max_tokens", "Asked for", tokens)
        self._n = self._histogram("request_params_n", "Outputs asked for", (1, 2, 5, 10, 20))
        self._ended = Counter(
            "vllm:request_success",
            "Requests by how they ended",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._rejected = Counter(
            "vllm:admission_rejections",
            "Requests that were too many",
            (*_LABELS, "reason"),
            registry=self._registry,
        )
        for reason in get_args(FinishReason):  # so that they are there from the start
            self._ended.labels(*self._labels, reason)
        for reason in REFUSALS:
            self._rejected.labels(*self._labels, reason)
        self._engine = _EngineCollector(face, self._labels, engine)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", what, _LABELS, buckets=buckets, registry=self._registry
        )
        return histogram.labels(*self._labels)

    def token(self, gap_s: float) -> None:
        """A token came so long after the one before it."""
        self._between.observe(gap_s)

    def ended(self, text: RequestText) -> None:
        """A request is over."""
        output = text.output()
        params = text.spec.params
        self._n.observe(params.n)
        self._prompt_tokens.observe(len(text.spec.prompt_token_ids))
        self._output_tokens.observe(text.num_output_tokens)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        for sequence in output.outputs:
            self._ended.labels(*self._labels, sequence.finish_reason or "abort").inc()
        if output.metrics is not None:
            self._times(output.metrics, text.num_output_tokens // params.n)

    def _times(self, times: RequestMetrics, num_tokens: int) -> None:
        if times.first_token_latency is not None:
            self._first.observe(times.first_token_latency)
        if (mean_s := times.time_per_output_token_s(num_tokens)) is not None:
            self._mean_between.observe(mean_s)
        scheduled, first, end = times.scheduled_ts, times.first_token_ts, times.finished_ts
        spans = {
            "e2e_request_latency": (times.arrival_ts, end),
            "request_queue_time": (times.queued_ts, scheduled),
            "request_prefill_time": (scheduled, first),
            "request_decode_time": (first, end),
            "request_inference_time": (scheduled, end),
        }
        for name, (start_s, end_s) in spans.items():
            if start_s is not None and end_s is not None:
                self._spans[name].observe(end_s - start_s)

    def rejected(self, reason: str) -> None:
        """A request was one too many."""
        self._rejected.labels(*self._labels, reason).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        registry = self._registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        own = CollectorRegistry()
        own.register(self._engine)
        return generate_latest(registry) + generate_latest(own)


class _EngineCollector:
    """What the engine holds and has done, as of its last pulse."""

    def __init__(self, face: Face, labels: tuple[str, ...], engine: EngineLink) -> None:
        self._face = face
        self._labels = labels
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        yield self._gauge("vkv:engine_up", "1 while the engine is there", self._engine.is_ready)
        yield self._gauge("vllm:engine_sleep_state", "1 while asleep", self._engine.is_asleep)
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "How the cache was made",
            labels=("engine", "page_bytes", "max_model_len", "cache_dtype"),
        )
        admission = self._face.admission
        info.add_metric(
            ("0", str(self._face.page_bytes), str(admission.max_len), self._face.dtype), 1
        )
        yield info
        if self._engine.stats is not None:
            yield from self._of_stats(self._engine.stats)

    def _of_stats(self, stats: EngineStats) -> Iterator[Metric]:
        page = stats.page_bytes
        used = (stats.pages_held - stats.pages_parked) / max(1, stats.pages_limit)
        for name, what, value in (
            ("vllm:num_requests_running", "Requests with a slot", stats.num_running),
            ("vllm:num_requests_waiting", "Requests without", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Part of the pages that live requests hold", used),
            ("vkv:kv_virtual_bytes", "Address space of slots", stats.virtual_bytes),
            ("vkv:kv_physical_bytes", "Memory behind it", stats.physical_bytes),
            ("vkv:kv_limit_bytes", "The most there may be", stats.pages_limit * page),
            ("vkv:kv_parked_bytes", "Of finished requests", stats.pages_parked * page),
            ("vkv:kv_ahead_bytes", "Mapped ahead of tokens", stats.pages_ahead * page),
            ("vkv:working_bytes", "Beside weights and pages, at most", stats.working_bytes),
            ("vkv:recordings", "Recorded decode steps", stats.num_recordings),
        ):
            yield self._gauge(name, what, value)
        for name, what, value in (
            ("vllm:num_preemptions", "Slots taken away", stats.num_preemptions),
            ("vllm:prompt_tokens", "Computed of prompts", stats.num_prompt_tokens),
            ("vllm:generation_tokens", "Generated", stats.num_output_tokens),
            ("vllm:prompt_tokens_cached", "Found computed", stats.prefix_hit_tokens),
            ("vllm:prefix_cache_hits", "Tokens found", stats.prefix_hit_tokens),
            (
                "vllm:prefix_cache_queries",
                "Tokens looked for",
                stats.prefix_hit_tokens + stats.num_prompt_tokens,
            ),
            ("vkv:steps", "Steps", stats.num_steps),
            ("vkv:step_seconds", "Time in steps", stats.step_time_s),
            ("vkv:replays", "Steps replayed", stats.num_replays),
            ("vllm:spec_decode_num_draft_tokens", "Guessed ahead", stats.num_drafted),
            ("vllm:spec_decode_num_accepted_tokens", "Guessed right", stats.num_accepted),
            ("vkv:failed_requests", "Ended by an error", stats.num_failed),
            ("vkv:mapping_seconds", "Steps waited for memory", stats.mapping_time_s),
            ("vkv:background_mapping_seconds", "Mapped meanwhile", stats.background_time_s),
        ):
            yield self._counter(name, what, {(): value})
        yield self._counter(
            "vkv:driver_calls", "System or driver calls", _keyed(stats.driver_calls), ("call",)
        )
        num_copied = 0 if stats.swap is None else stats.swap.num_preempted
        kinds = {("recompute",): stats.num_preemptions - num_copied, ("swap",): num_copied}
        yield self._counter("vkv:preemptions", "By kind", kinds, ("kind",))
        if stats.swap is not None:
            yield from self._of_swap(stats.swap)
        yield from self._of_tenants(stats.tenants)

    def _of_swap(self, swap: SwapStats) -> Iterator[Metric]:
        """What host memory behind the cache has, and what was copied there and back."""
        yield self._gauge(
            "vkv:swap_physical_bytes", "Of copies in host memory", swap.physical_bytes
        )
        yield self._gauge("vkv:swap_limit_bytes", "The most there may be", swap.limit_bytes)
        yield self._counter("vkv:swap_stall_seconds", "Steps waited", {(): swap.stall_s})
        moves = {("store",): swap.stored, ("load",): swap.fetched}
        for name, what, field in (
            ("moves", "Sequences copied", "num_moves"),
            ("bytes", "Copied", "num_bytes"),
            ("copies", "Calls that copied", "num_copies"),
            ("seconds", "Of copying", "time_s"),
            ("failures", "Copies that came to nothing", "num_failed"),
        ):
            values = {way: getattr(moved, field) for way, moved in moves.items()}
            yield self._counter(f"vkv:swap_{name}", what, values, ("way",))

    def _of_tenants(self, tenants: Sequence[TenantStats]) -> Iterator[Metric]:
        """What each tenant has and got, as long as it is remembered."""
        by_tenant = ("tenant",)
        for name, what, values in (
            ("prompt", "Computed of prompts", {(t.tenant,): t.prompt_tokens for t in tenants}),
            ("generation", "Generated", {(t.tenant,): t.output_tokens for t in tenants}),
        ):
            yield self._counter(f"vkv:tenant_{name}_tokens", what, values, by_tenant)
        family = GaugeMetricFamily(
            "vkv:tenant_requests", "That run or wait", labels=(*_LABELS, *by_tenant)
        )
        for tenant in tenants:
            family.add_metric((*self._labels, tenant.tenant), tenant.num_unfinished)
        yield family

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, what, labels=_LABELS)
        family.add_metric(self._labels, float(value))
        return family

    def _counter(
        self,
        name: str,
        what: str,
        values: Mapping[tuple[str, ...], float],
        more: tuple[str, ...] = (),
    ) -> Metric:
        family = CounterMetricFamily(name, what, labels=(*_LABELS, *more))
        for labels, value in values.items():
            family.add_metric((*self._labels, *labels), float(value))
        return family


def _keyed(counts: dict[str, int]) -> dict[tuple[str, ...], float]:
    return {(name,): float(count) for name, count in counts.items()}


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20 and so on, up to `most`."""
    found, scale = [], 1
    while scale <= most:
        found += [scale * step for step in (1, 2, 5) if scale * step <= most]
        scale *= 10
    return tuple(map(float, found))
