"""Where models are cut: by what they are made of, and not by what they are called."""

import pytest
import zoo
from transformers.core_model_loading import revert_weight_conversion
from vkv.runtime.blocks.cutting import common_prefix, cut

# Of the second layer: norms that go with attention, and with the feed-forward.
_NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gemma2": (
        "input_layernorm post_attention_layernorm",
        "pre_feedforward_layernorm post_feedforward_layernorm",
    ),
    "glm4": (
        "input_layernorm post_self_attn_layernorm",
        "post_attention_layernorm post_mlp_layernorm",
    ),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "cohere2": ("input_layernorm", ""),
    "gpt2": ("ln_1", "ln_2"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "ctrl": ("layernorm1", "layernorm2"),
    "qwen3_moe": ("input_layernorm", "post_attention_layernorm"),
    "lfm2": ("operator_norm", "ffn_norm"),
    "falcon_h1": ("input_layernorm", "pre_ff_layernorm"),
}


@pytest.mark.parametrize("model_type", _NORMS)
def test_layers_are_cut_between_attention_and_feed_forward(model_type: str) -> None:
    model = zoo.tiny_model(model_type)
    names = revert_weight_conversion(model, dict(model.state_dict()))
    cuts = cut(model.config, names)
    assert sorted(name for one in cuts for name in one.names) == sorted(names)
    for kind, expected in zip(("attention", "feed_forward"), _NORMS[model_type], strict=True):
        (one,) = (c for c in cuts if c.kind == kind and c.layer == 1)
        children = {name.removeprefix(one.prefix).split(".")[0] for name in one.names}
        norms = {child for child in children if child.split("_")[0] != "attention"}
        norms = {child for child in norms if "norm" in child or child.startswith("ln_")}
        assert norms == set(expected.split()), kind
        assert any(names[name].dim() > 1 for name in one.names), "and what they norm"
    kinds = [one.kind for one in cuts if one.layer is None]
    assert kinds == sorted(kinds, key=["embedding", "other", "norm", "head"].index)
    assert [one.layer for one in cuts if one.layer is not None] == [0, 0, 1, 1]


def test_what_is_beside_the_language_model_is_apart() -> None:
    model = zoo.gemma3()
    names = revert_weight_conversion(model, dict(model.state_dict()))
    cuts = cut(model.config, names)
    (vision, projector) = (one for one in cuts if one.kind == "other")
    assert {"vision_tower", "multi_modal_projector"} == {
        next(part for part in one.names[0].split(".") if part != "model")
        for one in (vision, projector)
    }
    assert [one.layer for one in cuts if one.kind == "attention"] == [0, 1]


def test_base_models_names_have_the_same_place() -> None:
    model = zoo.tiny_model("gpt2")
    names = list(revert_weight_conversion(model, dict(model.state_dict())))
    whole = cut(model.config, names)
    bare = cut(model.config, [name.removeprefix("transformer.") for name in names])
    assert [(one.kind, one.layer) for one in whole] == [(one.kind, one.layer) for one in bare]
    for one, other in zip(whole, bare, strict=True):
        inner = [n.removeprefix(one.prefix) for n in one.names]
        assert inner == [n.removeprefix(other.prefix) for n in other.names]


def test_what_the_model_has_no_place_for_is_kept_apart() -> None:
    model = zoo.tiny_model("llama")
    extra = "model.layers.7.self_attn.q_proj.weight"
    frequencies = "model.layers.1.self_attn.rotary_emb.inv_freq"
    cuts = cut(model.config, [*model.state_dict(), extra, frequencies])
    (other,) = (one for one in cuts if one.kind == "other")
    assert other.names == (extra,)
    (attention,) = (one for one in cuts if one.kind == "attention" and one.layer == 1)
    assert frequencies in attention.names


def test_a_prefix_ends_at_a_point_and_leaves_a_name() -> None:
    assert common_prefix(["a.b.weight"]) == "a.b."
    assert common_prefix(["a.b.c", "a.bc.d"]) == "a."
    assert common_prefix(["a.b", "a.b.c"]) == "a."
    assert common_prefix(["weight"]) == ""
