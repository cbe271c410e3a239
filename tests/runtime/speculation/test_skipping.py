"""Models with layers left out."""

import pytest
import torch
import zoo
from vkv.runtime.model.attention_hook import ATTENTION_NAME, register
from vkv.runtime.model.probing import probe_outputs
from vkv.runtime.speculation.skipping import least_needed, num_layers, without_layers

register()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "gemma4_text"])
def test_with_all_layers_it_is_the_same_and_nothing_is_copied(name: str) -> None:
    model = zoo.tiny_model(name, attention=ATTENTION_NAME)
    twin = without_layers(model, range(num_layers(model)))
    for one, other in zip(probe_outputs(model), probe_outputs(twin), strict=True):
        assert torch.equal(one, other)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]


def test_the_model_keeps_its_layers() -> None:
    model = zoo.tiny_model("llama", attention=ATTENTION_NAME, num_hidden_layers=5)
    before = probe_outputs(model)
    twin = without_layers(model, [0, 3])
    assert len(twin.model.layers) == twin.model.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in twin.model.layers] == [0, 3]
    assert len(model.model.layers) == model.config.num_hidden_layers == 5
    for one, other in zip(before, probe_outputs(model), strict=True):
        assert torch.equal(one, other)


def test_layers_that_do_nothing_go_first() -> None:
    model = zoo.tiny_model("llama", attention=ATTENTION_NAME, num_hidden_layers=6)
    with torch.no_grad():
        for index in (0, 2, 3):  # the first stays, whatever it does
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    assert least_needed(model, 4, zoo.VOCAB_SIZE) == [0, 1, 4, 5]
    assert not any(module._forward_hooks for module in model.modules())
