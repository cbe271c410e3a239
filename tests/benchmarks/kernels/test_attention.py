"""`vkv bench attention`: that all contestants solve the same problem, and what is counted."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from vkv.attention_backends.native import NativeBackend
from vkv.attention_backends.paged_sdpa import PagedSdpaBackend
from vkv.attention_backends.sdpa import SdpaBackend
from vkv.bench.kernels import attention
from vkv.bench.kernels.attention import AttentionOptions, run
from vkv.bench.kernels.attention_layouts import HeadMajor, slot_layouts
from vkv.bench.kernels.attention_shapes import Shape, default_shapes, shapes_of_heads
from vkv.bench.peers.peer import WORKERS
from vkv.runtime.cli import main as cli
from vkv.runtime.cli.options import Options
from vkv.vmem.errors import InvalidConfig

SHAPES = (
    Shape(batch=3, context=70, head_dim=16),
    Shape(batch=1, context=100, queries=33, num_heads=4, num_kv_heads=4, head_dim=16),
)


def test_a_record_of_every_contestant(tmp_path: Path) -> None:
    options = AttentionOptions(shapes=SHAPES, repeats=2, max_bytes=1 << 16)
    path, (table,) = run(options, tmp_path, "vkv bench attention")
    cells = json.loads(path.read_text())["results"]["cells"]
    assert [cell["layers"] for cell in cells] == [
        (1 << 16) // shape.kv_bytes(torch.bfloat16) for shape in SHAPES
    ]
    for cell in cells:
        assert [name.split(",")[0] for name in cell["layer_s"]] == [
            "native", "sdpa", "native", "native", "paged_sdpa",
        ]  # fmt: skip
        assert all(len(times) == 2 and min(times) > 0 for times in cell["layer_s"].values())
    assert [row[0] for row in table.rows] == [
        "decode, 3 x 70, 16:4x16",
        "chunk of 33, 1 x 100, 4:4x16",
    ]
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_contestant_that_computes_something_else_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SdpaBackend.forward

    def forward(self: SdpaBackend, *args: object, **options: object) -> torch.Tensor:
        return honest(self, *args, **options).mul_(1.5)  # type: ignore[arg-type]

    monkeypatch.setattr(SdpaBackend, "forward", forward)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run(AttentionOptions(shapes=SHAPES[:1], repeats=1), tmp_path, "x")


_PEER = """
import sys
sys.path.insert(0, {workers!r})
from protocol import answer_all


def load(options):
    assert options == {{"threads": {threads}, "dtype": "bfloat16"}}

    def answer(request):
        if "shape" in request:
            assert request["layers"] > 0
            return {{}}
        return {{"seconds": 0.5, "result": [{value}] * 2 if request.get("result") else []}}

    return answer


