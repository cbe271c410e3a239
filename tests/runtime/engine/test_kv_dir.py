"""`kv_dir`: the next process and the next request begin with what was saved; same tokens."""

import logging
import shutil
from pathlib import Path

import moved
import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM
from vkv.allocator.transfer import kv_dir
from vkv.vmem.errors import InvalidConfig, UnsupportedModel

_PAGE_BYTES = 4096  # 16 tokens of the tiny llama


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)


def _llm(model: PreTrainedModel, folder: Path, **options: object) -> LLM:
    return LLM(model, device="cpu", **zoo.with_defaults({"kv_dir": folder, **options}))


def test_the_next_process_begins_where_this_one_ended(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    (prompt,) = zoo.random_prompts([60])
    with _llm(model, tmp_path) as llm:
        (first,) = llm.generate([prompt], zoo.greedy(20))
    with _llm(model, tmp_path) as llm:
        again = [*prompt, *first.outputs[0].token_ids, 5]
        (second,) = llm.generate([again], zoo.greedy(20))
        assert second.num_cached_tokens == 79
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        (alone,) = llm.generate([again], zoo.greedy(20))
    assert second.outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_process_may_go_elsewhere(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are those that were meant at the start: the model's, too, which names the files."""
    first, second = zoo.random_prompts([60, 61])
    shutil.copytree(llama_folder, tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with LLM("model", **zoo.with_defaults({})) as llm:
        monkeypatch.chdir(tmp_path / "elsewhere")
        llm.save_session(tmp_path / "session", first)
    monkeypatch.chdir(tmp_path)
    with LLM("model", **zoo.with_defaults({"kv_dir": "kept"})) as llm:
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert llm.open_session(tmp_path / "session").is_usable
        llm.generate([second], zoo.greedy(4))
    assert list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("swap", [None, 8 << 20], ids=["alone", "behind memory"])
def test_forced_moves_change_no_token(
    model: PreTrainedModel, tmp_path: Path, swap: int | None
) -> None:
    prompts = zoo.random_prompts([30, 5, 44, 18, 59, 27, 33, 61, 12, 40])
    specs = moved.specs([*prompts, *([*prompts[7][:48], 3 + i] for i in range(4))])
    undisturbed = moved.run(model, specs, max_seqs=14)
    for _ in range(2):  # the second time with all files of the first
        outcome = moved.run(
            model, specs, num_moves=60, max_seqs=14, kv_dir=tmp_path, swap_memory=swap
        )
        assert outcome.tokens == undisturbed.tokens
    assert len(list(tmp_path.iterdir())) >= 5


def test_under_pressure_too(model: PreTrainedModel, tmp_path: Path) -> None:
    specs = moved.specs(zoo.random_prompts([30, 5, 44, 18, 59, 27, 33, 61]), max_tokens=40)
    undisturbed = moved.run(model, specs, max_seqs=8)
    outcome = moved.run(
        model, specs, max_seqs=8, kv_dir=tmp_path, kv_memory=24 * _PAGE_BYTES, kv_dir_limit="1MiB"
    )
    assert outcome.tokens == undisturbed.tokens


def test_a_damaged_file_is_computed_again(
    model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (prompt,) = zoo.random_prompts([60])
    with _llm(model, tmp_path) as llm:
        (first,) = llm.generate([prompt], zoo.greedy(20))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING), _llm(model, tmp_path) as llm:
        (second,) = llm.generate([prompt], zoo.greedy(20))
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    assert path.name in caplog.text
    assert "not as it was written" in caplog.text


def test_another_model_finds_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    (prompt,) = zoo.random_prompts([60])
    with _llm(model, tmp_path) as llm:
        llm.generate([prompt], zoo.greedy(20))
    with _llm(zoo.tiny_model("mistral"), tmp_path) as llm:
        (other,) = llm.generate([prompt], zoo.greedy(20))
        assert not other.num_cached_tokens


def test_what_cannot_be_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="leave prefix_reuse True"):
        _llm(model, tmp_path, prefix_reuse=False)
    with pytest.raises(InvalidConfig, match="not an amount"):
        _llm(model, tmp_path, kv_dir_limit="much")
    with pytest.raises(UnsupportedModel, match="leave kv_dir out"):
        _llm(zoo.tiny_model("qwen3_next"), tmp_path)
