"""`vkv bench profile`: that its times are of the kernels of a step, and of the whole of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from vkv.bench.models.profile import BatchProfile, ProfileOptions, run
from vkv.runtime.cpu_kernels import kernels as native_kernels
from vkv.vmem.errors import InvalidConfig

pytestmark = pytest.mark.skipif(
    not native_kernels.available(torch.float32), reason="no C compiler, no built kernels"
)


def _record(options: ProfileOptions, folder: Path) -> dict[str, Any]:
    path, tables = run(options, folder, "vkv bench profile")
    assert path.with_suffix(".png").stat().st_size > 1000
    shown = path.with_suffix(".md").read_text()
    assert all(table.markdown() in shown for table in tables)
    return json.loads(path.read_text())


@pytest.mark.parametrize("quant", [None, "gptq"])
def test_every_kernel_of_a_step_is_timed(tmp_path: Path, quant: str | None) -> None:
    options = ProfileOptions(
        shape="llama-tiny", quant=quant, batches=(1, 3), context=300, steps=3, dtype="bfloat16"
    )
    record = _record(options, tmp_path)
    profiles = record["results"]["profiles"]
    assert [one["batch"] for one in profiles] == [1, 3]
    for one in profiles:
        assert len(one["step_s"]) == 3
        assert all(len(times) == 3 for times in one["kernel_s"].values())
        kernels = {"attend", "store", "rms_norm", "rotate", "add"}
        assert kernels <= one["kernel_s"].keys()
        if quant and "int4_multiply" in one["kernel_s"]:
            kernels.add("int4_multiply")
        assert all(min(one["kernel_s"][name]) > 0 for name in kernels)


def test_the_rest_is_of_each_step() -> None:
    one = BatchProfile(
        batch=2,
        step_s=[0.010, 0.012, 0.030],
        kernel_s={
            "step": [0.010, 0.013, 0.012],
            "linear": [0.006, 0.008, 0.007],
            "attend": [0.001, 0.001, 0.002],
        },
    )
    parts = one.parts_s
    assert parts["linear layers"] == 0.007
    assert parts["attention"] == 0.001
    assert parts["the engine, sampling, Python"] == pytest.approx(0.003)
    assert one.median_s == 0.012


def test_a_model_that_is_not_recorded_is_refused(tmp_path: Path) -> None:
    zoo.tiny_model("lfm2").save_pretrained(tmp_path / "hybrid")
    options = ProfileOptions(
        model=str(tmp_path / "hybrid"), dtype="float32", batches=(1,), context=4, steps=1
    )
    with pytest.raises(InvalidConfig, match="not recorded"):
        run(options, tmp_path, "vkv bench profile")


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"steps": 0}])
def test_options_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="each must be at least 1"):
        run(ProfileOptions(shape="llama-tiny", **wrong), tmp_path, "vkv bench profile")


def test_an_own_embedding_multiplies_nothing(tmp_path: Path) -> None:
    """Of llama-tiny, whose output layer is not tied."""
    options = ProfileOptions(shape="llama-tiny", dtype="float32", batches=(1,), context=4, steps=1)
    results = _record(options, tmp_path)["results"]
    linears = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 512 * 64
    norms = 4 * 2 * 64 + 64
    assert results["flops_per_token"] == 2 * (linears + norms)
    assert results["weight_bytes"] == 4 * linears
