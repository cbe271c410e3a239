"""Many adapters in one batch: each request has the tokens of its merged model run alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lora
import pytest
import zoo
from vkv import LLM
from vkv.runtime.adapters.products import TorchProducts
from vkv.runtime.engine.devices import CpuProfile

_RANKS = (8, 16, 24, 32, 40, 48, 56, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sixteen adapters of ranks 8 to 64 for the tiny llama."""
    home, model = tmp_path_factory.mktemp("adapters"), zoo.tiny_model("llama")
    return {
        f"a{i}": lora.save_adapter(
            home / f"a{i}",
            model,
            rank=_RANKS[i % 8],
            seed=i,
            endings=lora.ALL if i % 3 else lora.ATTENTION,
        )
        for i in range(16)
    }


class Alone:
    """What each merged model gives by itself."""

    def __init__(self, folders: Mapping[str, Path], model_type: str = "llama") -> None:
        self._folders = folders
        self._model_type = model_type
        self._models: dict[str | None, Any] = {}

    def tokens(self, adapter: str | None, prompt: Sequence[int], count: int) -> list[int]:
        if adapter not in self._models:
            model = zoo.tiny_model(self._model_type)
            if adapter is not None:
                lora.merge(model, self._folders[adapter])
            self._models[adapter] = model
        return zoo.generate_alone(self._models[adapter], prompt, count)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Alone:
    return Alone(folders)


def _load(llm: LLM, folders: Mapping[str, Path]) -> None:
    for name, folder in folders.items():
        llm.load_adapter(name, folder)


def _check(
    llm: LLM,
    alone: Alone,
    adapters: Sequence[str | None],
    lengths: Sequence[int],
    counts: Sequence[int],
) -> None:
    prompts = zoo.random_prompts(lengths)
    outs = llm.generate(prompts, [zoo.greedy(count) for count in counts], adapter=adapters)
    for prompt, out, adapter, count in zip(prompts, outs, adapters, counts, strict=True):
        assert out.error is None, out.error
        expected = alone.tokens(adapter, prompt, count)
        assert list(out.outputs[0].token_ids) == expected, adapter
    llm.engine.cache.check_invariants()
    if llm.stats().swap is None:  # which copies what is finished, for a while
        zoo.assert_idle(llm)


@pytest.mark.parametrize("packs", [False, True], ids=["as it is", "packed"])
@pytest.mark.parametrize("records", [False, None], ids=["kernel by kernel", "recorded"])
def test_sixteen_adapters_and_the_base_in_one_batch(
    folders: dict[str, Path], alone: Alone, packs: bool, records: bool | None
) -> None:
    """Prompts come in chunks, with others' decodes between them; and again from recordings."""
    options = zoo.with_defaults(
        {"max_seqs": 20, "max_batch_tokens": 48, "record_decodes": records, "pack_weights": packs}
    )
    names: list[str | None] = [*folders, None, None, "a3", "a3"]
    lengths = [5 + 7 * (i % 6) for i in range(len(names))]
    counts = [10 + i % 5 for i in range(len(names))]
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        _load(llm, folders)
        _check(llm, alone, names, lengths, counts)
        _check(llm, alone, names[::-1], lengths, counts)
        if records is None and packs:
            assert llm.stats().num_replays > 0


def test_recordings_with_adapters_serve_others(folders: dict[str, Path], alone: Alone) -> None:
    options = zoo.with_defaults({"max_seqs": 4, "pack_weights": True})
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        _load(llm, folders)
        names = [*folders, None, None, None, None]
        for first in range(0, len(names), 4):
            _check(llm, alone, names[first : first + 4], [6] * 4, [8] * 4)
        before = llm.stats()
        assert before.num_recordings == 2  # of four rows: with adapters and without
        _check(llm, alone, ["a1", None, "a2", "a9"], [7] * 4, [12] * 4)
        after = llm.stats()
        assert after.num_recordings == 2
        assert after.num_replays > before.num_replays


def test_preempted_requests_keep_their_adapters(folders: dict[str, Path], alone: Alone) -> None:
    options = zoo.with_defaults({"max_seqs": 8, "kv_memory": "320KiB", "max_parked": 2})
    few = {name: folders[name] for name in ("a1", "a2", "a4", "a5")}
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        _load(llm, few)
        names = [*few, None, *few]
        _check(llm, alone, names, [40] * 9, [60] * 9)
        assert llm.stats().num_preemptions > 0


def test_swapped_requests_keep_their_adapters(folders: dict[str, Path], alone: Alone) -> None:
    options = zoo.with_defaults(
        {"max_seqs": 8, "kv_memory": "320KiB", "max_parked": 2, "swap_memory": "8MiB"}
    )
    few = {name: folders[name] for name in ("a1", "a2", "a4", "a5")}
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        _load(llm, few)
        _check(llm, alone, [*few, None, *few], [40] * 9, [60] * 9)
        stats = llm.stats()
        assert stats.num_preemptions > 0
        assert stats.swap is not None
        assert stats.swap.stored.num_moves > 0


def test_pytorchs_products_give_the_same(
    folders: dict[str, Path], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuProfile, "products", lambda profile, dtype: TorchProducts())
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        _load(llm, folders)
        _check(llm, alone, ["a1", None, "a2", "a1"], [9, 12, 30, 4], [12] * 4)
