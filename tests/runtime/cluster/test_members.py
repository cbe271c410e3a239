"""Counts and maps of several engines, put together."""

from vkv import LLM, SamplingParams
from vkv.runtime.engine.memory.memory_map import side_by_side
from vkv.runtime.engine.stats import together


def test_several_engines_are_summed_and_shown_side_by_side() -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = {"device": "cpu", "max_seqs": 2, "swap_memory": "8MiB"}
    with LLM(**options) as one, LLM(**options) as other:
        one.generate(["hello", "there"], params, tenant="a")
        other.generate("hello", params, tenant=["a"])
        other.generate("hello", params, tenant="b")
        stats = [llm.loop.stats(fresh=True) for llm in (one, other)]
        both = together(stats)
        assert both.num_output_tokens == 16
        assert both.page_bytes == stats[0].page_bytes
        assert both.kv.pages_limit == sum(s.kv.pages_limit for s in stats)
        assert both.kv.driver_calls["map"] == sum(s.kv.driver_calls["map"] for s in stats)
        assert {t.tenant: t.output_tokens for t in both.tenants} == {"a": 12, "b": 4}
        assert both.swap is not None
        assert both.swap.limit_bytes == 2 * stats[0].swap.limit_bytes  # type: ignore[union-attr]
        assert together(stats[:1]) == stats[0]
        maps = [llm.loop.memory_map() for llm in (one, other)]
        shown = side_by_side(maps)
        assert shown.num_slots == 2 * maps[0].num_slots
        assert len(shown.strips) == sum(len(m.strips) for m in maps)
        slots = [strip.slot for strip in shown.strips]
        assert len(set(slots)) == len(slots)
        assert max(slots) >= maps[0].num_slots
        assert shown.totals.physical == sum(m.totals.physical for m in maps)
        assert shown.counters.output_tokens == 16
