"""Which chains may run together, and which of their blocks are equal."""

import json
from pathlib import Path
from typing import Any

import fine_tunes
import pytest
import quantized
from vkv.runtime.blocks.zoo import BlockZoo
from vkv.vmem.errors import ChainMismatch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tunes.save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def zoo(base: Path, tmp_path_factory: pytest.TempPathFactory) -> BlockZoo:
    zoo = BlockZoo.create(tmp_path_factory.mktemp("zoo"))
    zoo.add(base)
    return zoo


def _changed(base: Path, folder: Path, file: str, **changes: Any) -> Path:
    fine_tunes.save_tuned(base, folder)
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(said | changes))
    return folder


def test_equal_blocks_are_told_place_by_place(base: Path, zoo: BlockZoo, tmp_path: Path) -> None:
    own = fine_tunes.save_tuned(base, tmp_path / "own", layers=[1], only="mlp", also="lm_head")
    mine, theirs = zoo.chain("base"), zoo.add(own).chain
    assert [block.place for block in mine.blocks] == [
        "embedding",
        *("attention of layer 0", "feed-forward of layer 0"),
        *("attention of layer 1", "feed-forward of layer 1"),
        *("norm", "head"),
    ]
    assert mine.same_as(theirs) == (True, True, True, True, False, True, False)
    assert theirs.same_as(theirs) == (True,) * 7
    mine.check_fits(theirs)
    assert mine.digest != theirs.digest
    zoo.remove("own")


def test_a_chain_is_known_by_what_it_computes(base: Path, zoo: BlockZoo, tmp_path: Path) -> None:
    again = fine_tunes.save_tuned(base, tmp_path / "again")
    assert zoo.draft(again).digest == zoo.chain("base").digest
    other = _changed(base, tmp_path / "other", "config.json", rms_norm_eps=0.5)
    assert zoo.draft(other).digest != zoo.chain("base").digest
    assert zoo.models == ("base",), "a draft writes nothing"


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("config.json", {"rms_norm_eps": 0.5}, r"rms_norm_eps in config\.json is 1e-06"),
        ("config.json", {"dtype": "bfloat16"}, r"dtype in config\.json"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}}}, "the vocabulary"),
    ],
)
def test_what_keeps_two_chains_apart_is_named(
    base: Path, zoo: BlockZoo, tmp_path: Path, file: str, changes: dict[str, Any], what: str
) -> None:
    other = zoo.draft(_changed(base, tmp_path / "other", file, **changes))
    with pytest.raises(ChainMismatch, match=f"base and other cannot run together: {what}"):
        zoo.chain("base").check_fits(other)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"eos_token_id": 7, "transformers_version": "9", "architectures": ["X"]}),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
    ],
)
def test_what_a_tenant_may_have_of_its_own(
    base: Path, zoo: BlockZoo, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    zoo.chain("base").check_fits(zoo.draft(_changed(base, tmp_path / "other", file, **changes)))


def test_shapes_and_quantisation_keep_chains_apart(
    base: Path, zoo: BlockZoo, tmp_path: Path
) -> None:
    int4, _ = quantized.quantize_folder(base, tmp_path, "gptq")
    with pytest.raises(ChainMismatch, match="quantization_config"):
        zoo.chain("base").check_fits(zoo.draft(int4))
    other = fine_tunes.save_tuned(base, tmp_path / "other")
    tensors = fine_tunes.load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    fine_tunes.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ChainMismatch, match=r"weight in the norm is .*F32.* and .*BF16"):
        zoo.chain("base").check_fits(zoo.draft(other))
