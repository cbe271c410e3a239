"""Figures of a served trace: vLLM's, under its names, and DeepSpeed-FastGen's."""

import statistics
from collections.abc import Sequence

import numpy as np

from .client import RequestTrace, Trace
from .options import Targets

PERCENTILES = (90, 95, 99)
EMA_WEIGHT = 0.2  # of the latest gap; the paper names no weight


def vllm_metrics(trace: Trace, targets: Targets) -> dict[str, float]:
    """The result fields of `vllm bench serve`, times in milliseconds."""
    requests, duration = trace.requests, trace.duration_s
    num_input = sum(request.num_prompt_tokens for request in requests)
    num_output = sum(len(request.token_times_s) for request in requests)
    good = sum(_meets_slo(request, targets) for request in requests)
    found: dict[str, float] = {
        "duration": duration,
        "completed": len(requests),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(requests) / duration,
        "request_goodput": good / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
    }
    times = {
        "ttft": [request.ttft_s for request in requests],
        "tpot": [request.tpot_s for request in requests if request.tpot_s is not None],
        "itl": [gap for request in requests for gap in request.gaps_s],
        "e2el": [request.e2e_s for request in requests],
    }
    for name, seconds in times.items():
        found |= _spread(name, seconds)
    return found


def fastgen_metrics(trace: Trace, targets: Targets) -> dict[str, float]:
    """Requests a second that kept both promises, for each output rate, and the steps' sizes.

    Source: DeepSpeed-FastGen, arXiv:2401.08671, section 4.
    """
    found = {
        f"effective_throughput_{rate:g}": sum(
            request.ttft_s <= request.num_prompt_tokens / targets.prompt_rate
            and worst_average_gap(request.gaps_s) <= 1 / rate
            for request in trace.requests
        )
        / trace.duration_s
        for rate in targets.output_rates
    }
    tokens = trace.step_tokens
    return found | {
        "steps": len(tokens),
        "mean_step_tokens": statistics.fmean(tokens),
        "std_step_tokens": statistics.pstdev(tokens),
        "max_step_tokens": max(tokens),
    }


def worst_average_gap(gaps_s: Sequence[float]) -> float:
    """The largest value of the exponential moving average of `gaps_s`; 0 without any."""
    average = worst = gaps_s[0] if gaps_s else 0.0
    for gap in gaps_s[1:]:
        average += EMA_WEIGHT * (gap - average)
        worst = max(worst, average)
    return worst


def _meets_slo(request: RequestTrace, targets: Targets) -> bool:
    asked = (
        (request.ttft_s, targets.slo_ttft_ms),
        (request.tpot_s or 0.0, targets.slo_tpot_ms),
    )
    return all(limit is None or seconds * 1e3 <= limit for seconds, limit in asked)


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles; nothing where there is no sample."""
    if not seconds:
        return {}
    ms = np.asarray(seconds) * 1e3
    found = {
        f"mean_{name}_ms": float(ms.mean()),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(ms.std()),
    }
    return found | {f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in PERCENTILES}
