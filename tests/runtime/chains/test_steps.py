"""Rows that part ways at a module, and come together again in their order."""

from typing import Any

import pytest
import torch
import zoo
from torch import nn
from vkv.runtime.chains.anatomy import Anatomy, Call
from vkv.runtime.chains.steps import ChainStep, chaining, current_step
from vkv.runtime.model.extras.overlays import Overlay, overlays_of
from vkv.runtime.model.loading import load_model
from vkv.vmem.errors import UnsupportedModel

_CPU = torch.device("cpu")


def _times(factor: float, calls: list[int]) -> Any:
    def compute(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[-2])
        return x * factor

    return compute


def _call(axis: int) -> Call:
    return Call((), {}, (axis,), (axis,))


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_computed_by_those_who_agree(axis: int) -> None:
    calls: list[int] = []
    own, two, three = (_times(factor, calls) for factor in (1.0, 2.0, 3.0))
    runs = [({}, 2), ({"m": two}, 1), ({"m": three, "n": two}, 3), ({"m": two}, 2), ({}, 1)]
    x = torch.arange(9.0).view(9, 1) + 1
    given = x if axis == 0 else x[None]
    step = ChainStep(runs, None, _CPU)
    out = step.call("m", _call(axis), own, (given,), {})
    factors = torch.tensor([1, 1, 2, 3, 3, 3, 2, 2, 1.0]).view(9, 1)
    assert torch.equal(out.view(9, 1), x * factors)
    assert sorted(calls) == [3, 3, 3]  # once for each, though some are in two stretches
    calls.clear()
    out = step.call("n", _call(axis), own, (given,), {})
    assert sorted(calls) == [3, 6]
    assert torch.equal(out.view(9, 1)[3:6], x[3:6] * 2)
    calls.clear()
    assert step.call("elsewhere", _call(axis), own, (given,), {}).shape == given.shape
    assert calls == [9]


def test_kept_rows_and_any_others() -> None:
    calls: list[int] = []
    two, own = _times(2.0, calls), _times(1.0, calls)
    step = ChainStep([({}, 4), ({"head": two}, 5)], [({}, 1), ({"head": two}, 2)], _CPU)
    out = step.call("head", _call(1), own, (torch.ones(1, 3, 2),), {})
    assert out[0, :, 0].tolist() == [1, 2, 2]
    step = ChainStep([({}, 4), ({"head": two}, 5)], [({}, 0), ({"head": two}, 0)], _CPU)
    assert step.call("head", _call(1), own, (torch.ones(1, 0, 2),), {}).shape == (1, 0, 2)
    with pytest.raises(UnsupportedModel, match="7 rows in a step of 9 tokens"):
        step.call("head", _call(1), own, (torch.ones(1, 7, 2),), {})


def test_several_values_and_parts_that_stay_the_same() -> None:
    seen: list[int] = []

    def route(x: torch.Tensor, scale: float, *, ids: torch.Tensor) -> Any:
        seen.append(id(x))
        return x * scale, (ids + 1, None)

    call = Call((), {}, (1, None, 0), (1, 0, None))
    step = ChainStep([({}, 2), ({"m": route}, 1)], None, _CPU)
    x, ids = torch.ones(1, 3, 2), torch.arange(3)
    for _ in range(2):
        y, (found, nothing) = step.call("m", call, route, (x, 2.0), {"ids": ids})
        assert torch.equal(y, x * 2)
        assert found.tolist() == [1, 2, 3]
        assert nothing is None
    assert seen[:2] == seen[2:]  # products of several linears go by the identity of inputs
    step.forget()
    with chaining(step):
        assert current_step() is step
    assert current_step() is None


def test_what_a_run_tells_of_a_model() -> None:
    loaded = load_model(zoo.tiny_model("qwen3_moe"), device=_CPU)
    anatomy = Anatomy(loaded.model)
    layer = "model.layers.1"
    assert {f"{layer}.self_attn", layer, "model.layers.0.self_attn"} <= anatomy.attending
    for name in (f"{layer}.mlp", f"{layer}.self_attn.q_norm", "lm_head", "model.embed_tokens"):
        assert anatomy.can_stand_alone(name), name
    assert not anatomy.can_stand_alone(f"{layer}.self_attn")
    assert anatomy.is_behind("model.norm")
    assert anatomy.is_behind(f"{layer}.mlp")
    assert not anatomy.is_behind("model.layers.0.mlp")
    assert not anatomy.is_behind(f"{layer}.self_attn.q_proj")
    assert anatomy.feeds_forward_last()


class _Plus(Overlay):
    def __init__(self, module: nn.Module, more: float) -> None:
        super().__init__(module)
        self._more = more

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self._more


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("is_bound", [False, True])
def test_overlays_come_off_in_any_order(order: tuple[int, ...], is_bound: bool) -> None:
    module, one = nn.Identity(), torch.zeros(1)
    if is_bound:
        module.forward = lambda x: x + 100  # type: ignore[method-assign]
    before = dict(vars(module))
    sums = [1.0, 10.0, 1000.0]
    overlays = [_Plus(module, more) for more in sums]
    left = sum(sums) + 100 * is_bound
    assert module(one).item() == left
    for index in order:
        overlays[index].take_off()
        overlays[index].take_off()
        left -= sums[index]
        assert module(one).item() == left
    assert dict(vars(module)) == before
    assert not list(overlays_of(module))
