"""What `/metrics` tells of memory behind the cache."""

from dataclasses import replace

from vkv import LLM
from vkv.allocator.transfer import MoveStats
from vkv.runtime.engine.stats import SegmentStats, SwapStats
from vkv.runtime.serving.metrics.engines import LABELS, Reported, of_engines


def test_copies_are_told_both_ways() -> None:
    swap = SwapStats(
        physical_bytes=1000,
        limit_bytes=4000,
        num_tokens=5,
        stored=MoveStats(num_moves=3, num_copies=6, num_bytes=600, time_s=0.5, num_failed=1),
        fetched=MoveStats(num_moves=2, num_copies=4, num_bytes=400, time_s=0.25),
        stall_s=0.125,
        num_preempted=2,
        num_computed_instead=0,
    )
    with LLM(device="cpu", max_seqs=1) as llm:
        stats = replace(llm.stats(), swap=swap, num_preemptions=5)
    told = {
        (sample.name, sample.labels.get("way") or sample.labels.get("kind")): sample.value
        for metric in of_engines(LABELS, [Reported(("a model", "0"), stats)])
        for sample in metric.samples
    }
    assert told[("vkv:swap_physical_bytes", None)] == 1000
    assert told[("vkv:swap_stall_seconds_total", None)] == 0.125
    assert told[("vkv:swap_bytes_total", "store")] == 600
    assert told[("vkv:swap_bytes_total", "load")] == 400
    assert told[("vkv:swap_failures_total", "store")] == 1
    assert told[("vkv:preemptions_total", "swap")] == 2
    assert told[("vkv:preemptions_total", "recompute")] == 3


def test_requests_longer_than_the_pool_are_told() -> None:
    segments = SegmentStats(
        num_requests=2,
        num_tokens=3072,
        moved=MoveStats(num_tokens=2048, num_bytes=500),
        lent=MoveStats(num_tokens=1024, num_bytes=250),
    )
    with LLM(device="cpu", max_seqs=1) as llm:
        stats = replace(llm.stats(), segments=segments)
    told = {
        (sample.name, sample.labels.get("to")): sample.value
        for metric in of_engines(LABELS, [Reported(("a model", "0"), stats)])
        for sample in metric.samples
    }
    assert told[("vkv:long_requests", None)] == 2
    assert told[("vkv:long_tokens", None)] == 3072
    assert told[("vkv:long_moved_tokens_total", "tier")] == 2048
    assert told[("vkv:long_moved_bytes_total", "engines")] == 250
