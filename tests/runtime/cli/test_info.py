"""What `vkv info` says of 4-bit weights: the table of kernels, and those of a model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from eight_bits import write_folders
from quantized import quantize_folder
from rich.console import Console
from typer.testing import CliRunner
from vkv import LLM
from vkv.quant.kernels.native import NativeKernel
from vkv.quant.kernels.table import kernel_class, kernel_names
from vkv.runtime.cli import main as cli
from vkv.runtime.cli.info import _model


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of tables that nothing breaks."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that vkv's own kernel is not made for."""
    monkeypatch.setattr(NativeKernel, "accepts", lambda *_: False)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16; keys and values have 8 outputs, which not all kernels take."""
    folder = tmp_path_factory.mktemp("info")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 1}
    zoo.tiny_model("llama", dtype=torch.bfloat16, **sizes).save_pretrained(folder / "dense")
    return quantize_folder(folder / "dense", folder, "gptq", group_size=32)[0]


def rows(shown: str) -> list[list[str]]:
    """The cells of each row of a table."""
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def info(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["info", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def of_model(folder: Path, **options: Any) -> list[list[str]]:
    """What is said of a model's products and output layer."""
    console = Console()
    with LLM(folder, device="cpu", kv_memory="4MiB", **options) as llm, console.capture() as shown:
        console.print(_model(llm))
    return [row for row in rows(shown.get()) if row[0].endswith(("-bit products", "output layer"))]


def table_of_kernels() -> dict[str, list[str]]:
    return {name: cells for name, *cells in rows(info().split("Kernels for 4-bit weights")[1])}


def test_the_table_has_every_kernel_in_order_and_what_it_is_chosen_for() -> None:
    table = table_of_kernels()
    assert tuple(table) == kernel_names()
    for name, (_, here) in table.items():
        why = kernel_class(name).unavailable_reason()
        assert here == (f"no: {why}" if why else "yes")
    chosen_for = table["dequantize"][0]
    assert "cpu float16, 1 row and more; cpu float32, 1 row and more" in chosen_for
    if table["native"][1] == "yes":
        assert table["native"][0] == "cpu bfloat16, 1 row and more"
        assert table["int4pack"][0] == "-"


@pytest.mark.usefixtures("no_native")
def test_the_table_says_which_rows_a_kernel_takes() -> None:
    table = table_of_kernels()
    assert table["native"][0] == "-"
    assert table["int4pack"][0] == "cpu bfloat16, 1 to 12 rows"
    assert "cpu bfloat16, 13 rows and more" in table["dequantize"][0]


@pytest.mark.skipif(NativeKernel.unavailable_reason() is not None, reason="no native kernel here")
def test_of_a_model_it_names_the_kernel(int4: Path) -> None:
    products, head = of_model(int4)
    assert products == ["4-bit products", "native (1 row and more)"]
    assert head == ["output layer", "dense"]


def test_the_command_prints_it(int4: Path) -> None:
    names = [row[0] for row in rows(info(str(int4)))]
    assert names.index("device") < names.index("4-bit products") < names.index("output layer")


@pytest.mark.usefixtures("no_native")
def test_layers_that_get_other_kernels_are_told_apart(int4: Path) -> None:
    fast, slow, head = of_model(int4, pack_weights=False)
    both = "int4pack (1 to 12 rows), dequantize (13 rows and more)"
    assert fast == ["4-bit products", f"{both}: 10 of 14, such as model.layers.0.self_attn.q_proj"]
    only = "dequantize (1 row and more)"
    assert slow == ["4-bit products", f"{only}: 4 of 14, such as model.layers.0.self_attn.k_proj"]
    assert head == ["output layer", "dense"]


@pytest.mark.parametrize("pack_weights", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_layer_may_have_fewer_bits(int4: Path, bits: int, pack_weights: bool) -> None:
    options = {"lm_head_bits": bits, "pack_weights": pack_weights}
    *_, (name, said) = of_model(int4, **options)
    assert name == "output layer"
    assert re.fullmatch(rf"{bits} bits: \w+ \(1 .*\)", said)
    (alone,) = of_model(int4.with_name("gptq-dense"), **options)
    assert alone == [name, said]


def test_of_a_dense_model_it_says_nothing_of_bits(int4: Path) -> None:
    assert of_model(int4.with_name("gptq-dense")) == []


@pytest.mark.skipif(NativeKernel.unavailable_reason() is not None, reason="no native kernel here")
def test_products_in_8_bits_are_called_so(int4: Path, tmp_path: Path) -> None:
    folder, _ = write_folders(int4.with_name("dense"), tmp_path, "w8a8")
    assert of_model(folder)[0] == ["8-bit products", "native (1 row and more)"]
