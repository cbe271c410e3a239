"""A model that was handed over changes under an open LLM: nothing of the old one is used again."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformers import PreTrainedModel
from vkv import LLM, AsyncLLM
from vkv.vmem.errors import InvalidOperation

PROMPTS = zoo.random_prompts([40, 7])
NUM_TOKENS = 10


def make(model: PreTrainedModel, **options: Any) -> LLM:
    return LLM(model, device="cpu", **zoo.with_defaults(options))


def tokens(llm: LLM) -> list[list[int]]:
    outs = llm.generate(PROMPTS, zoo.greedy(NUM_TOKENS), on_error="raise")
    return [list(out.outputs[0].token_ids) for out in outs]


def of_a_new_llm(model: PreTrainedModel) -> list[list[int]]:
    with make(model) as llm:
        return tokens(llm)


def other_weights() -> dict[str, torch.Tensor]:
    return zoo.tiny_model("llama", seed=1).state_dict()


def load(model: Any) -> None:
    model.load_state_dict(other_weights())


def load_by_assigning(model: Any) -> None:
    model.load_state_dict(other_weights(), assign=True)


def assign_data(model: Any) -> None:
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data.flip(0).contiguous()


@torch.no_grad()
def multiply_in_place(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.mul_(-1)


def exchange_a_module(model: Any) -> None:
    model.model.layers[0].mlp = model.model.layers[1].mlp


def add_a_hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: -output)


def switch_adapters(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.enable_adapters(False)


CHANGES = [
    load,
    load_by_assigning,
    assign_data,
    multiply_in_place,
    exchange_a_module,
    add_a_hook,
    switch_adapters,
]


class Adapted(nn.Module):
    """A linear with an adapter, under PEFT's names."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.added = nn.Linear(base.in_features, base.out_features, bias=False)
        nn.init.normal_(self.added.weight, generator=torch.Generator().manual_seed(0))
        self.disable_adapters = False
        self.active_adapters = ["one"]

    def enable_adapters(self, enabled: bool) -> None:
        self.disable_adapters = not enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) if self.disable_adapters else self.base(x) + self.added(x)


def adapted_model() -> Any:
    model: Any = zoo.tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj = Adapted(attention.v_proj)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_before_the_next_prompt(change: Callable[[Any], None]) -> None:
    model = adapted_model() if change is switch_adapters else zoo.tiny_model("llama")
    with make(model) as llm:
        before = tokens(llm)
        assert tokens(llm) == before  # from a kept prefix, and recorded steps
        assert llm.stats().num_replays > 0
        change(model)
        assert llm.stats().num_recordings > 0
        after = tokens(llm)
        hits = llm.stats().prefix_hit_tokens
        assert tokens(llm) == after
        assert llm.stats().prefix_hit_tokens > hits  # what is new is kept again
        has_hooks = change is add_a_hook
        assert (llm.stats().num_recordings == 0) == has_hooks  # a replay would leave hooks out
        llm.engine.cache.check_invariants()
    assert after == of_a_new_llm(model) != before


@pytest.mark.parametrize("change", [load, assign_data, exchange_a_module, add_a_hook])
def test_running_requests_are_computed_again(change: Callable[[Any], None]) -> None:
    model: Any = zoo.tiny_model("llama")
    with make(model) as llm:
        stream = llm.stream(PROMPTS[0], zoo.greedy(40))
        got = next(stream).token_ids
        got = got + next(stream).token_ids
        change(model)
        for delta in stream:
            got += delta.token_ids
        assert llm.stats().num_preemptions == 1
    # Once it was noticed, within a few steps, each token follows from the new model alone.
    scores = zoo.full_logits(with_own_attention(model), [*PROMPTS[0], *got[:-1]])
    follows = scores.argmax(-1)[len(PROMPTS[0]) - 1 :].tolist()
    assert follows[8:] == list(got[8:])
    assert follows[:2] != list(got[:2])


def with_own_attention(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    return model


def test_weights_changed_says_what_cannot_be_seen() -> None:
    model: Any = zoo.tiny_model("llama")
    with make(model) as llm:
        before = tokens(llm)
        model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1)  # counted by nobody
        llm.weights_changed()
        stats = llm.stats()
        assert (stats.num_recordings, stats.pages_held) == (0, 0)
        after = tokens(llm)
    assert after == of_a_new_llm(model) != before


def test_weights_changed_while_requests_run() -> None:
    model: Any = zoo.tiny_model("llama")
    with make(model) as llm:
        stream = llm.stream(PROMPTS[0], zoo.greedy(30))
        first = next(stream)
        llm.weights_changed()  # nothing did: the tokens are as ever
        got = list(first.token_ids)
        for delta in stream:
            got += delta.token_ids
        assert llm.stats().num_preemptions == 1
    assert got == zoo.generate_alone(with_own_attention(model), PROMPTS[0], 30)


def test_weights_changed_of_a_hybrid_and_with_overlap() -> None:
    hybrid: Any = zoo.tiny_model("qwen3_next")
    with make(hybrid) as llm:
        tokens(llm)
        multiply_in_place(hybrid_part(hybrid))
        assert tokens(llm) == of_a_new_llm(hybrid)
    model: Any = zoo.tiny_model("llama")
    with make(model, overlap=True) as llm:
        stream = llm.stream(PROMPTS[0], zoo.greedy(30))
        next(stream)
        multiply_in_place(model)
        list(stream)
        assert llm.stats().num_preemptions == 1
        assert tokens(llm) == of_a_new_llm(model)


