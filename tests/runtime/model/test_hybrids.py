"""Hybrids in the engine: state follows its request through everything that happens to it."""

import pytest
import tiny_configs
import torch
import zoo
from transformers import AutoModelForCausalLM, PreTrainedModel
from virtual_zoo import RECURRENT
from vkv import LLM, SamplingParams
from vkv.runtime.model.recurrent_state import StepState
from vkv.vmem.errors import UnsupportedModel

PROMPT = zoo.random_prompts([37])[0]


def _llm(model: PreTrainedModel, **options: object) -> LLM:
    return LLM(model, device="cpu", **{"max_seqs": 4, **zoo.with_defaults(options)})


@pytest.mark.parametrize("model_type", zoo.HYBRIDS)
def test_outputs_of_one_prompt_keep_states_apart(model_type: str) -> None:
    expected = zoo.generate_alone(zoo.tiny_model(model_type), PROMPT, 12)
    with _llm(zoo.tiny_model(model_type), max_batch_tokens=11) as llm:
        for _ in range(2):  # again: slots, and so rows, are used a second time
            (output,) = llm.generate(
                PROMPT,
                SamplingParams(n=2, temperature=1.0, top_k=1, max_tokens=12, ignore_eos=True),
            )
            assert [list(one.token_ids) for one in output.outputs] == [expected] * 2
        assert llm.stats().state_bytes > 0
        assert llm.stats().prefix_hit_tokens == 0
        zoo.assert_idle(llm)
        llm.trim()
        assert llm.stats().pages_held == 0


@pytest.mark.parametrize("model_type", zoo.HYBRIDS)
def test_a_preempted_request_computes_its_state_again(model_type: str) -> None:
    prompts = zoo.random_prompts([20, 33, 27])
    expected = [zoo.generate_alone(zoo.tiny_model(model_type), prompt, 60) for prompt in prompts]
    with _llm(zoo.tiny_model(model_type), max_batch_tokens=16) as probe:
        pages = probe.engine.cache.num_pages(95) + 1
        page_bytes = probe.stats().page_bytes
    with _llm(zoo.tiny_model(model_type), max_batch_tokens=16, kv_memory=pages * page_bytes) as llm:
        outputs = llm.generate(prompts, zoo.greedy(60))
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        assert llm.stats().num_preemptions > 0
        llm.engine.cache.check_invariants()
        zoo.assert_idle(llm)


@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize("model_type", zoo.HYBRIDS)
def test_only_rows_that_are_wanted_become_logits(model_type: str, selects: bool) -> None:
    """Of a prompt's chunks the last token alone, or every one whose successor is scored."""
    other = zoo.random_prompts([19], seed=1)[0]
    reference = zoo.tiny_model(model_type)
    expected = [zoo.generate_alone(reference, prompt, 5) for prompt in (PROMPT, other)]
    shapes: list[tuple[int, ...]] = []
    model = zoo.tiny_model(model_type)
    model.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.logits.shape[:2])))
    with _llm(model, max_batch_tokens=16) as llm:
        forward = llm.engine.runner.forward
        assert forward._selects_logits
        forward._selects_logits = selects  # else as with a model that cannot
        shapes.clear()  # of the probe
        outputs = llm.generate([PROMPT, other], zoo.greedy(5))
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        if selects:
            assert max(rows for _, rows in shapes) == 1
            assert sum(batch * rows for batch, rows in shapes) == 2 * 5
        else:
            assert sum(batch * rows for batch, rows in shapes) == len(PROMPT) + len(other) + 2 * 4
        shapes.clear()
        (scored,) = llm.generate(PROMPT, zoo.greedy(1, prompt_logprobs=0))
    assert sum(rows for _, rows in shapes) == len(PROMPT)
    scores = zoo.full_logits(reference, PROMPT).log_softmax(dim=-1)
    assert scored.prompt_logprobs is not None
    for position, token in enumerate(PROMPT[1:]):
        found = scored.prompt_logprobs[position + 1]
        assert found is not None
        assert found[token].logprob == pytest.approx(float(scores[position, token]), abs=1e-3)


def test_an_aborted_request_leaves_no_state_to_the_next() -> None:
    expected = zoo.generate_alone(zoo.tiny_model("qwen3_next"), PROMPT, 8)
    with _llm(zoo.tiny_model("qwen3_next"), max_seqs=1) as llm:
        other = zoo.add(llm.engine, "0", PROMPT[::-1], zoo.greedy(8))
        llm.engine.step()
        llm.engine.abort(other[0].key[0])
        assert list(llm.generate(PROMPT, zoo.greedy(8))[0].outputs[0].token_ids) == expected
        assert llm.engine.runner.state_bytes > 0
    assert llm.engine.runner.state_bytes == 0


def test_a_model_that_forgets_its_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: StepState, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return None

    monkeypatch.setattr(StepState, "get_recurrent_state", forget, raising=False)
    monkeypatch.setattr(StepState, "update_conv_state", lambda self, conv, *_, **__: conv)
    with pytest.raises(UnsupportedModel, match="does not go on from its recurrent state"):
        _llm(zoo.tiny_model("bamba"))


def test_a_model_that_takes_up_half_of_its_state_is_refused() -> None:
    """Jamba's chunks go on from the recurrent state, but not from that of the convolution."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_configs.config_of("jamba"))
    zoo.sharpen(model)
    with pytest.raises(UnsupportedModel, match="does not go on from its recurrent state in a chu"):
        _llm(model.eval())


def test_a_model_whose_state_shows_in_its_queries_and_keys_alone() -> None:
    """Zaya's state is beside attention; the probe attends to nothing, so its logits do not tell."""
    model = zoo.tiny_model("zaya", **RECURRENT["zaya"])
    prompts = zoo.random_prompts([5, 40, 23])
    with _llm(model, max_batch_tokens=16) as llm:
        outs = llm.generate(prompts, zoo.greedy(12), on_error="raise")
    model.set_attn_implementation("eager")
    for prompt, out in zip(prompts, outs, strict=True):
        assert list(out.outputs[0].token_ids) == zoo.generate_alone(model, prompt, 12)
