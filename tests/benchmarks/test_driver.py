"""The engine turned by hand, and that benches know of its inside through drivers alone."""

import ast
from pathlib import Path

import pytest
import zoo
from vkv import LLM
from vkv.bench.driver import Driver

HARNESS = Path(__file__).parents[2] / "benchmarks" / "harness"


def _private_uses(source: str) -> list[str]:
    """Names with an underscore that are taken from anything but oneself, PyTorch aside."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) not in ("self", "cls")
        and not ast.unparse(node).startswith("torch.")
    ]


def _inner_uses(source: str) -> list[str]:
    """What is taken from the engine of an `LLM`."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in ("engine", "scheduler", "runner")
    ]


def test_benches_reach_into_nothing() -> None:
    paths = [path for path in HARNESS.rglob("*.py") if path.parent.name != "workers"]
    assert len(paths) > 40
    for path in paths:
        source = path.read_text()
        assert not _private_uses(source), path
        if not path.name.endswith("driver.py"):
            assert not _inner_uses(source), path


@pytest.mark.parametrize("source", ["llm._engine.step()", "torch_llm._x", "f(a)._b", "x.y._z = 1"])
def test_what_is_private_would_be_found(source: str) -> None:
    assert _private_uses(source)
    assert not _private_uses("self._x; cls._y; torch.ops.mkldnn._z; a.__class__")
    assert _inner_uses("llm.engine.step()")


def test_requests_run_to_their_full_length_step_by_step(llm: LLM) -> None:
    driver = Driver(llm)
    prompts = zoo.random_prompts([5, 9])
    for index, prompt in enumerate(prompts):
        driver.submit(str(index), prompt, 3)
    seen: dict[str, list[bool]] = {"0": [], "1": []}
    while driver.has_work:
        computed = driver.num_computed_tokens
        for token in driver.step():
            seen[token.request_id].append(token.is_finished)
        assert driver.num_computed_tokens > computed
        for request in driver.running():
            held = request.num_held_tokens
            assert held >= len(prompts[int(request.request_id)])
            assert request.num_output_tokens == len(seen[request.request_id])
            backed = driver.backed_bytes(held)
            assert held * driver.token_bytes <= backed
            assert backed % driver.growth_bytes == 0
    assert seen == {"0": [False, False, True], "1": [False, False, True]}
    assert driver.stats().num_output_tokens == 6
    assert driver.max_batch_tokens > 0
    assert driver.step() == []
    zoo.assert_idle(llm)


def test_all_requests_are_finished_at_once(llm: LLM) -> None:
    driver = Driver(llm)
    driver.submit("a", [1, 2, 3], 4)
    driver.finish_all()
    assert not driver.has_work
    assert not driver.running()
