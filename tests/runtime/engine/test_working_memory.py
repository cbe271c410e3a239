"""Memory is what was promised: steps of every number of rows, beside what stats() accounts for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from vkv.runtime.cpu_kernels import packing
from vkv.runtime.cpu_kernels.packing import few_row_counts

SOAK = Path(__file__).parents[2] / "support" / "rss_soak.py"
_HEAP = 2 << 20  # that the C library's heap rounds up and Python's objects take


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_of_rows_stays_within_what_stats_says(dtype: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(SOAK), dtype, "60"], capture_output=True, text=True, check=True
    )
    report = json.loads(ran.stdout)
    assert report["grown"] <= report["working"] + _HEAP, report


@pytest.mark.skipif(not packing.one_dnn_packs(torch.float32), reason="oneDNN packs nothing here")
def test_one_dnn_sees_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps a kernel for each, and memory with it."""
    monkeypatch.setattr(packing.native_kernels, "best_panel", lambda dtype: None)
    product = packing.PackedProduct([torch.nn.Linear(16, 24, bias=False)])
    weight = product.unpack()[0].weight
    for rows in (1, 2, 16, 17, 100, 300):
        inputs = torch.randn(rows, 16)
        torch.testing.assert_close(product.compute(inputs, 0), functional.linear(inputs, weight))
    counts = {few_row_counts(rows) for rows in range(1, 513)}
    assert len(counts) == 56
    assert all(rows <= few_row_counts(rows) <= rows * 9 / 8 for rows in range(1, 513))
