"""`VirtualCache` in a compiled model, and under a backward pass."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformers import DynamicCache
from vkv import VirtualCache
from vkv.vmem.errors import InvalidOperation

PROMPT = zoo.random_prompts([20])[0]
NUM_TOKENS = 4


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """No compiled code of another test is found."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(forward: Callable[..., Any], cache: Any) -> list[int]:
    """Greedy tokens, by forwards with positions as `transformers` counts them."""
    tokens: list[int] = []
    ids = torch.tensor([PROMPT])
    for _ in range(NUM_TOKENS):
        out = forward(input_ids=ids, past_key_values=cache, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("model_type", "backend", "mode"),
    [
        ("llama", "aot_eager", torch.no_grad),
        ("mistral", "eager", torch.inference_mode),  # with a window
        ("llama", "eager", contextlib.nullcontext),
    ],
)
def test_a_compiled_model_gives_the_same_tokens(
    model_type: str, backend: str, mode: Callable[[], Any]
) -> None:
    model: Any = zoo.tiny_model(model_type, num_hidden_layers=1)
    expected = zoo.generate_alone(model, PROMPT, NUM_TOKENS)
    compiled = torch.compile(model.forward, backend=backend)
    with mode():
        cache = VirtualCache(model.config, max_len=64)
        assert decode(compiled, cache) == expected
        assert cache.stats().tokens == len(PROMPT) + NUM_TOKENS - 1


def test_a_whole_graph_is_refused_with_the_remedy() -> None:
    model: Any = zoo.tiny_model("llama")
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="leave fullgraph=False"):
        decode(compiled, VirtualCache(model.config, max_len=64))


def test_a_backward_pass_is_refused() -> None:
    model: Any = zoo.tiny_model("llama")
    ids = torch.tensor([PROMPT])
    out = model(input_ids=ids, labels=ids, past_key_values=VirtualCache(model.config, max_len=64))
    with pytest.raises(InvalidOperation, match=r"use_cache=False, or with transformers' Dynamic"):
        out.loss.backward()
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, past_key_values=DynamicCache(config=model.config))
    out.loss.backward()  # the remedy


def test_a_backward_pass_to_earlier_tokens_alone_is_refused() -> None:
    """A soft prompt is learned; the weights are not, and neither are the tokens behind it."""
    model: Any = zoo.tiny_model("llama").requires_grad_(False)
    prompt = nn.Parameter(torch.randn(1, 5, 32))
    cache = VirtualCache(model.config, max_len=64)
    model(inputs_embeds=prompt, past_key_values=cache)
    out = model(input_ids=torch.tensor([PROMPT]), past_key_values=cache)
    with pytest.raises(InvalidOperation, match="no gradient flows"):
        out.logits.sum().backward()
    cache.reset()
    assert not model(input_ids=torch.tensor([PROMPT]), past_key_values=cache).logits.requires_grad


def test_a_forward_that_could_be_differentiated_is_none_the_less_right() -> None:
    model: Any = zoo.tiny_model("llama")
    expected = zoo.generate_alone(model, PROMPT, NUM_TOKENS)
    assert decode(model, VirtualCache(model.config, max_len=64)) == expected
