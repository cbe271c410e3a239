"""`vkv bench session`: fresh processes that meet a prompt with and without its session."""

import json
from pathlib import Path

import pytest
from vkv.bench.models import session
from vkv.bench.models.options import SessionOptions
from vkv.bench.models.session import WAYS, run

SMALL = SessionOptions(
    shape="llama-tiny", dtype="float32", threads=1, tokens=600, processes=2, repeats=1
)


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.timeout(240)
def test_a_record_of_every_way(tmp_path: Path) -> None:
    path, (times, memory) = run(SMALL, tmp_path, "vkv bench session")
    results = json.loads(path.read_text())["results"]
    assert list(results["answers"]) == list(WAYS)
    for way in WAYS:
        (answer,) = results["answers"][way]
        assert answer["first_token_s"] > answer.get("open_s", 0) >= 0
        assert answer["num_cached"] == (0 if way == "compute" else 600)
    assert results["saved"]["num_bytes"] > 600 * 4 * 2 * 2 * 16 * 4
    assert len(results["together"]) == 2
    for answer in results["together"]:
        assert answer["rss_bytes"] > 0.9 * results["saved"]["num_bytes"]
        assert answer["pss_bytes"] <= 0.6 * answer["rss_bytes"]
    assert len(times.rows) == 3
    assert len(memory.rows) == 1
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_process_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(session, "_WORKER", broken)
    with pytest.raises(RuntimeError, match="to save ended with 3"):
        run(SMALL, tmp_path, "x")
