"""`vkv bench report`: one page from the records of a folder."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from vkv.bench.limits import Limits
from vkv.bench.record import Findings, Record, Table
from vkv.bench.report import newest_records, report
from vkv.runtime.cli import machine
from vkv.runtime.cli import main as cli
from vkv.vmem.errors import InvalidConfig

_LIMITS = Limits(read_bytes_per_s=12.34e9, flops_per_s=567e9, dtype="float32")


def _write(folder: Path, what: str, number: str, *, is_complete: bool = True) -> Path:
    record = Record(
        folder,
        what,
        device=torch.device("cpu"),
        config={"dtype": torch.float32},
        command=f"vkv bench {what}",
    )
    table = Table(title="Some figures", columns=["what", "MiB"], rows=[["virtual", number]])
    found = Findings(results={"samples": [1, 2, 3]}, tables=[table], draw=lambda _: None)
    record.write(found, _LIMITS, is_complete=is_complete)
    return record.path


def _redate(path: Path, date: str, **changes: Any) -> Path:
    """The record as if made on `date`."""
    content = json.loads(path.read_text()) | {"date": date} | changes
    renamed = path.with_name(re.sub(r"\d{4}-\d\d-\d\d", date, path.name))
    path.unlink()
    renamed.write_text(json.dumps(content))
    path.with_suffix(".md").rename(renamed.with_suffix(".md"))
    return renamed


def test_a_record_keeps_what_its_page_needs(tmp_path: Path) -> None:
    content = json.loads(_write(tmp_path, "memory", "1.5").read_text())
    assert content["config"] == {"dtype": "torch.float32"}
    assert Limits.from_record(content["limits"]) == _LIMITS
    assert Table(**content["tables"][0]).rows == [["virtual", "1.5"]]


def test_the_page_has_all_of_each_newest_record(tmp_path: Path) -> None:
    _redate(_write(tmp_path, "memory", "17.25"), "2026-01-02")
    newest = _redate(_write(tmp_path, "memory", "18.5"), "2026-02-01")
    newest.with_suffix(".png").write_bytes(b"a plot")
    _redate(_write(tmp_path, "vmm", "42.0"), "2026-01-03")
    (tmp_path / "notes.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"what": "not ours"}')
    page = report(tmp_path).read_text()
    assert "| virtual | 18.5 |" in page
    assert "17.25" not in page
    assert "| virtual | 42.0 |" in page
    assert page.index("## memory") < page.index("## vmm")
    assert f"![memory]({newest.stem}.png)" in page
    assert page.count("![") == 1
    assert "`vkv bench vmm`" in page
    assert page.count(str(_LIMITS)) == 2
    assert f"torch {torch.__version__}" in page
    for link in re.findall(r"\]\(([^#)]+)\)", page):
        assert (tmp_path / link).exists(), link


def test_links_within_the_page_lead_to_its_headings(tmp_path: Path) -> None:
    _write(tmp_path, "memory-llama-0.5b", "1")
    page = report(tmp_path).read_text()
    (anchor,) = re.findall(r"\]\(#([^)]+)\)", page)
    (heading,) = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    # As GitHub does: lower case, punctuation dropped, spaces to hyphens.
    assert anchor == re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_machines_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "memory", "1")
    monkeypatch.setattr(machine, "_processor", lambda: "Another Processor")
    _write(tmp_path, "memory", "2")
    kept = newest_records(tmp_path)
    assert len(kept) == 2
    assert len({record.machine for record in kept}) == 2
    assert {record.what for record in kept} == {"memory"}


def _on(monkeypatch: pytest.MonkeyPatch, capability: str, model: str | None) -> None:
    """Records are made on a processor of that kind, all sold under one name."""
    monkeypatch.setattr(machine, "_processor", lambda: "One Name")
    monkeypatch.setattr(machine, "_cpu_model", lambda: model)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


_SOLD_AS_ONE = [
    ("AVX2", "family 25 model 1"),
    ("AVX512", "family 25 model 17"),
    ("AVX512", "family 26 model 2"),
]


def test_processors_of_one_name_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (capability, model) in enumerate(_SOLD_AS_ONE):
        _on(monkeypatch, capability, model)
        _redate(_write(tmp_path, "memory", f"1.{number}"), f"2026-01-0{number + 1}")
        _redate(_write(tmp_path, "memory", f"2.{number}"), f"2026-02-0{number + 1}")
    assert len(newest_records(tmp_path)) == 3
    page = report(tmp_path).read_text()
    for number, (capability, model) in enumerate(_SOLD_AS_ONE):
        assert f"| virtual | 2.{number} |" in page
        assert f"| virtual | 1.{number} |" not in page
        assert f"{capability}, {model}, 2026-02-0{number + 1}\n" in page


def test_records_without_a_model_are_told_apart_by_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, capability in enumerate(["AVX2", "AVX512", "AVX512"]):
        _on(monkeypatch, capability, None)
        path = _redate(_write(tmp_path, "memory", f"{number}.5"), f"2026-01-0{number + 1}")
        assert "cpu_model" not in json.loads(path.read_text())["hardware"]
    page = report(tmp_path).read_text()
    assert [f"| virtual | {number}.5 |" in page for number in range(3)] == [True, False, True]


def test_a_record_of_another_processor_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    for number, (capability, model) in enumerate(_SOLD_AS_ONE * 2):
        _on(monkeypatch, capability, model)
        names.append(_write(tmp_path, "memory", f"{number}.5").name.split("_")[1])
    cores = f"one-name-{len(os.sched_getaffinity(0))}c"
    assert names[:3] == [cores, f"{cores}-avx512", f"{cores}-avx512-family-26-model-2"]
    assert names[3:] == names[:3]  # one of the same processor is
    page = report(tmp_path).read_text()
    assert all(f"| virtual | {number}.5 |" in page for number in (3, 4, 5))
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert len(set(links)) == 3


def test_a_gpu_is_a_machine_whatever_processor_is_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for date, (capability, model) in zip(("2026-01-01", "2026-01-02"), _SOLD_AS_ONE, strict=False):
        _on(monkeypatch, capability, model)
        path = _write(tmp_path, "memory", "1")
        machine = json.loads(path.read_text())["hardware"] | {"gpu": "NVIDIA H100"}
        _redate(path, date, hardware=machine)
    (record,) = newest_records(tmp_path)
    assert record.heading == "memory, NVIDIA H100, 2026-01-02"


def test_the_processor_of_this_machine_is_numbered_as_linux_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = Path("/proc/cpuinfo").read_text()
    numbers = re.findall(r"^(?:cpu family|model)\s*: (\d+)$", info, flags=re.MULTILINE)
    found = machine.hardware(torch.device("cpu"))
    if numbers:  # not on Arm
        assert found["cpu_model"] == f"family {numbers[0]} model {numbers[1]}"
    else:
        assert "cpu_model" not in found
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"CPU part": "0xd40"})
    assert "cpu_model" not in machine.hardware(torch.device("cpu"))


def test_notes_stand_under_their_table() -> None:
    table = Table(title="Some", columns=["what"], rows=[["row"]], notes=["Left out: a.", "And b."])
    assert table.markdown().endswith("| row |\n\nLeft out: a.\n\nAnd b.\n")


def test_tables_of_older_records_come_from_the_page_beside_them(tmp_path: Path) -> None:
    path = _write(tmp_path, "memory", "3.75")
    content = json.loads(path.read_text())
    del content["tables"], content["limits"]
    path.write_text(json.dumps(content))
    page = report(tmp_path).read_text()
    assert page.count("| virtual | 3.75 |") == 1
    assert page.count("### Some figures") == 1
    path.with_suffix(".md").unlink()
    assert "No tables are kept" in report(tmp_path).read_text()


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    _write(tmp_path, "memory", "1")
    _write(tmp_path, "vmm", "2")
    first = report(tmp_path).read_text()
    assert report(tmp_path).read_text() == first
    shown = CliRunner().invoke(cli.app, ["bench", "report", "--folder", str(tmp_path)])
    assert shown.exit_code == 0
    assert (tmp_path / "REPORT.md").read_text() == first


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no benchmark records"):
        report(tmp_path)


def test_the_records_of_this_repository_make_a_page(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "records"
    for path in folder.glob("*_*"):
        shutil.copy(path, tmp_path)
    page = report(tmp_path).read_text()
    assert page.count("\n## ") == len(newest_records(folder)) > 0
    assert "### KV memory" in page
