"""What cannot be a model is refused by name, each case with the remedy that fits it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from vkv.runtime.model.loading import load_model
from vkv.runtime.model.reading import reading
from vkv.vmem.errors import BadCheckpoint, InvalidConfig, UnsupportedModel

CPU = torch.device("cpu")


def load(source: Any) -> None:
    load_model(source, device=CPU)


def checkpoint(folder: Path, **changes: Any) -> Path:
    zoo.save_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "auto",
    [
        AutoModel,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    ],
)
def test_models_without_an_output_layer_over_the_vocabulary(auto: Any) -> None:
    model = auto.from_config(zoo.tiny_config("llama", pad_token_id=0))
    with pytest.raises(UnsupportedModel, match=r"has no output layer .* causal language modelling"):
        load(model)


def test_scores_of_labels_instead_of_tokens() -> None:
    model = zoo.tiny_model("llama")
    model.set_output_embeddings(torch.nn.Linear(32, 5))
    with pytest.raises(UnsupportedModel, match="puts out 5 scores a token, and its vocabulary"):
        load(model)


def test_weights_that_are_elsewhere() -> None:
    model = zoo.tiny_model("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModel, match=r"not in memory, among them model\.layers\.1\."):
        load(model)


class _Adapted(torch.nn.Module):
    def merge_and_unload(self) -> torch.nn.Module:
        return self


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (_Adapted(), UnsupportedModel, r"_Adapted .* pass model\.merge_and_unload"),
        (
            torch.compile(torch.nn.Linear(2, 2), backend="eager"),
            UnsupportedModel,
            r"before torch\.compile",
        ),
        (torch.nn.Linear(2, 2), UnsupportedModel, r"Linear is no model of transformers"),
        (3, InvalidConfig, r"model is 3; give a model folder, a hub id"),
        (Path("weights/model.gguf"), BadCheckpoint, r"model\.gguf is not there"),
    ],
)
def test_what_is_no_model(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(source)


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadCheckpoint, match=r"give the file, .*model\.gguf"):
        load(tmp_path)


@pytest.mark.parametrize("beside_a_model", [True, False])
def test_a_folder_of_an_adapter(tmp_path: Path, beside_a_model: bool) -> None:
    if beside_a_model:
        checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    with pytest.raises(UnsupportedModel, match=r"an adapter for some/model; .* LLM.load_adapter"):
        load(tmp_path)


def test_a_model_with_code_of_its_own_is_not_asked_about(tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    folder = checkpoint(tmp_path, model_type="of_tomorrow", auto_map=code)
    with pytest.raises(UnsupportedModel, match=r"code of its own, which is not run here"):
        load(folder)


def test_an_architecture_of_tomorrow(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="use a newer version of transformers"):
        load(checkpoint(tmp_path, model_type="of_tomorrow"))


@pytest.mark.parametrize("method", ["hqq", "eetq"])
def test_a_quantiser_whose_package_is_missing(tmp_path: Path, method: str) -> None:
    described = {"quant_method": method, "load_in_4bit": True}
    with pytest.raises(UnsupportedModel, match=r"install what it asks for, or use a dense"):
        load(checkpoint(tmp_path, quantization_config=described))


@pytest.mark.parametrize(
    ("error", "expected", "remedy"),
    [
        (ImportError("fp8 requires a GPU"), UnsupportedModel, "a machine with such a device"),
        (ImportError("pip install quanto"), UnsupportedModel, "install what it asks for"),
        (OSError("We couldn't connect to it"), BadCheckpoint, "check the hub id and the network"),
        (OSError("no file named x"), BadCheckpoint, "check that the checkpoint is complete"),
    ],
    ids=str,
)
def test_each_error_has_its_remedy(
    error: Exception, expected: type[Exception], remedy: str
) -> None:
    def read() -> None:
        raise error

    with pytest.raises(expected, match=rf"cannot read the weights of there: .*{remedy}"):
        reading("weights", "there", read)
