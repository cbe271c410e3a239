"""The one command for a machine with a GPU: that one step's end is not another's."""

import argparse
import ast
import importlib
import importlib.util
import json
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner
from vkv.bench.cli import bench
from vkv.bench.kernels import linear
from vkv.bench.models import throughput

ROOT = Path(__file__).parents[2]


def _script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "benchmarks" / "gpu" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu_plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _script("gpu_plan", monkeypatch)


@pytest.fixture
def gpu_check(gpu_plan: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _script("gpu_check", monkeypatch)


def make_check(gpu_check: ModuleType, folder: Path, budget: float = 100.0):
    options = argparse.Namespace(device="cpu", budget=budget, out=folder, kit=folder, pack=True)
    records, site = folder / "records", folder / "site"
    records.mkdir()
    site.mkdir()
    return gpu_check.Check(options, records, site, time.monotonic() + budget)


def test_a_failing_step_stops_no_other(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = make_check(gpu_check, tmp_path)
    check.run(gpu_check.Step("bad", ("-c", "print('why'); raise SystemExit(3)"), 20))
    check.run(gpu_check.Step("slow", ("-c", "import time; time.sleep(60)"), 0.5))
    check.run(gpu_check.Step("good", ("-c", "open('x.json', 'w').write('{}')"), 20))
    check.run(gpu_check.Step("late", ("-c", ""), 20, least_s=200))
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [step["status"] for step in steps] == ["failed", "timed out", "passed", "skipped"]
    assert "exit 3: why" in steps[0]["detail"]
    assert (tmp_path / "records" / "x.json").exists()
    assert "| late | skipped |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "records.tgz").stat().st_size > 100


def test_failed_tests_are_counted_and_run_again_alone(
    gpu_check: ModuleType, gpu_plan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "broken = []\n"
        "class TestThem:\n"
        "    def test_bad(self): broken.append(1); assert not broken\n"
        "def test_fallout(): assert not broken\n"
        "def test_good(): pass\n"
    )
    check = make_check(gpu_check, tmp_path)
    check.run(gpu_plan._pytest("some tests", "cpu", ["test_it.py"], 60))
    found = [(outcome.name, outcome.status) for outcome in check.outcomes]
    assert found == [
        ("some tests", "failed"),
        ("alone: test_it.py::TestThem::test_bad", "failed"),
        ("alone: test_it.py::test_fallout", "passed"),
    ]
    assert check.outcomes[0].detail.startswith("1 passed, 2 failed, 0 skipped")


@pytest.mark.parametrize(("code", "is_kept"), [("", True), ("raise SystemExit('no')", False)])
def test_what_fails_its_trial_is_left_out_of_later_steps(
    gpu_check: ModuleType, tmp_path: Path, code: str, is_kept: bool
) -> None:
    """And only from the kit's own folder."""
    check = make_check(gpu_check, tmp_path)
    (check.site / "extra").mkdir()
    check.run(gpu_check.Step("trial", ("-c", code), 20, tries="extra"))
    assert (check.site / "extra").exists() == is_kept
    assert ("go on without extra" in check.outcomes[0].detail) != is_kept


def test_without_a_kit_it_says_how_to_get_one(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = make_check(gpu_check, tmp_path)
    check.install()
    assert check.outcomes[0].status == "failed"
    assert "make gpu-kit" in check.outcomes[0].detail


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_compares_each_library_with_itself(gpu_plan: ModuleType, device: str) -> None:
    steps = gpu_plan.plan(device, ["torch_flash", "flashinfer", "paged_flashinfer", "sdpa"])
    assert steps[1].is_test
    attention = [" ".join(step.command) for step in steps if "attention" in step.name]
    assert len(attention) == 4
    if device == "cuda":
        for command in attention:
            assert "--contiguous torch_flash,flashinfer --paged paged_flashinfer" in command


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_s_benchmarks_are_commands_that_exist(
    gpu_plan: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their options are parsed and their names looked up; nothing is measured."""
    asked = []
    for module in (linear, throughput):
        monkeypatch.setattr(module, "run", lambda options, *_: asked.append(options) or (None, []))
    monkeypatch.setattr("vkv.bench.cli.show", lambda *_: None)
    monkeypatch.setattr("vkv.runtime.engine.config.resolve_device", torch.device)
    for step in gpu_plan.plan(device, []):
        if step.name.startswith(("bench linear", "bench throughput")):
            result = CliRunner().invoke(bench, step.command[3:])
            assert result.exit_code == 0, result.output
    dense, plain, small, padded = asked
    assert (plain.device.type, dense.device.type) == (device, device)
    assert "transformers-continuous" in dense.systems
    assert (dense.quant, small.quant) == (None, "gptq")
    assert "transformers" in padded.systems
    # No record is written over another.
    assert len({one.label or one.quant for one in (dense, small, padded)}) == 3
    if device == "cuda":
        assert "8192x8192" in plain.layers
        assert "ragged-64" in {cell.name for cell in padded.cells} & {
            cell.name for cell in dense.cells
        }
        assert [cell.name for cell in small.cells] == ["decode-1", "decode-16"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_s_tests_are_files_that_exist(gpu_plan: ModuleType, device: str) -> None:
    steps = [step for step in gpu_plan.plan(device, []) if step.is_test]
    paths = [word.split("=")[-1] for step in steps for word in step.command if "tests" in word]
    paths = [path for path in paths if not path.endswith(".xml")]
    assert len(paths) >= 4
    assert all((ROOT / path).exists() for path in paths), paths


def test_the_plan_s_own_programs_import_what_there_is(gpu_plan: ModuleType) -> None:
    for program in (gpu_plan._FACTS, gpu_plan._HUMMING):
        nodes = [n for n in ast.walk(ast.parse(program)) if isinstance(n, ast.ImportFrom)]
        assert nodes
        for node in nodes:
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_a_kit_is_stale_if_any_folder_of_the_wheel_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packaged = _script("gpu_kit", monkeypatch).PACKAGED
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        assert any(Path(folder).is_relative_to(part) for part in packaged), folder
