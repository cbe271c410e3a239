"""`vkv bench adapters`: that all ways are timed, and that adapters take part."""

import json
from pathlib import Path

import pytest
from vkv.bench.models.adapters import BASE, SEVERAL, AdaptersOptions, run
from vkv.vmem.errors import InvalidConfig


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_every_way_is_timed(tmp_path: Path, targets: str) -> None:
    options = AdaptersOptions(
        shape="llama-tiny",
        adapters=3,
        ranks=(4, 8),
        targets=targets,
        requests=4,
        prompt_len=5,
        output_len=6,
        prefill=12,
        repeats=2,
    )
    path, tables = run(options, tmp_path, "vkv bench adapters")
    assert path.with_suffix(".png").stat().st_size > 1000
    results = json.loads(path.read_text())["results"]
    assert len(results["samples"]) == 2 * 2 * 4
    for load in ("requests", "prompts in one step"):
        for way in (BASE, SEVERAL):
            found = [s for s in results["samples"] if (s["load"], s["way"]) == (load, way)]
            assert len(found) == 2
    assert results["bytes"]["adapters"] > 0
    assert len(tables[0].rows) == 8


def test_ranks_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="ranks"):
        run(AdaptersOptions(shape="llama-tiny", ranks=(0,)), tmp_path, "vkv bench adapters")
