"""What adapters add, by each way to compute it, against plain products in float64."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from vkv.runtime.adapters import products as adapter_products
from vkv.runtime.adapters.products import NativeProducts, TorchProducts
from vkv.runtime.adapters.sites import Site
from vkv.runtime.adapters.steps import AdapterStep, Products, SiteWeights
from vkv.runtime.adapters.triton_products import TritonProducts
from vkv.runtime.cpu_kernels.kernels import available
from vkv.runtime.cpu_kernels.lora import KERNELS, lora

_DTYPES = [torch.float32, torch.bfloat16]
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _site(inputs: int, outputs: int, index: int = 1, *, is_head: bool = False) -> Site:
    return Site(index, "a.linear", inputs, outputs, torch.nn.Identity(), is_head=is_head)


def _weights(site: Site, rank: int, dtype: torch.dtype, seed: int) -> SiteWeights:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
    up = torch.randn(rank, site.out_features, generator=generator) / rank**0.5
    return SiteWeights(down.to(dtype), up.to(dtype), 0.5 + seed)


@pytest.fixture(params=["torch", *KERNELS, "triton"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    if request.param in KERNELS:
        if not available(torch.float32):
            pytest.skip("no kernels, and no compiler to make them")
        monkeypatch.setattr(adapter_products, "lora", partial(lora, most=request.param))
    if request.param == "triton":
        pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if request.param == "triton":
        yield TritonProducts(device)
        return
    yield TorchProducts() if request.param == "torch" else NativeProducts()


def _device(products: Products) -> torch.device:
    on_gpu = products.name == "triton" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


_CASES = [  # inputs, outputs, and of each run of rows the rank; None for no adapter
    (64, 128, [(8, 3), (None, 2), (16, 1)]),
    (48, 96, [(1, 1), (3, 5), (8, 17)]),
    (530, 70, [(64, 6), (None, 1), (5, 4), (64, 2)]),
    (33, 257, [(None, 4), (20, 33)]),
]


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_each_row_gets_what_its_adapter_says(
    products: Products, case: tuple[int, int, list[tuple[int | None, int]]], dtype: torch.dtype
) -> None:
    inputs, outputs, runs = case
    device, site = _device(products), _site(inputs, outputs)
    known: dict[int, SiteWeights] = {}
    for rank, _ in runs:
        if rank is not None and rank not in known:
            weights = _weights(site, rank, dtype, seed=rank)
            known[rank] = SiteWeights(weights.down.to(device), weights.up.to(device), weights.scale)
    tables = {rank: products.table(3, {site.index: one}) for rank, one in known.items()}
    tables[0] = products.table(3, {})  # an adapter that does nothing at this site
    x = torch.randn(1, sum(count for _, count in runs), inputs).to(device, dtype)
    out = torch.randn(1, x.shape[1], outputs + 5).to(device, dtype)[..., 2 : outputs + 2]
    expected = out.double()
    row = 0
    for rank, count in runs:
        rows = slice(row, row + count)
        row += count
        if rank is not None:
            one = known[rank]
            low = x[0, rows].double() @ one.down.double().T
            expected[0, rows] += one.scale * low @ one.up.double()
    before = out.clone()
    step = AdapterStep(products, x.shape[1])
    step.fill([(None if rank is None else tables[rank], count) for rank, count in runs])
    step.add(site, x, out)
    scale = expected.abs().max()
    assert (out.double() - expected).abs().max() <= _TOLERANCE[dtype] * scale
    row = 0
    for rank, count in runs:
        if rank is None:
            assert torch.equal(out[0, row : row + count], before[0, row : row + count])
        row += count
    # The same as addends, which are float32, and zero where there is nothing to add.
    addend = step.addend([site, _site(inputs, 32, index=2)], x)
    assert addend.dtype == torch.float32
    assert addend.shape == (x.shape[1], outputs + 32)
    found = before[0].double() + addend[:, :outputs].double()
    assert (found - expected[0]).abs().max() <= _TOLERANCE[dtype] * scale
    assert not addend[:, outputs:].any()
    step.fill([(tables[0], x.shape[1])])
    assert not step.addend([site], x).any()


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("most", KERNELS)
@pytest.mark.parametrize(("inputs", "outputs"), [(1000, 300), (512, 64), (31, 5)])
def test_a_row_has_the_same_bits_in_any_company(
    dtype: torch.dtype, most: str, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not available(dtype):
        pytest.skip("no kernels, and no compiler to make them")
    monkeypatch.setattr(adapter_products, "lora", partial(lora, most=most))
    products, site = NativeProducts(), _site(inputs, outputs)
    weights = [_weights(site, rank, dtype, seed=rank) for rank in (7, 16)]
    one, other = (products.table(2, {site.index: each}) for each in weights)
    x, out = torch.randn(40, inputs).to(dtype), torch.randn(40, outputs).to(dtype)
    threads = torch.get_num_threads()
    results = []
    for runs, num_threads in [
        ([(one, 1)], 1),
        ([(one, 2), (other, 38)], 1),
        ([(one, 13), (None, 1), (other, 9), (one, 17)], 2),
        ([(one, 3), (other, 5)], 1),
    ]:
        torch.set_num_threads(num_threads)
        count = sum(count for _, count in runs)
        step, sums = AdapterStep(products, count), out[:count].clone()
        step.fill(runs)
        step.add(site, x[:count], sums)
        results.append(sums[0])
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], each) for each in results[1:])


def test_the_output_layer_may_have_some_rows_only() -> None:
    products, head = TorchProducts(), _site(8, 4, is_head=True)
    table = products.table(2, {1: _weights(head, 2, torch.float32, 0)})
    step = AdapterStep(products, 5, 2)
    step.fill([(None, 2), (table, 3)], [(None, 1), (table, 1)])
    x = torch.randn(2, 8)
    out = torch.zeros(2, 4)
    step.add(head, x, out)
    assert not out[0].any()
    assert out[1].any()
    with pytest.raises(ValueError, match=r"a\.linear is called for 2 rows in a step of 5"):
        step.add(_site(8, 4), x, out)


def test_the_gpus_kernels_compile_where_there_is_none() -> None:
    """Down to machine code, for Ampere and Hopper."""
    pytest.importorskip("triton")
    script = Path(__file__).parents[2] / "support" / "compile_lora.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == 6
