"""`vkv bench move`: that what it moves is what arrives, and what it says was copied."""

import json
from pathlib import Path

from vkv.bench.kernels.move import WAYS, MoveOptions, run


def test_every_way_moves_every_size_and_pages_copy_nothing(tmp_path: Path) -> None:
    options = MoveOptions(kv_bytes=(1 << 20, 2 << 20), page_bytes=64 << 10, repeats=2)
    path, (table,) = run(options, tmp_path, "vkv bench move")
    assert table.markdown() in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000
    moves = json.loads(path.read_text())["results"]["moves"]
    assert [(m["num_bytes"], m["way"]) for m in moves] == [
        (size, way) for size in options.kv_bytes for way in (*WAYS, "memcpy")
    ]
    for move in moves:
        assert move["num_copied"] == (0 if move["way"] == "pages" else move["num_bytes"])
        assert len(move["stage_s"]) == len(move["read_s"]) == 2
        assert min(move["stage_s"]) > 0
