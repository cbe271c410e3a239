"""What tells models apart: any change of their numbers does, and nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from vkv import LLM
from vkv.runtime.model import fingerprint
from vkv.runtime.model.fingerprint import ModelFingerprint, model_files


def of(model: Any, *options: object) -> str:
    return ModelFingerprint(model, (), options).value()


def of_folder(folder: Path, *options: object) -> str:
    return ModelFingerprint(torch.nn.Module(), model_files(folder), options).value()


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def test_the_same_numbers_have_the_same_name() -> None:
    first = of(zoo.tiny_model("llama"), torch.float32, None)
    assert first == of(zoo.tiny_model("llama"), torch.float32, None)
    assert len(first) == 32
    model = zoo.tiny_model("llama")
    model.config.name_or_path = "elsewhere"
    assert of(model, torch.float32, None) == first


def test_it_is_computed_once_and_anew_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny_model("llama")
    found = ModelFingerprint(model, (), ())
    first = found.value()
    model.model.norm.weight.data.add_(1.0)
    assert found.value() == first
    found.renew()
    assert found.value() != first


def _write(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6


def _rename(model: Any) -> None:
    first, second = model.model.layers
    model.model.layers[0], model.model.layers[1] = second, first


def _configure(model: Any) -> None:
    model.config.rms_norm_eps *= 2


def _exchange(model: Any) -> None:
    class Other(type(model.model.layers[0].mlp)):
        pass

    model.model.layers[0].mlp.__class__ = Other


def _scale(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def _narrow(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_write, _rename, _configure, _exchange, _scale, _narrow])
def test_any_change_of_a_model_gives_another_name(change: Callable[[Any], None]) -> None:
    model = zoo.tiny_model("llama")
    before = of(model)
    change(model)
    assert of(model) != before


def test_options_count() -> None:
    model = zoo.tiny_model("llama")
    assert len({of(model), of(model, 4), of(model, 8), of(model, "4", ""), of(model, "", "4")}) == 5


def test_what_is_done_behind_the_parameters_has_a_name_of_its_own() -> None:
    model = zoo.tiny_model("llama")
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert of(model) != of(model)
    handle.remove()
    assert of(model) == of(model)


def test_packed_weights_are_known_by_what_was_packed(llama_folder: Path) -> None:
    def packed(seed: int) -> str:
        model = zoo.tiny_model("llama", seed=seed)
        with LLM(model, device="cpu", dtype="float32", pack_weights=True) as llm:
            return of(llm.loaded.model)

    assert packed(0) == packed(0)
    assert packed(0) != packed(1)


def test_files_are_known_by_their_bytes(folder: Path, tmp_path: Path) -> None:
    first = of_folder(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert of_folder(copy) == first
    (copy / "README.md").write_text("what counts is in other files")
    assert of_folder(copy) == first
    for name, place in (("config.json", 5), ("model.safetensors", -1)):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (copy / name).write_bytes(content)
        assert of_folder(copy) != first
        shutil.copy(folder / name, copy / name)
    (copy / "model-2.safetensors").write_bytes(b"more")
    assert of_folder(copy) != first
    assert of_folder(copy, torch.bfloat16) != of_folder(copy)


def test_large_files_are_read_in_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_PART_BYTES", 1000)
    first = of_folder(folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    assert len(content) > 10_000
    for place in (0, 999, 1000, 7500, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        weights.write_bytes(damaged)
        assert of_folder(folder) != first
    weights.write_bytes(content[1000:2000] + content[:1000] + content[2000:])
    assert of_folder(folder) != first
    weights.write_bytes(content)
    assert of_folder(folder) == first


def test_files_that_changed_since_they_were_read_tell_nothing(folder: Path) -> None:
    files = model_files(folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    first = ModelFingerprint(torch.nn.Module(), files, ()).value()
    os.utime(weights, ns=(1, 1))
    names = {ModelFingerprint(torch.nn.Module(), files, ()).value() for _ in range(2)}
    assert len(names | {first}) == 3
    weights.unlink()
    assert ModelFingerprint(torch.nn.Module(), files, ()).value() not in names
    weights.write_bytes(content)
    assert of_folder(folder) == first


def test_an_engine_knows_a_folder_by_its_files(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def name(where: Any, **options: Any) -> str:
        with LLM(where, device="cpu", **options) as llm:
            assert llm.engine.fingerprint is not None
            return llm.engine.fingerprint.value()

    first = name(folder, dtype="float32")
    assert name(copy, dtype="float32", max_seqs=3, page_bytes=8192) == first
    assert name(copy, dtype="bfloat16") != first
    assert name(copy, dtype="float32", repeatable=True) != first
    assert name(None) == name(None)
    assert model_files("no/such-model") == ()
