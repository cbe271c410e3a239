"""Sleep gives memory back and keeps addresses; what ran before runs after."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from rerun import record_by_rerun
from vkv import LLM, AsyncLLM
from vkv.quant import Int4Linear, Int4Weight, int4_linears
from vkv.runtime.model.weights import OffloadedWeights
from vkv.vmem import HostDriver
from vkv.vmem.errors import InvalidOperation


def _resident_bytes(llm: LLM) -> int:
    """What the system holds for the pages, as it counts itself."""
    driver = llm.engine.cache.pool.driver
    assert isinstance(driver, HostDriver)
    return os.fstat(driver._memfd).st_blocks * 512


def _tokens(llm: LLM) -> list[tuple[int, ...]]:
    outs = llm.generate(zoo.random_prompts([40, 7, 23]), zoo.greedy(20))
    return [out.outputs[0].token_ids for out in outs]


def test_asleep_it_holds_nothing_and_awake_it_gives_the_same(llm: LLM) -> None:
    expected = _tokens(llm)
    where = [part.data_ptr() for part in llm.engine.cache.layer(0)]
    held = llm.stats().physical_bytes
    assert held == _resident_bytes(llm) > 0
    assert llm.sleep() == held
    assert llm.is_asleep
    assert llm.stats().physical_bytes == llm.stats().pages_held == _resident_bytes(llm) == 0
    assert llm.sleep(weights=True) == 0  # a CPU's weights have nowhere to go
    llm.wake()
    assert _tokens(llm) == expected
    assert [part.data_ptr() for part in llm.engine.cache.layer(0)] == where


def test_recorded_steps_outlive_a_sleep(flash_standin: str) -> None:
    options = zoo.with_defaults({"attention": flash_standin})
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        graphs = record_by_rerun(llm)
        expected = _tokens(llm)
        recordings = dict(graphs._recordings)
        assert recordings
        llm.sleep()
        llm.wake()
        assert _tokens(llm) == expected
        assert graphs._recordings == recordings
        graphs.forget()  # as where weights come back at other addresses
        assert llm.stats().num_recordings == 0
        assert _tokens(llm) == expected
        assert llm.stats().num_recordings == len(recordings)


def test_state_goes_too() -> None:
    with LLM(zoo.tiny_model("lfm2"), device="cpu", **zoo.with_defaults({})) as llm:
        expected = _tokens(llm)
        before = llm.stats()
        assert llm.sleep() == before.physical_bytes + before.state_bytes
        assert llm.stats().state_bytes == 0 < before.state_bytes
        llm.wake()
        assert _tokens(llm) == expected


def test_with_an_unfinished_request_it_stays_awake(llm: LLM) -> None:
    stream = llm.stream("hello", zoo.greedy(10))
    next(stream)
    with pytest.raises(InvalidOperation, match="1 requests are unfinished"):
        llm.sleep()
    assert not llm.is_asleep
    assert sum(len(delta.token_ids) for delta in stream) == 9
    llm.sleep()


def test_asleep_it_refuses_and_can_be_closed(llm: LLM) -> None:
    llm.sleep()
    for use in (lambda: llm.generate("hello"), lambda: llm.stream("hello")):
        with pytest.raises(InvalidOperation, match="asleep"):
            use()
    assert llm.trim() == 0
    llm.close()
    with pytest.raises(InvalidOperation, match="closed"):
        llm.wake()


def test_an_async_llm_sleeps_and_goes_on(llama_folder: Path) -> None:
    async def scenario() -> list[int]:
        async with AsyncLLM(
            llama_folder, device="cpu", dtype="float32", **zoo.with_defaults({})
        ) as llm:
            async for _ in llm.generate("hello", zoo.greedy(5)):
                pass
            assert await llm.sleep() > 0
            with pytest.raises(InvalidOperation, match="asleep"):
                async for _ in llm.generate("hello", zoo.greedy(5)):
                    pass
            await llm.wake()
            return [len(out.outputs[0].token_ids) async for out in llm.generate([1], zoo.greedy(5))]

    assert asyncio.run(scenario())[-1] == 5


@pytest.mark.parametrize("num_there", [0, 1])
def test_weights_that_the_host_has_no_room_for_stay(
    num_there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's, and those of the one that guesses; changes of them are seen as before."""
    model, count = zoo.tiny_model("llama"), iter(range(9))

    def offload(given: torch.nn.Module) -> OffloadedWeights:
        if next(count) == num_there:
            raise RuntimeError("out of host memory")
        return OffloadedWeights(given)

    options = zoo.with_defaults({"speculative": zoo.tiny_model("llama", seed=1)})
    with LLM(model, device="cpu", **options) as llm:
        expected = _tokens(llm)
        with monkeypatch.context() as patch:
            patch.setattr(llm.loop._sleep._profile, "moves_weights", True)
            patch.setattr("vkv.runtime.engine.sleep.OffloadedWeights", offload)
            with pytest.raises(RuntimeError, match="host memory"):
                llm.sleep(weights=True)
        assert not llm.is_asleep
        assert _tokens(llm) == expected
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)  # type: ignore[operator]
        changed = _tokens(llm)
    with LLM(model, device="cpu", **zoo.with_defaults({})) as fresh:
        assert changed == _tokens(fresh) != expected


@torch.inference_mode()
def test_offloaded_weights_leave_nothing_and_come_back() -> None:
    model = zoo.tiny_model("llama", tie_word_embeddings=True)
    ids = torch.arange(5)[None]
    expected = model(ids).logits
    parts = [*model.parameters(), *model.buffers()]
    size = sum(part.nbytes for part in parts)
    weights = OffloadedWeights(model)
    assert weights.num_bytes == size  # a tied weight once
    assert all(part.untyped_storage().nbytes() == 0 for part in parts)
    weights.restore()
    assert torch.equal(model(ids).logits, expected)
    assert not weights._on_host
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], parts, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("settled", [False, True])
def test_weights_in_4_bits_leave_as_well_however_they_are_laid_out(settled: bool) -> None:
    """Layouts are no buffers of their linears."""
    model = zoo.tiny_model("llama", hidden_size=64, intermediate_size=128)
    inner: Any = model.model
    for layer in inner.layers:
        codes = torch.randint(0, 16, (128, 64), dtype=torch.uint8)
        zeros = torch.full((128, 2), 8, dtype=torch.uint8)
        weight = Int4Weight.from_codes(codes, torch.rand(128, 2), zeros)
        layer.mlp.up_proj = Int4Linear(weight, kernel_name="dequantize")
        if settled:
            layer.mlp.up_proj.settle(torch.float32)
    ids = torch.arange(5)[None]
    expected = model(ids).logits
    laid_out = {t for _, linear in int4_linears(model) for t in linear.weight_tensors()}
    in_4_bits = sum(tensor.nbytes for tensor in laid_out)
    dense = sum(part.nbytes for part in {*model.parameters(), *model.buffers()})
    weights = OffloadedWeights(model)
    assert weights.num_bytes == dense + in_4_bits
    assert in_4_bits > 0
    assert not any(tensor.nbytes for tensor in laid_out)
    weights.restore()
    assert torch.equal(model(ids).logits, expected)
