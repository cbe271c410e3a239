"""The benches of tiers and tenants, at the size of a test."""

import json
from pathlib import Path

import torch
from vkv.bench.load import tenants, tiers
from vkv.bench.load.options import TenantsOptions, TiersOptions

_CPU = torch.device("cpu")


def test_tiers_are_timed_against_none(tmp_path: Path) -> None:
    options = TiersOptions(
        dtype=torch.float32,
        device=_CPU,
        batch=2,
        context=16,
        num_steps=8,
        num_requests=3,
        prefix=300,
        suffix=4,
        output=3,
        swap_memory="64MiB",
    )
    path, tables = tiers.run(options, tmp_path, "vkv bench tiers")
    results = json.loads(path.read_text())["results"]
    assert set(results["step_s"]) == set(tiers.STEPS)
    assert set(results["tokens_per_s"]) == set(tiers.SHARED)
    assert results["copied_per_s"][0] > 1e6
    # A filled folder leaves no more than the suffixes to compute.
    assert results["first_s"][tiers.AGAIN][0] < results["first_s"][tiers.PLAIN][0]
    assert [len(table.rows) for table in tables] == [3, 4]
    assert path.with_suffix(".png").exists()


def test_a_light_tenant_is_timed_alone_and_beside_a_heavy_one(tmp_path: Path) -> None:
    options = TenantsOptions(
        dtype=torch.float32, device=_CPU, num_requests=2, rate=20.0, times=3, scale=0.01, max_seqs=2
    )
    path, (table,) = tenants.run(options, tmp_path, "vkv bench tenants")
    runs = json.loads(path.read_text())["results"]["runs"]
    assert [run["way"] for run in runs] == ["alone", "fcfs", "fair"]
    assert [len(run["ttfts_s"]["light"]) for run in runs] == [2, 2, 2]
    assert len(table.rows) == 5
