"""What `/metrics` tells of guesses."""

from dataclasses import replace

from vkv import LLM
from vkv.runtime.engine.stats import together
from vkv.runtime.serving.metrics.engines import LABELS, Reported, of_engines
from vkv.runtime.speculation import SpeculationStats


def test_guesses_are_told_by_drafter() -> None:
    speculation = SpeculationStats(
        drafter="draft",
        num_drafts=10,
        num_drafted=40,
        num_accepted=30,
        draft_time_s=0.5,
        kv_bytes=8192,
    )
    with LLM(device="cpu", max_seqs=1) as llm:
        without = llm.stats()
    stats = replace(without, speculation=speculation, num_drafted=40, num_accepted=30)
    told = {
        (sample.name, sample.labels.get("drafter")): sample.value
        for metric in of_engines(LABELS, [Reported(("a model", "0"), together([stats, stats]))])
        for sample in metric.samples
    }
    assert told[("vllm:spec_decode_num_drafts_total", "draft")] == 20
    assert told[("vllm:spec_decode_num_draft_tokens_total", None)] == 80
    assert told[("vkv:drafted_tokens_total", "draft")] == 80
    assert told[("vkv:draft_accepted_tokens_total", "draft")] == 60
    assert told[("vkv:draft_seconds_total", "draft")] == 1
    assert told[("vkv:draft_kv_bytes", "draft")] == 16384
    names = {metric.name for metric in of_engines(LABELS, [Reported(("m", "0"), without)])}
    assert "vkv:drafted_tokens" not in names
