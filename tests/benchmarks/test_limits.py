"""The limits that records quote: medians of measurements across a run."""

import json
from dataclasses import asdict

import pytest
import torch
from vkv.bench import limits
from vkv.bench.limits import Limits, LimitsProbe


def _probe(**options: int) -> LimitsProbe:
    return LimitsProbe(torch.device("cpu"), torch.float32, **options)


def test_limits_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 10.0, 4.0, 20.0, 2.0, 80.0])  # reading, multiplying, in turns
    monkeypatch.setattr(limits, "best_time", lambda *_, **__: next(seconds))
    probe = _probe()
    for _ in range(3):
        probe.measure()
    found = probe.limits()
    num_bytes, flops = 1 << 16, 2 * 16**3  # of the quick measurements
    assert found.read_samples == (num_bytes, num_bytes / 4, num_bytes / 2)
    assert found.read_bytes_per_s == num_bytes / 2
    assert found.flops_per_s == flops / 20
    assert found.dtype == "float32"


def test_threads_are_those_asked_for_while_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen = set()

    def best_time(*_: object, **__: object) -> float:
        seen.add(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(limits, "best_time", best_time)
    _probe(threads=before + 1).measure()
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_what_is_measured_is_positive_and_survives_a_record() -> None:
    probe = _probe()
    probe.measure()
    probe.measure()
    found = probe.limits()
    assert min(*found.read_samples, *found.flops_samples) > 0
    assert Limits.from_record(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(("has_kernel", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_rate_is_of_a_type_that_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, has_kernel: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_kernel)
    probe = LimitsProbe(torch.device("cpu"), torch.bfloat16)
    probe.measure()
    assert probe.limits().dtype == dtype


def test_words() -> None:
    once = Limits(read_bytes_per_s=43.21e9, flops_per_s=1234e9, dtype="bfloat16")
    assert str(once) == (
        "Limits of the machine in this run: 43.2 GB/s of memory read, 1234 GFLOP/s of bfloat16 "
        "matrix product."
    )
    several = Limits(
        read_bytes_per_s=43.21e9,
        flops_per_s=1234e9,
        dtype="bfloat16",
        read_samples=(43.21e9, 40e9, 78e9),
        flops_samples=(1234e9, 1300e9, 1000e9),
    )
    assert "medians of 3 measurements across it: 43.2 GB/s (40.0 to 78.0)" in str(several)
    assert "1234 GFLOP/s (1000 to 1300) of bfloat16" in str(several)
