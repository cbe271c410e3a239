"""The one command for a machine with a GPU: that one step's end is not another's."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import subprocess
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


def make_check(gpu_check: ModuleType, folder: Path, budget: float = 100.0, **said: object):
    options = argparse.Namespace(
        **{
            "device": "cpu",
            "budget": budget,
            "out": folder,
            "kit": folder,
            "copy": folder / "copy",
            "only": None,
            "again": False,
            **said,
        }
    )
    check = gpu_check.Check(options, time.monotonic() + budget)
    check.site.mkdir(exist_ok=True)
    return check


def test_a_failing_step_stops_no_other(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = make_check(gpu_check, tmp_path)
    check.run(gpu_check.Step("bad", ("-c", "print('why'); raise SystemExit(3)"), 20))
    check.run(gpu_check.Step("slow", ("-c", "import time; time.sleep(60)"), 0.5))
    check.run(gpu_check.Step("good", ("-c", "open('x.json', 'w').write('{}')"), 20))
    check.run(gpu_check.Step("late", ("-c", ""), 20, least_s=200))
    steps = json.loads((tmp_path / "copy" / "state.json").read_text())["steps"]
    assert [step["status"] for step in steps] == ["failed", "timed out", "passed", "skipped"]
    assert "exit 3: why" in steps[0]["detail"]
    assert (tmp_path / "records" / "x.json").exists()
    assert "| late | skipped |" in (tmp_path / "copy" / "summary.md").read_text()
    assert (tmp_path / "copy" / "records.tgz").stat().st_size > 100


def test_where_nothing_can_pass_a_call_ends_and_the_next_goes_on(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        gpu_check.Step("facts", ("-c", "raise SystemExit('no driver')"), 20, is_first=True),
        gpu_check.Step("other", ("-c", ""), 20),
    ]
    monkeypatch.setattr(gpu_check, "plan", lambda *_: steps)
    monkeypatch.setattr(gpu_check.Check, "backends", lambda _: [])
    words = ["gpu_check.py", "--device", "cpu", "--kit", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    for expected in (["failed"], ["failed", "passed"]):
        assert gpu_check.main() == 1
        said = json.loads((tmp_path / "state.json").read_text())["steps"]
        assert [step["status"] for step in said if step["name"] != "install"] == expected


def test_what_a_step_left_on_the_disk_goes_with_it(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = make_check(gpu_check, tmp_path)
    leaves = "import tempfile; print(tempfile.mkdtemp()); raise SystemExit(3)"
    step = gpu_check.Step("bad", ("-c", leaves), 20)
    check.run(step)
    assert "exit 3" in check.outcomes["bad"].detail
    left = Path(check._log(step).read_text().strip())
    assert left.is_absolute()
    assert not left.exists()


def test_a_second_call_goes_on_where_the_first_stopped(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    steps = [gpu_check.Step(name, ("-c", ""), 20) for name in ("a", "b", "c", "d")]
    first = make_check(gpu_check, tmp_path)
    first.run(steps[0])
    first.run(gpu_check.Step("b", ("-c", "raise SystemExit(1)"), 20))
    first.outcomes["c"] = gpu_check.Outcome("c", gpu_check._CUT_SHORT)  # the machine went
    first.summarise()
    second = make_check(gpu_check, tmp_path)
    assert [step.name for step in second.order(steps)] == ["d", "c"]
    for step in second.order(steps):
        second.run(step)
    third = make_check(gpu_check, tmp_path)
    assert not third.order(steps)
    assert third.used_s >= second.used_s > 0
    assert [o.status for o in third.outcomes.values()] == ["passed", "failed", "passed", "passed"]
    assert len(make_check(gpu_check, tmp_path, again=True).order(steps)) == 4
    assert [s.name for s in make_check(gpu_check, tmp_path, only=["b"]).order(steps)] == ["b"]
    assert not make_check(gpu_check, tmp_path, device="cuda").outcomes  # a rehearsal proves nothing


def test_a_step_that_the_budget_cuts_short_is_no_failure(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    check = make_check(gpu_check, tmp_path, gpu_check._RESERVE_S + 1)
    check.run(gpu_check.Step("long", ("-c", "import time; time.sleep(30)"), 20, least_s=0.1))
    assert [o.status for o in check.outcomes.values()] == ["skipped"]


def test_what_is_shown_fits_a_screen(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = make_check(gpu_check, tmp_path)
    for number in range(40):
        name = f"alone: tests/runtime/engine/test_engine_cuda.py::test_of_a_long_name_{number}"
        check.outcomes[name] = gpu_check.Outcome(name, "failed", 60.0, "why | " * 400)
    assert 2_000 < len(check.shown()) + 150 * 42 <= 12_000
    assert "…" in check._table(300)


def test_after_a_test_that_hangs_the_others_run(
    gpu_check: ModuleType, gpu_plan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_plan, "MOST_OF_A_TEST_S", 1)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('word', ['g=1, split', 'g=all'])\n"
        "def test_first(word): pass\n"
        "def test_begins(): pass\n"
        "def test_bad(): assert not 'bad'\n"
        "def test_hangs(): time.sleep(60)\n"
        "def test_begins_another(): pass\n"
        "def test_last(): pass\n"
    )
    check = make_check(gpu_check, tmp_path)
    check.run(gpu_plan.pytest_step("some", ["tests/test_it.py"], 30))
    found = [(outcome.name, outcome.status) for outcome in check.outcomes.values()]
    assert found == [("some", "failed"), ("after test_hangs: some", "failed")]
    # What passed is not run again; what failed is, for its traceback, which came to nobody.
    detail = check.outcomes["after test_hangs: some"].detail
    assert detail.startswith("3 passed, 1 failed, 0 skipped")
    assert "not 'bad'" in detail


def test_what_may_have_failed_by_another_s_error_is_run_again_alone(
    gpu_check: ModuleType, gpu_plan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "broken = []\n"
        "def check():\n"
        "    if broken: raise RuntimeError('CUDA error: an illegal memory access')\n"
        "class TestThem:\n"
        "    def test_bad(self): broken.append(1); check()\n"
        "def test_fallout(): check()\n"
        "def test_wrong(): assert not 'anything to do with it'\n"
        "def test_good(): pass\n"
    )
    check = make_check(gpu_check, tmp_path)
    check.run(gpu_plan.pytest_step("some tests", ["test_it.py"], 60))
    found = [(outcome.name, outcome.status) for outcome in check.outcomes.values()]
    assert found == [
        ("some tests", "failed"),
        ("alone: test_it.py::TestThem::test_bad", "failed"),
        ("alone: test_it.py::test_fallout", "passed"),
    ]
    assert check.outcomes["some tests"].detail.startswith("1 passed, 3 failed, 0 skipped")


@pytest.mark.parametrize(("code", "is_kept"), [("", True), ("raise SystemExit('no')", False)])
def test_what_fails_its_trial_is_left_out_of_later_steps(
    gpu_check: ModuleType, tmp_path: Path, code: str, is_kept: bool
) -> None:
    """And only from the kit's own folder."""
    check = make_check(gpu_check, tmp_path)
    (check.site / "extra").mkdir()
    check.run(gpu_check.Step("trial", ("-c", code), 20, tries="extra"))
    assert (check.site / "extra").exists() == is_kept
    assert ("go on without extra" in check.outcomes["trial"].detail) != is_kept


