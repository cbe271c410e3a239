"""`VirtualCache` under `transformers`' own `generate`: the same tokens, in memory that follows."""

import copy
import functools
import gc
import io
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin.process
import torch
import vkv
import zoo
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    FalconConfig,
    PreTrainedModel,
)
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
from virtual_zoo import RECURRENT, VIRTUAL
from vkv.runtime.virtual_cache import lanes
from vkv.runtime.virtual_cache.cache import VirtualLayer, VirtualSlidingWindowLayer
from vkv.runtime.virtual_cache.lanes import Arena
from vkv.vmem import HostDriver, VmemDriver, janitor
from vkv.vmem.errors import (
    ForkedProcess,
    InvalidConfig,
    InvalidOperation,
    OutOfPages,
    RequestTooLong,
    UsageError,
)

ROOT = Path(__file__).resolve().parents[3]
PAGE = 4096  # some tens of tokens of a tiny model, so that pages come and go
NUM_TOKENS = 14
NUM_HEADS = 2 * 2 * 4  # of `states`: keys and values, two sequences
STOCK = {  # layers of `transformers` that hold keys and values, all of them exchanged
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}

# -- the tokens of stock `generate` ----------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 30},
    "beams": {"num_beams": 3},
    "return_sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
    "chunked_prefill": {"prefill_chunk_size": 9},
}


@functools.cache
def model_of(architecture: str) -> PreTrainedModel:
    if architecture != "falcon":
        return zoo.tiny_model(architecture, **VIRTUAL[architecture])
    config = FalconConfig(  # which takes not all that the zoo gives
        vocab_size=zoo.VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    zoo.sharpen(model)
    return model.eval()


def virtual(model: PreTrainedModel, max_len: int = 128) -> vkv.VirtualCache:
    return vkv.VirtualCache(model.config, max_len=max_len, page_bytes=PAGE)


def prompts(batch: int, *, repeating: bool = False) -> torch.Tensor:
    if repeating:  # something to look up, though what follows it differs
        return torch.tensor(zoo.random_prompts([9]) * 4).view(1, -1).repeat(batch, 1)
    return torch.tensor(zoo.random_prompts([33] * batch))


@torch.inference_mode()
def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None, **options: Any
) -> torch.Tensor:
    torch.manual_seed(5)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **options}
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        pad_token_id=0,
        **options,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", VIRTUAL)
def test_generate_gives_the_tokens_of_the_stock_cache(architecture: str, mode: str) -> None:
    model = model_of(architecture)
    lookup = mode == "prompt_lookup"
    if lookup and architecture in RECURRENT:
        pytest.skip("transformers cannot undo tokens in recurrent state")
    ids = prompts(1 if lookup else 2, repeating=lookup)
    expected = generate(model, ids, None, **MODES[mode])
    cache = virtual(model)
    assert torch.equal(generate(model, ids, cache, **MODES[mode]), expected)
    assert cache.stats().tokens == ids.shape[1] + NUM_TOKENS - 1
    assert any(isinstance(layer, VirtualLayer) for layer in cache.layers)
    assert not any(type(layer) in STOCK for layer in cache.layers)


@pytest.mark.parametrize("architecture", VIRTUAL)
def test_a_left_padded_batch_gives_the_tokens_of_the_stock_cache(architecture: str) -> None:
    model = model_of(architecture)
    ids, mask = prompts(3), torch.ones(3, 33, dtype=torch.long)
    mask[0, :20] = mask[1, :3] = 0
    expected = generate(model, ids, None, attention_mask=mask)
    assert torch.equal(generate(model, ids, virtual(model), attention_mask=mask), expected)