answer_all(load)
"""


@pytest.mark.parametrize("value", [0.0, 99.0], ids=["agrees", "differs"])
def test_a_peer_takes_its_turns_and_must_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def of_zeros(*args: object, out: torch.Tensor, **_: object) -> torch.Tensor:
        return out.zero_()

    for backend in (SdpaBackend, NativeBackend, PagedSdpaBackend):
        monkeypatch.setattr(backend, "forward", of_zeros)
    script = tmp_path / "peer.py"
    script.write_text(
        _PEER.format(workers=str(WORKERS), value=value, threads=torch.get_num_threads())
    )
    monkeypatch.setitem(attention.PEERS, "vllm", str(script))
    peers = {"vllm": sys.executable}
    options = AttentionOptions(shapes=SHAPES[:1], repeats=2, max_bytes=1 << 16, peers=peers)
    if value:
        with pytest.raises(AssertionError, match="not close"):
            run(options, tmp_path, "x")
        return
    path, (table,) = run(options, tmp_path, "x")
    (cell,) = json.loads(path.read_text())["results"]["cells"]
    assert cell["layer_s"]["vllm, its kernel"] == [0.5 / cell["layers"]] * 2
    assert table.columns[-1] == "vllm, its kernel: times as long"


def test_what_is_counted() -> None:
    shape = Shape(batch=2, context=10, queries=3, num_heads=4, num_kv_heads=2, head_dim=8)
    assert shape.kv_bytes(torch.bfloat16) == 2 * 2 * 10 * 2 * 8 * 2
    # The three queries see 8, 9 and 10 keys.
    assert shape.flops == 2 * 4 * (8 + 9 + 10) * 8 * 2 * 2


def test_what_is_too_large_is_left_out(tmp_path: Path) -> None:
    shapes = (*SHAPES, Shape(batch=1, context=4096))
    options = AttentionOptions(shapes=shapes, repeats=1, max_bytes=1 << 16)
    path, (table,) = run(options, tmp_path, "x")
    assert len(table.rows) == 2
    (left_out,) = json.loads(path.read_text())["results"]["left_out"]
    assert Shape(**left_out["shape"]) == shapes[-1]
    assert left_out["why"] == "keys and values take 4 MiB a layer, above --max-memory (0.0625 MiB)"
    note = f"Left out: decode, 1 x 4,096, 16:4x64: {left_out['why']}."
    assert table.notes == [note]
    assert f"\n\n{note}\n" in path.with_suffix(".md").read_text()


def test_what_is_left_out_is_printed(tmp_path: Path) -> None:
    shown = _bench("--max-memory", "64KiB", "--contexts", "100,4096", out=tmp_path)
    assert "Left out: decode, 1 x 4,096, 4:2x16: keys and values take 0.5 MiB a layer" in shown
    assert "decode, 1 x 100" not in shown.partition("Left out")[2]


def test_nothing_is_left_out_of_what_fits(tmp_path: Path) -> None:
    assert "Left out" not in _bench("--contexts", "100", out=tmp_path)


def _bench(*arguments: str, out: Path) -> str:
    """What `vkv bench attention` prints for small heads and one short pass, in one line."""
    small = ["--heads", "4:2x16", "--batches", "1", "--chunk", "0", "--repeats", "1"]
    done = CliRunner().invoke(
        cli.app, ["bench", "attention", *small, *arguments, "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def _layouts_measured(folder: Path) -> list[list[str]]:
    """Backend and layout of each contestant over slots."""
    (path,) = folder.glob("*.json")
    (cell,) = json.loads(path.read_text())["results"]["cells"]
    names = (name.split(", ", 1) for name in cell["layer_s"])
    return [name for name in names if len(name) == 2]


def test_layouts_by_default(tmp_path: Path) -> None:
    _bench("--contexts", "100", out=tmp_path)
    assert _layouts_measured(tmp_path) == [
        ["native", "g=1"], ["sdpa", "g=1"], ["native", "g=1, split K/V"], ["native", "g=all"],
    ]  # fmt: skip


def test_layouts_by_layers_per_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int | None, bool]] = []

    class Layout(attention.KVLayout):
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append((self.layers_per_range, self.split_kv))

    monkeypatch.setattr(attention, "KVLayout", Layout)
    _bench("--contexts", "100", "--layers-per-range", "2,1, 4-split,all,02", out=tmp_path)
    assert made == [(2, False), (1, False), (4, True), (None, False)]
    assert _layouts_measured(tmp_path) == [
        ["native", "g=2"],
        ["sdpa", "g=2"],
        ["native", "g=1"],
        ["native", "g=4, split K/V"],
        ["native", "g=all"],
    ]


def test_heads_side_by_side_or_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench itself sees that both come to the same results."""
    strides: list[tuple[int, ...]] = []
    layer = HeadMajor.layer

    def seen(self: HeadMajor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = layer(self, index)
        strides.append(keys.stride())
        return keys, values

    monkeypatch.setattr(HeadMajor, "layer", seen)
    _bench("--contexts", "100", "--layers-per-range", "1,head-major", out=tmp_path)
    assert _layouts_measured(tmp_path)[-1] == ["native", "head-major"]
    for _, token, head, _ in strides:
        assert token < head


@pytest.mark.parametrize("listed", ["0", "two", "1-split-split", "-1", ","])
def test_layouts_that_there_are_not(listed: str, tmp_path: Path) -> None:
    arguments = ["bench", "attention", f"--layers-per-range={listed}", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "such as 1,1-split,all" in " ".join(done.output.split())


def test_help_names_layouts_and_heads() -> None:
    options = Options(AttentionOptions).flags
    assert options["layouts"].names == ("--layers-per-range",)
    assert options["layouts"].default == "1,1-split,all"
    assert "1,2,4,all" in options["layouts"].help
    assert slot_layouts(["1", "1-split", "all"]) == AttentionOptions(shapes=()).layouts
    for shape in default_shapes((1,), (1024,), 512):
        heads = f"{shape.num_heads}:{shape.num_kv_heads}x{shape.head_dim}"
        assert heads in options["heads"].help


def test_default_shapes() -> None:
    shapes = default_shapes((1, 8), (1024, 8192), 512)
    assert len(shapes) == 4 + 3 + 2
    assert {shape.num_heads // shape.num_kv_heads for shape in shapes} == {1, 4, 8}


def test_shapes_of_one_model() -> None:
    shapes = shapes_of_heads("32:8x128", (1, 64), (1024, 8192), 4096)
    assert [str(shape) for shape in shapes] == [
        "decode, 1 x 1,024, 32:8x128",
        "decode, 64 x 1,024, 32:8x128",
        "decode, 1 x 8,192, 32:8x128",
        "decode, 64 x 8,192, 32:8x128",
        "chunk of 4096, 1 x 8,192, 32:8x128",
    ]
    assert len(shapes_of_heads("32:8x128", (1,), (1024,), 0)) == 1
    for heads in ("32x128", "32:0x128", "32:7x128"):
        with pytest.raises(InvalidConfig):
            shapes_of_heads(heads, (1,), (1024,), 0)


def test_a_paged_backend_gets_blocks_of_the_size_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(PagedSdpaBackend.capabilities, block_multiple=48)
    monkeypatch.setattr(PagedSdpaBackend, "capabilities", wide)
    blocks = []
    honest = PagedSdpaBackend.check_cache

    def check_cache(self: PagedSdpaBackend, keys: torch.Tensor, values: torch.Tensor) -> None:
        blocks.append(keys.shape[1])
        honest(self, keys, values)

    monkeypatch.setattr(PagedSdpaBackend, "check_cache", check_cache)
    options = AttentionOptions(
        shapes=SHAPES[:1], repeats=1, contiguous=("sdpa",), paged=("paged_sdpa",), label="wide"
    )
    path, _ = run(options, tmp_path, "x")
    assert blocks == [48]
    assert path.name.startswith("attention-wide_")