def test_without_a_kit_it_says_how_to_get_one(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = make_check(gpu_check, tmp_path)
    check.install()
    assert check.outcomes["install"].status == "failed"
    assert "make gpu-kit" in check.outcomes["install"].detail


def test_what_takes_too_long_to_ask_or_install_ends_nothing(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh machine reads PyTorch from a disk that it has not read before."""
    (tmp_path / "kit.json").write_text('{"always": ["b"]}')
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "b-1-py3-none-any.whl").touch()

    def slow(command: list, **options: float) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    check = make_check(gpu_check, tmp_path)
    monkeypatch.setattr(gpu_check.subprocess, "run", slow)
    check.install()
    assert check.outcomes["install"].status == "failed"
    assert "b-1-py3-none-any.whl: " in check.outcomes["install"].detail
    assert check.backends() == []


def test_wheels_are_installed_at_once_and_one_by_one_where_that_fails(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kit.json").write_text('{"always": []}')
    (tmp_path / "wheels").mkdir()
    for name in ("one", "pytest", "two"):
        (tmp_path / "wheels" / f"{name}-1-py3-none-any.whl").touch()
    for bad in (None, "two-1-py3-none-any.whl"):
        asked = []

        def run(
            command: list, *, bad: str | None = bad, asked: list = asked, **_: object
        ) -> object:
            asked.append([one.name for one in command if isinstance(one, Path)][1:])
            return argparse.Namespace(returncode=bad in asked[-1], stderr="why")

        check = make_check(gpu_check, tmp_path)
        monkeypatch.setattr(gpu_check.subprocess, "run", run)
        check.install()
        one, two = "one-1-py3-none-any.whl", "two-1-py3-none-any.whl"  # pytest is there already
        assert asked == [[one, two], *([[one], [two]] if bad else [])]
        assert check.outcomes["install"].status == ("failed" if bad else "passed")
        (tmp_path / "site" / "kit.json").unlink(missing_ok=True)


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
    monkeypatch.setattr("vkv.runtime.engine.devices.resolve_device", torch.device)
    for step in gpu_plan.plan(device, []):
        if step.name.startswith(("bench linear", "bench throughput")):
            result = CliRunner().invoke(bench, step.command[3:])
            assert result.exit_code == 0, result.output
    dense, ragged, plain, small, padded = asked
    assert (plain.device.type, dense.device.type) == (device, device)
    assert "vkv-paged" in dense.systems
    assert "transformers-continuous" in ragged.systems
    assert (dense.quant, small.quant) == (None, "gptq")
    assert "transformers" in padded.systems
    # No record is written over another.
    assert len({one.label or one.quant for one in (dense, ragged, small, padded)}) == 4
    if device == "cuda":
        assert "8192x8192" in plain.layers
        assert "ragged-64" in {cell.name for cell in padded.cells} & {
            cell.name for cell in ragged.cells
        }
        assert [cell.name for cell in small.cells] == ["decode-1", "decode-16"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_s_tests_are_files_that_exist(gpu_plan: ModuleType, device: str) -> None:
    steps = [step for step in gpu_plan.plan(device, []) if step.is_test]
    paths = [word.split("=")[-1] for step in steps for word in step.command if "tests" in word]
    paths = [path for path in paths if not path.endswith(".xml")]
    assert len(paths) >= 7
    assert all((ROOT / path).exists() for path in paths), paths


def test_every_test_for_a_gpu_is_in_a_step(gpu_plan: ModuleType) -> None:
    paths = {w for words in gpu_plan._TESTS.values() for w in words if w.startswith("tests/")}
    marked = [
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu|vmem_driver", path.read_text()) and path != Path(__file__)
    ]
    assert len(marked) >= 10
    for path in marked:
        assert any(path.is_relative_to(covered) for covered in paths), path
    limits = [step.limit_s for step in gpu_plan.plan("cuda", [])]
    assert max(limits) <= 150  # so that one that hangs costs a fifth of a call, at most


def _imported(path: Path) -> set[str]:
    """What a module imports when it is imported itself, by the first part of the name."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            nodes += ast.iter_child_nodes(node)
    return found


def test_the_steps_tests_import_what_that_machine_has(
    gpu_plan: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file that cannot be imported fails the step, though it may have no test for a GPU."""
    kit = _script("gpu_kit", monkeypatch)
    brought = {kit._name(wanted).replace("-", "_") for wanted in (*kit.ALWAYS, *kit.IF_MISSING)}
    there = {"vkv", "torch", "numpy", "transformers", "tokenizers", "safetensors"}
    support = {path.stem: path for path in (ROOT / "tests" / "support").glob("*.py")}
    support["standin"] = ROOT / "tests" / "support" / "standin" / "__init__.py"
    named = [ROOT / w for words in gpu_plan._TESTS.values() for w in words if w[:6] == "tests/"]
    paths = [path for at in named for path in ([at] if at.suffix else at.rglob("test_*.py"))]
    paths.append(ROOT / "tests" / "conftest.py")
    seen: set[Path] = set()
    while paths:
        path = paths.pop()
        if path in seen:
            continue
        seen.add(path)
        names = _imported(path) - sys.stdlib_module_names - brought - there
        paths += [support[name] for name in names & support.keys()]
        assert names <= support.keys(), (path.relative_to(ROOT), names - support.keys())
    assert len(seen) > 30


def test_every_step_is_told_what_to_expect(gpu_plan: ModuleType) -> None:
    table = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    for step in gpu_plan.plan("cuda", []):
        assert f"| {step.name.removeprefix('bench ')} |" in table.replace("`", ""), step.name


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