def hybrid_part(model: Any) -> Any:
    class Part:
        class model:
            layers = (None, type("Layer", (), {"mlp": model.model.layers[1].mlp.shared_expert}))

    return Part


def test_what_the_step_under_way_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(*_: Any) -> None:
        pytest.fail("nobody may be there to turn")

    with make(zoo.tiny_model("llama"), overlap=True) as llm:
        stream = llm.stream(PROMPTS[0], zoo.greedy(2))
        first = next(stream)
        llm.weights_changed()
        monkeypatch.setattr(llm.loop, "turn", turn)
        rest = list(stream)
    assert sum(len(delta.token_ids) for delta in (first, *rest)) == 2
    assert rest[-1].finish_reason == "length"


def test_async_weights_changed() -> None:
    model: Any = zoo.tiny_model("llama")

    async def main() -> None:
        async with AsyncLLM(model, device="cpu", **zoo.with_defaults({})) as llm:
            async for out in llm.generate(PROMPTS[0], zoo.greedy(NUM_TOKENS)):
                before = out
            model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1)
            await llm.weights_changed()
            async for out in llm.generate(PROMPTS[0], zoo.greedy(NUM_TOKENS)):
                after = out
        assert list(after.outputs[0].token_ids) == of_a_new_llm(model)[0]
        assert after.outputs[0].token_ids != before.outputs[0].token_ids

    asyncio.run(main())


def grow_the_vocabulary(model: Any) -> None:
    model.resize_token_embeddings(zoo.VOCAB_SIZE + 8)


def put_to_half(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "packed"), [(grow_the_vocabulary, False), (put_to_half, False), (put_to_half, True)]
)
def test_a_model_that_does_not_fit_any_more_is_refused(
    change: Callable[[Any], None], packed: bool
) -> None:
    model: Any = zoo.tiny_model("llama", tie_word_embeddings=packed)
    with make(model, pack_weights=packed) as llm:
        tokens(llm)
        change(model)
        for _ in range(2):
            with pytest.raises(InvalidOperation, match="close this LLM and make another"):
                tokens(llm)
        with pytest.raises(InvalidOperation, match="close this LLM and make another"):
            llm.weights_changed()
        zoo.assert_idle(llm)


def test_training_is_refused_until_it_ends() -> None:
    model: Any = zoo.tiny_model("llama")
    with make(model) as llm:
        before = tokens(llm)
        model.train()
        with pytest.raises(InvalidOperation, match=r"call model.eval\(\)"):
            tokens(llm)
        model.eval()
        assert tokens(llm) == before


def test_weights_changed_of_one_asleep() -> None:
    with make(zoo.tiny_model("llama")) as llm:
        llm.sleep()
        with pytest.raises(InvalidOperation, match="wake"):
            llm.weights_changed()


def test_packed_weights_cannot_be_exchanged_unseen() -> None:
    model: Any = zoo.tiny_model("llama")
    with make(model, pack_weights=True) as llm:
        before = tokens(llm)
        with pytest.raises(InvalidOperation, match="pack_weights=False"):
            model.load_state_dict(other_weights(), strict=False)
        load_embeddings(model)  # what is not packed may change
        assert tokens(llm) != before
        model.model.layers[0].self_attn.o_proj.weight = nn.Parameter(torch.zeros(32, 32))
        with pytest.raises(InvalidOperation, match="laid out for the CPU's kernels"):
            tokens(llm)


@torch.no_grad()
def load_embeddings(model: Any) -> None:
    model.get_input_embeddings().weight.copy_(other_weights()["model.embed_tokens.weight"])


def test_a_packed_routers_weight_is_laid_out_again() -> None:
    """It stays a parameter, beside what was laid out of it; experts do not."""
    model: Any = zoo.tiny_model("qwen3_moe")
    experts = {name: tensor for name, tensor in model.state_dict().items() if "experts" in name}
    with make(model, pack_weights=True) as llm:
        before = tokens(llm)
        router = model.model.layers[0].mlp.gate.weight
        router.data = -router.data
        changed = tokens(llm)
        with pytest.raises(InvalidOperation, match=r"experts\.\w+ cannot be loaded"):
            model.load_state_dict(experts, strict=False)
        router.data = -router.data
        assert tokens(llm) == before != changed
    other: Any = zoo.tiny_model("qwen3_moe")
    weight = other.model.layers[0].mlp.gate.weight
    weight.data = -weight.data
    with make(other, pack_weights=True) as llm:
        assert tokens(llm) == changed


def assign_norms(model: Any) -> None:
    norms = [layer.input_layernorm for layer in model.model.layers]
    norms[0].weight.data = norms[0].weight.data.flip(0) * 3
    norms[1].weight = nn.Parameter(norms[1].weight.data * -1)


@torch.no_grad()
def multiply_embeddings(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    weight.mul_(torch.linspace(0.5, 2.0, len(weight)).unsqueeze(1))


@pytest.mark.parametrize("change", [assign_norms, multiply_embeddings])
def test_what_was_made_of_weights_that_stay_is_made_again(change: Callable[[Any], None]) -> None:
    """Norms, and an output layer that is tied to the embeddings, of a packed model."""
    model: Any = zoo.tiny_model("llama", tie_word_embeddings=True)
    with make(model, pack_weights=True) as llm:
        before = tokens(llm)
        change(model)
        after = tokens(llm)
    other = zoo.tiny_model("llama", tie_word_embeddings=True)
    change(other)
    assert after == of_a_new_llm(other) != before