@pytest.mark.parametrize("architecture", VIRTUAL)
def test_turns_of_a_conversation_give_the_tokens_of_the_stock_cache(architecture: str) -> None:
    model = model_of(architecture)
    stock, ours = DynamicCache(config=model.config), virtual(model)
    said = prompts(2)
    for turn in range(3):
        expected = generate(model, said, stock)
        assert torch.equal(generate(model, said, ours), expected), f"turn {turn}"
        said = torch.cat([expected, torch.tensor(zoo.random_prompts([5, 5], seed=turn))], dim=1)


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3_text", "gpt_bigcode", "mistral", "falcon"]
)
def test_sdpa_gives_the_tokens_of_the_stock_cache(architecture: str) -> None:
    model = copy.deepcopy(model_of(architecture))
    model.set_attn_implementation("sdpa")
    expected = generate(model, prompts(2), None, num_beams=2)
    assert torch.equal(generate(model, prompts(2), virtual(model), num_beams=2), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "falcon", "deepseek_v3"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt_lookup"])
def test_a_gpu_gives_the_tokens_of_the_stock_cache(architecture: str, mode: str) -> None:
    model = copy.deepcopy(model_of(architecture)).to("cuda")
    ids = prompts(1, repeating=True).to("cuda")
    expected = generate(model, ids, None, **MODES[mode])
    cache = vkv.VirtualCache(model.config, max_len=128)
    assert torch.equal(generate(model, ids, cache, **MODES[mode]), expected)


def test_an_assistant_model_may_propose_tokens() -> None:
    model, assistant = model_of("mistral"), model_of("llama")
    expected = generate(model, prompts(1), None, assistant_model=assistant)
    ours = generate(model, prompts(1), virtual(model), assistant_model=assistant)
    assert torch.equal(ours, expected)


def test_the_example_remembers_the_turn_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_generate.py"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("my gate code is 4821\nwhat is my gate code?\n"))
    runpy.run_path(str(ROOT / "examples" / "hf_generate.py"), run_name="__main__")
    assert "4821" in capsys.readouterr().out.splitlines()[1]


def test_the_example_computes_anew_what_the_template_writes_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As of models that think, whose thoughts are left out of later prompts."""
    zoo.save_checkpoint(tmp_path)
    tokenizer = zoo.letter_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content if loop.last else '-' }};{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf_generate.py", str(tmp_path)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    runpy.run_path(str(ROOT / "examples" / "hf_generate.py"), run_name="__main__")
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path), ""
    for text in ("u:one;", "u:-;a:-;u:two;"):
        prompt = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**prompt, max_new_tokens=128, do_sample=False)
        start = prompt["input_ids"].shape[1]
        said += tokenizer.decode(output[0, start:], skip_special_tokens=True) + "\n"
    assert capsys.readouterr().out == said


# -- one layer against the one it stands for -------------------------------------------------


def assert_same(ours: VirtualLayer, stock: DynamicLayer) -> None:
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
    if stock.get_seq_length():
        torch.testing.assert_close(ours.keys, stock.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, stock.values, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [None, 2, 37])
def test_random_operations_leave_what_the_stock_layer_holds(
    window: int | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    if seed % 3 == 0:
        monkeypatch.setattr(Arena, "has_mappings_for", lambda *_: False)
    arena = Arena(PAGE)
    ours = _layer(arena, window, max_len=3000)
    stock = DynamicSlidingWindowLayer(window) if window else DynamicLayer()
    batch, recording = 2, window is not None and seed % 2 == 1
    if recording:
        ours.activate_past_recording()  # type: ignore[attr-defined]
        stock.activate_past_recording()  # type: ignore[attr-defined]

    for _ in range(60):
        match int(torch.randint(8, ())):
            case 0 if batch < 5:
                ours.batch_repeat_interleave(2)
                stock.batch_repeat_interleave(2)
                batch *= 2 if stock.get_seq_length() else 1
            case 1 if batch > 2 and stock.get_seq_length():
                chosen = torch.randperm(batch)[:2]
                ours.batch_select_indices(chosen)
                stock.batch_select_indices(chosen)
                batch = 2
            case 2:
                beams = torch.randint(batch, (batch,))
                ours.reorder_cache(beams)
                stock.reorder_cache(beams)
            case 3 if window is None:
                removed = int(torch.randint(stock.get_seq_length() + 1, ()))
                ours.crop(-removed)
                stock.crop(-removed)
            case 4 if torch.rand(()) < 0.2:
                ours.reset()
                stock = type(stock)(window) if window else DynamicLayer()
                if recording:
                    stock.activate_past_recording()  # type: ignore[attr-defined]
                batch = 2
            case _:
                num_tokens = int(torch.randint(1, (8, 60)[int(torch.randint(2, ()))], ()))
                _update_both(ours, stock, batch, num_tokens)
                if recording:  # as generation does: what was rejected goes after every step
                    removed = int(torch.randint(num_tokens, ()))
                    ours.crop(-removed)
                    stock.crop(-removed)
        assert_same(ours, stock)
        _assert_lean(arena, ours, window)


def _update_both(ours: VirtualLayer, stock: DynamicLayer, batch: int, num_tokens: int) -> None:
    keys, values = torch.randn(batch, 3, num_tokens, 8), torch.randn(batch, 3, num_tokens, 6)
    pairs = zip(ours.update(keys, values), stock.update(keys, values), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _layer(arena: Arena, window: int | None, max_len: int) -> VirtualLayer:
    if window is None:
        return VirtualLayer(arena, max_len)
    return VirtualSlidingWindowLayer(arena, max_len, window)


def _assert_lean(arena: Arena, layer: VirtualLayer, window: int | None) -> None:
    """At most 65/64 of what the tokens take, and a page each for the keys and values of a head."""
    if layer.keys is None or window is not None:
        return  # rows behind a window go with the next update
    batch, heads, num_tokens, _ = layer.keys.shape
    token_bytes = (layer.keys[:, :, :1].numel() + layer.values[:, :, :1].numel()) * 4
    edges = 2 * batch * heads * PAGE
    assert arena.physical_bytes <= token_bytes * num_tokens * 65 / 64 + edges


# -- memory ----------------------------------------------------------------------------------


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> list[VmemDriver]:
    """The drivers that caches open during the test."""
    opened: list[VmemDriver] = []
    open_driver = lanes.open_driver

    def record(*args: Any, **options: Any) -> VmemDriver:
        opened.append(open_driver(*args, **options))
        return opened[-1]

    monkeypatch.setattr(lanes, "open_driver", record)
    return opened


def assert_all_returned(driver: VmemDriver) -> None:
    assert janitor.drain(20)
    assert driver.num_pages == 0
    assert driver.reserved_bytes == 0
    with pytest.raises(InvalidOperation, match="closed"):
        driver.reserve(PAGE)


@pytest.fixture
def llama() -> PreTrainedModel:
    return model_of("llama")


def states(num_tokens: int, batch: int = 2) -> torch.Tensor:
    """Of one layer, 32 bytes a token and head: a page holds 128 of them."""
    return torch.randn(batch, 4, num_tokens, 8)


def test_nothing_is_reserved_before_the_first_token(llama, drivers) -> None:
    cache = virtual(llama)
    stats = cache.stats()
    assert (stats.virtual_bytes, stats.physical_bytes, stats.tokens) == (0, 0, 0)
    assert not drivers


def test_all_memory_returns_when_the_cache_is_dropped(llama, drivers) -> None:
    cache = virtual(llama)
    generate(llama, prompts(2), cache)
    (driver,) = drivers  # one for all layers
    assert driver.num_pages * PAGE == cache.stats().physical_bytes > 0
    del cache
    assert_all_returned(driver)


def test_a_tensor_outlives_its_cache(llama, drivers) -> None:
    cache = virtual(llama)
    generate(llama, prompts(2), cache)
    keys = cache.layers[1].keys[0, :, 3:]
    expected = keys.clone()
    del cache
    assert torch.equal(keys, expected)
    assert drivers[0].num_pages > 0
    del keys
    assert_all_returned(drivers[0])


def test_reset_gives_everything_back_and_the_cache_works_on(llama) -> None:
    cache = virtual(llama)
    first = generate(llama, prompts(2), cache)
    cache.reset()
    stats = cache.stats()
    assert (stats.virtual_bytes, stats.physical_bytes, stats.tokens) == (0, 0, 0)
    assert torch.equal(generate(llama, prompts(2), cache), first)


def test_growing_neither_moves_nor_copies() -> None:
    arena = Arena(PAGE)
    layer = VirtualLayer(arena, 4000)
    layer.update(states(5), states(5))
    address, written = layer.keys.data_ptr(), layer.keys.clone()
    strides = layer.keys.stride()
    assert strides[2:] == (8, 1)  # the tokens of a head lie side by side
    for _ in range(300):
        keys, _ = layer.update(states(7), states(7))
        assert keys.data_ptr() == layer.keys.data_ptr() == address
        assert keys.stride() == strides
        _assert_lean(arena, layer, None)
    assert torch.equal(layer.keys[:, :, :5], written)
    assert arena.physical_bytes >= 2105 * 256 * 2


def test_long_rows_take_few_calls_and_two_mappings_a_head(drivers) -> None:
    layer = VirtualLayer(Arena(PAGE), 64_000)
    for _ in range(1000):
        layer.update(states(64), states(64))  # half a page for each head
    pages = 64_000 * 32 // PAGE
    assert drivers[0].num_pages == NUM_HEADS * pages
    assert drivers[0].counters["map"] <= NUM_HEADS * (pages // 2)
    assert drivers[0].num_mappings <= NUM_HEADS * 2


def test_where_mappings_are_few_heads_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostDriver, "max_mappings", 60)
    arena = Arena(PAGE)
    layers = [VirtualLayer(arena, 4000) for _ in range(3)]
    for layer in layers:
        layer.update(states(5), states(5))
    assert layers[0].keys.stride()[2:] == (8, 1)
    assert layers[2].keys.stride()[2:] == (2 * 4 * 8, 1)


def test_pages_behind_a_window_go_back() -> None:
    arena = Arena(PAGE)
    layer = VirtualSlidingWindowLayer(arena, 10_000, sliding_window=40)
    layer.update(states(3000), states(3000))  # a long prompt is attended to as a whole
    assert arena.physical_bytes >= 2 * 3000 * 256
    for step in range(400):
        keys, values = layer.update(states(1), states(1))
        assert keys.shape == values.shape == (2, 4, 40, 8)
        # 40 tokens of a head touch two pages at most.
        assert arena.physical_bytes <= NUM_HEADS * 2 * PAGE, f"step {step}"
    assert layer.get_seq_length() == 3400


def test_crop_gives_pages_back() -> None:
    arena = Arena(PAGE)
    layer = VirtualLayer(arena, 4000)
    layer.update(states(2000), states(2000))
    layer.crop(-1990)
    assert layer.keys.shape[2] == 10
    assert arena.physical_bytes == NUM_HEADS * PAGE
    layer.crop(-100)  # as stock layers do: there is nothing more to take away
    assert layer.get_seq_length() == 0
    assert arena.physical_bytes == 0


def test_a_batch_of_another_size_leaves_nothing_behind() -> None:
    arena = Arena(PAGE)
    layer = VirtualLayer(arena, 4000)
    layer.update(states(100), states(100))
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([False, True, False, True, False, False]))
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.keys.shape == (1, 4, 100, 8)
    _assert_lean(arena, layer, None)


def test_memory_let_go_during_a_call_returns_after_it(drivers) -> None:
    """As when the garbage collector runs in the midst of a driver's call, whoever makes it."""
    arena = Arena(PAGE)
    layer = VirtualLayer(arena, 100)
    layer.update(states(5), states(5))
    with arena._calling():
        layer.reset()
        assert drivers[0].num_pages == NUM_HEADS
    assert arena.physical_bytes == arena.virtual_bytes == 0
    layer.update(states(5), states(5))
    with drivers[0]._guarded():
        layer.reset()
        assert drivers[0].num_pages == NUM_HEADS
    assert janitor.drain(20)
    assert drivers[0].num_pages == drivers[0].reserved_bytes == 0


def test_a_forked_child_is_refused_before_it_writes_or_waits(llama) -> None:
    cache = virtual(llama)
    generate(llama, prompts(2), cache)
    layer, keys = cache.layers[0], cache.layers[0]._tensors[0]
    before = [other.keys.clone() for other in cache.layers]
    one = torch.zeros_like(layer.keys[:, :, :1])
    operations: list[Callable[[], object]] = [
        lambda: layer.update(one, one),
        lambda: generate(llama, prompts(2), cache),
        lambda: layer.crop(-1),
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
        lambda: layer.batch_repeat_interleave(2),
        lambda: copy.deepcopy(layer),
        lambda: keys.append(one),
        cache.stats,
    ]

    def child() -> int:
        signal.alarm(60)
        torch.set_num_threads(1)  # the other threads stayed behind
        for index, operation in enumerate(operations):
            try:
                operation()
            except ForkedProcess:
                continue
            return index + 1
        cache.reset()
        gc.collect()
        return 0

    held, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with cache._arena._calling():
            held.set()
            go_on.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(20)
    assert standin.process.run_in_fork(child) == 0
    go_on.set()
    thread.join()
    assert all(map(torch.equal, before, (other.keys for other in cache.layers)))
    layer.update(one, one)


def test_a_copy_is_complete_and_apart(llama) -> None:
    cache = virtual(llama)
    prefix = prompts(2)
    generate(llama, prefix, cache)
    twin = copy.deepcopy(cache)
    for layer, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    kept = cache.layers[0].keys.clone()
    twin.layers[0].update(*(torch.zeros_like(kept[:, :, :1]) for _ in range(2)))
    twin.layers[0].keys.zero_()
    assert torch.equal(cache.layers[0].keys, kept)
    assert twin.stats().physical_bytes == cache.stats().physical_bytes
    del cache
    gc.collect()
    assert janitor.drain(20)
    assert not twin.layers[0].keys.any()


@pytest.mark.parametrize("architecture", ["falcon_h1", "zaya"])
def test_a_copy_of_a_hybrid_has_a_state_of_its_own(architecture: str) -> None:
    model = model_of(architecture)
    cache = virtual(model)
    said = generate(model, prompts(2), cache)
    twin = copy.deepcopy(cache)
    said = torch.cat([said, torch.tensor(zoo.random_prompts([5, 5]))], dim=1)
    expected = generate(model, said, cache)
    assert torch.equal(generate(model, said, twin), expected)


def test_a_tensor_can_be_saved_whole() -> None:
    layer = VirtualSlidingWindowLayer(Arena(PAGE), 10_000, sliding_window=9)
    layer.update(states(300), states(300))
    layer.update(states(1), states(1))
    assert torch.equal(copy.deepcopy(layer.keys), layer.keys)  # its storage is mapped throughout


def test_the_rules_of_cuda_are_kept(standin_driver_factory, monkeypatch) -> None:
    driver = standin_driver_factory()
    monkeypatch.setattr(lanes, "open_driver", lambda *_, **__: driver)
    rows = driver.page_bytes // 256
    layer = VirtualSlidingWindowLayer(Arena(), 20 * rows, sliding_window=9)
    for _ in range(10):
        layer.update(states(rows), states(rows))
    layer.batch_repeat_interleave(2)
    layer.reset()
    assert janitor.drain(20)
    assert driver.num_pages == 0


# -- mistakes and shortages ------------------------------------------------------------------


def test_more_tokens_than_max_len_are_refused(llama) -> None:
    cache = virtual(llama, max_len=40)
    with pytest.raises(RequestTooLong, match=r"41 tokens exceed the 40 .* larger max_len"):
        generate(llama, prompts(1), cache)
    assert cache.stats().tokens == 40
    cache.crop(-20)
    assert cache.stats().tokens == 20


def test_a_shortage_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = VirtualLayer(Arena(PAGE), 4000)
    layer.update(states(10), states(10))
    kept = layer.keys.clone(), layer.values.clone()
    create = HostDriver.create
    calls: list[int] = []

    def scarce(driver: HostDriver, num_pages: int, *homes: Any) -> list[Any]:
        calls.append(num_pages)
        if len(calls) % 2 == 0:  # the values find none after the keys did
            raise OutOfPages("none left")
        return create(driver, num_pages, *homes)

    monkeypatch.setattr(HostDriver, "create", scarce)
    operations: list[Callable[[], object]] = [
        lambda: layer.update(states(200), states(200)),
        lambda: layer.batch_repeat_interleave(2),
    ]
    for operation in operations:
        with pytest.raises(OutOfPages):
            operation()
        assert layer.get_seq_length() == 10
        assert torch.equal(layer.keys, kept[0])
        assert torch.equal(layer.values, kept[1])
    monkeypatch.undo()
    assert layer.update(states(200), states(200))[0].shape[2] == 210


def test_wrong_values_are_refused_by_name(llama) -> None:
    for wrong in (0, -1, True, "8"):
        with pytest.raises(InvalidConfig, match="max_len"):
            vkv.VirtualCache(llama.config, max_len=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="max_len is None"):
        vkv.VirtualCache(BloomConfig())  # has no longest sequence
    layer = VirtualLayer(Arena(PAGE), 100)
    layer.update(states(5), states(5))
    with pytest.raises(InvalidOperation, match="reset"):
        layer.update(states(1, batch=1), states(1, batch=1))
    with pytest.raises(UsageError, match=r"crop\(-n\)"):
        layer.crop(3)
    assert layer.get_seq_length() == 5


def test_what_left_the_window_cannot_be_cropped_back() -> None:
    layer = VirtualSlidingWindowLayer(Arena(PAGE), 1000, sliding_window=9)
    for _ in range(30):
        layer.update(states(1), states(1))
    with pytest.raises(InvalidOperation, match="activate_past_recording"):
        layer.crop(-5)
    assert layer.get_seq_length() == 30


def test_the_length_is_the_models_own_by_default(llama) -> None:
    cache = vkv.VirtualCache(llama.config)
    assert cache.get_max_length() == llama.config.max_position_embeddings


def test_no_cache_is_offered_for_compilation(llama) -> None:
    assert not virtual(llama).is_compileable
    recurrent = zoo.tiny_config("qwen3_next", layer_types=["linear_attention"] * 2)
    assert DynamicCache(config=recurrent).is_compileable
    assert not vkv.VirtualCache(recurrent, max_len=8).is_compileable


def test_a_cache_goes_between_inference_mode_and_without(llama) -> None:
    cache = virtual(llama)
    ids = prompts(2)
    with torch.inference_mode():
        llama(ids[:, :10], past_key_values=cache)
    ours = llama(ids[:, 10:], past_key_values=cache).logits  # gradients are on, and none flow
    expected = llama(ids, use_cache=False).logits[:, 10:]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not cache.layers[0].keys.requires_grad
