"""What `/metrics` tells of memory behind the cache."""

from dataclasses import replace

from vkv import LLM
from vkv.allocator.transfer import MoveStats
from vkv.runtime.adapters.adapters import AdapterStats
from vkv.runtime.chains.chains import ChainStats
from vkv.runtime.engine.stats import Borrowed, Lent, SegmentStats, SwapStats, together
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
        num_called_back=3,
        num_lost=1,
        mended_tokens=512,
        redone_tokens=2300,
        borrowed=(
            Borrowed(
                holder="instance 2",
                num_loans=2,
                num_tokens=1024,
                num_steps=50,
                sent_bytes=700,
                received_bytes=800,
                waited_s=0.5,
            ),
        ),
        given=Lent(num_loans=4, num_tokens=512, num_called_back=6, slowest_call_back_s=0.25),
    )
    with LLM(device="cpu", max_seqs=1) as llm:
        stats = replace(llm.stats(), segments=segments)
    told = {
        (
            sample.name,
            next(
                (sample.labels[n] for n in ("to", "holder", "why", "what") if n in sample.labels),
                None,
            ),
        ): sample.value
        for metric in of_engines(LABELS, [Reported(("a model", "0"), stats)])
        for sample in metric.samples
    }
    assert told[("vkv:long_requests", None)] == 2
    assert told[("vkv:long_tokens", None)] == 3072
    assert told[("vkv:long_moved_tokens_total", "tier")] == 2048
    assert told[("vkv:long_moved_bytes_total", "engines")] == 250
    assert told[("vkv:borrowed_tokens", "instance 2")] == 1024
    assert told[("vkv:borrowed_steps_total", "instance 2")] == 50
    assert told[("vkv:borrowed_sent_bytes_total", "instance 2")] == 700
    assert told[("vkv:borrowed_received_bytes_total", "instance 2")] == 800
    assert told[("vkv:borrowed_wait_seconds_total", "instance 2")] == 0.5
    assert told[("vkv:borrowed_ended_total", "called back")] == 3
    assert told[("vkv:borrowed_ended_total", "lost")] == 1
    assert told[("vkv:borrowed_recomputed_tokens_total", "loan")] == 512
    assert told[("vkv:borrowed_recomputed_tokens_total", "request")] == 2300
    assert told[("vkv:lent_tokens", None)] == 512
    assert told[("vkv:lent_called_back_total", None)] == 6
    assert told[("vkv:lent_slowest_call_back_seconds", None)] == 0.25
    both = together([stats, stats]).segments
    assert both is not None
    assert both.given == Lent(
        num_loans=8, num_tokens=1024, num_called_back=12, slowest_call_back_s=0.25
    )
    assert [(one.holder, one.num_tokens) for one in both.borrowed] == [("instance 2", 2048)]
    lends_nothing = replace(stats, segments=replace(segments, given=None))
    both = together([lends_nothing, stats]).segments
    assert both is not None
    assert both.given == segments.given
    assert together([replace(stats, segments=None), stats]).segments == segments


def test_adapters_are_told_by_name() -> None:
    one = AdapterStats(
        name="odd",
        digest="1",
        path="folder",
        num_bytes=100,
        is_here=True,
        num_requests=2,
        is_leaving=False,
    )
    before = replace(one, digest="0", is_here=False, num_requests=1, is_leaving=True)
    with LLM(device="cpu", max_seqs=1) as llm:
        stats = replace(llm.stats(), adapters=(before, one))
    told = {
        sample.name: sample.value
        for metric in of_engines(LABELS, [Reported(("a model", "0"), stats)])
        for sample in metric.samples
        if sample.labels.get("adapter") == "odd"
    }
    assert told == {
        "vkv:adapter_bytes": 100,
        "vkv:adapter_in_memory": 1,
        "vkv:adapter_requests": 3,
    }


def test_models_of_a_zoo_are_told_by_name() -> None:
    one = ChainStats(
        name="tenant",
        digest="1",
        num_requests=2,
        num_rows=30,
        own_bytes=100,
        shared_bytes=900,
        is_here=True,
    )
    with LLM(device="cpu", max_seqs=1) as llm:
        stats = replace(llm.stats(), models=(one,))
    told = {
        sample.name: sample.value
        for metric in of_engines(LABELS, [Reported(("a model", "0"), stats)])
        for sample in metric.samples
        if sample.labels.get("model") == "tenant"
    }
    assert told == {
        "vkv:model_own_bytes": 100,
        "vkv:model_shared_bytes": 900,
        "vkv:model_in_memory": 1,
        "vkv:model_requests": 2,
        "vkv:model_tokens_total": 30,
    }
