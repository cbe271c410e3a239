"""Attention is asked for nothing that it would leave out."""

from typing import Any

import pytest
import torch
import zoo
from vkv.attention_backends import LayerAttention
from vkv.runtime.model.attention_hook import attention_step, vkv_attention
from vkv.runtime.model.loading import load_model
from vkv.runtime.model.probes.attention_probe import AttentionProbe
from vkv.vmem.errors import UnsupportedModel

CPU = torch.device("cpu")


class _Layer(torch.nn.Module):
    layer_idx = 0


class _Values:
    """Attention to oneself alone."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        return value


def attend(**keywords: Any) -> torch.Tensor:
    query = torch.zeros(1, 2, 3, 4)
    with attention_step(_Values()):
        return vkv_attention(_Layer(), query, query, query, None, **keywords)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.ones(1, 2, 3, 3)),
        ("indices", torch.zeros(1, 3, 2, dtype=torch.long)),
        ("sinks", torch.zeros(2)),
        ("head_mask", torch.ones(2)),
        ("dropout", 0.1),
        ("dropout", torch.zeros(())),
        ("is_causal", False),
        ("output_attentions", True),
        ("of_tomorrow", 0),
        ("of_tomorrow", False),
    ],
)
def test_a_keyword_that_asks_for_something_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match=rf"_Layer passes attention {name} \("):
        attend(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", torch.zeros(1, 3)),
        ("cache_position", torch.zeros(3)),
        ("use_cache", True),
        ("output_attentions", False),
        ("output_router_logits", True),
        ("dropout", 0.0),
        ("is_causal", True),
        ("position_bias", None),
        ("of_tomorrow", None),
    ],
)
def test_a_keyword_that_changes_nothing_is_none(name: str, value: object) -> None:
    assert attend(**{name: value}).shape == (1, 3, 2, 4)


def test_a_learned_position_bias_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Inkling2SlidingAttention passes attention"):
        load_model(zoo.tiny_model("inkling2_text"), device=CPU)


def test_a_config_that_attends_both_ways_is_refused() -> None:
    model = zoo.tiny_model("llama")
    model.config.is_causal = False
    with pytest.raises(UnsupportedModel, match="is_causal=False in its config"):
        load_model(model, device=CPU)


@pytest.mark.parametrize("odd", range(3))
def test_a_layer_of_several_dtypes_is_refused(odd: int) -> None:
    states = [torch.zeros(3, 2, 8, dtype=torch.bfloat16) for _ in range(3)]
    states[odd] = states[odd].float()
    with pytest.raises(UnsupportedModel, match=r"layer 5 .*torch\.float32.* in one, such as"):
        AttentionProbe().attend(5, *states, LayerAttention(scale=1.0))
