"""`vkv bench cache`: fresh processes, and what they answer."""

import json
from pathlib import Path

import pytest
from vkv.bench.models import cache
from vkv.bench.models.cache import CacheOptions, run
from vkv.vmem.errors import InvalidConfig


@pytest.mark.usefixtures("quick_processes")
def test_a_record_of_every_kind(tmp_path: Path) -> None:
    options = CacheOptions(
        shape="llama-tiny",
        dtype="float32",
        threads=1,
        problems=((1, 40), (2, 3000)),
        steps=5,
        max_prefill=100,
        repeats=1,
    )
    path, (times, memory) = run(options, tmp_path, "vkv bench cache")
    short, long = json.loads(path.read_text())["results"]["cells"]
    assert list(long["runs"]) == ["virtual", "virtual-vkv", "dynamic", "static"]
    for kind in long["runs"]:
        (answer,) = long["runs"][kind]
        assert len(answer["token_s"]) == 5
        assert min(answer["token_s"]) > 0
        assert "prefill_s" not in answer
        assert short["runs"][kind][0]["prefill_s"] > 0
        # Filled and no less: 6,000 tokens of 1 KiB.
        assert answer["peak_bytes"] > 0.9 * 6000 * long["token_bytes"]
    assert times.rows[1][0] == memory.rows[1][0] == "2 x 3,000"
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such cache')")
    monkeypatch.setattr(cache, "_WORKER", broken)
    options = CacheOptions(shape="llama-tiny", problems=((1, 8),), repeats=1)
    with pytest.raises(RuntimeError, match="virtual cache ended: no such cache"):
        run(options, tmp_path, "x")


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="quantised: use some of virtual"):
        run(CacheOptions(kinds=("quantised",)), tmp_path, "x")
