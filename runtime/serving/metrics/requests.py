"""What the server counts of requests.

Requests are counted where they are answered, so each front process has numbers of its own; several
share them by files (`PROMETHEUS_MULTIPROC_DIR`), which their parent names.
"""

import os
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from ...frontend.text_stream import RequestText
from ...link.engine_link import EngineLink
from ...link.face import Face
from ...request.outputs import FinishReason, RequestMetrics
from ..places import REFUSALS
from .cluster import ClusterCollector, Instances
from .engines import LABELS, EngineCollector

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
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._rejected = Counter(
            "vllm:admission_rejections",
            "Requests that were too many",
            (*LABELS, "reason"),
            registry=self._registry,
        )
        for reason in get_args(FinishReason):  # so that they are there from the start
            self._ended.labels(*self._labels, reason)
        for reason in REFUSALS:
            self._rejected.labels(*self._labels, reason)
        self._engine = (
            ClusterCollector(model_name, engine)
            if isinstance(engine, Instances)
            else EngineCollector(face, model_name, engine)
        )

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", what, LABELS, buckets=buckets, registry=self._registry
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


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20 and so on, up to `most`."""
    found, scale = [], 1
    while scale <= most:
        found += [scale * step for step in (1, 2, 5) if scale * step <= most]
        scale *= 10
    return tuple(map(float, found))
