"""The CPU kernels between attention calls, against PyTorch in float64."""

from collections.abc import Iterator

import pytest
import torch
from parallel_calls import CountedParallel
from torch.nn import functional
from vkv.runtime.cpu_kernels import kernels as native_kernels
from vkv.runtime.cpu_kernels.kernels import Gate, PanelLinear, RmsNorm, gated, rotate

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of a result, relative
ROWS = [1, 2, 5, 6, 7, 13, 40, 110]
ACTIVATIONS = {
    Gate.SILU: functional.silu,
    Gate.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}

pytestmark = pytest.mark.skipif(
    not native_kernels.available(torch.float32), reason="no C compiler, no built kernels"
)


@pytest.fixture(
    params=[(panel, dtype) for panel in (16, 64) for dtype in (torch.float32, torch.bfloat16)],
    ids=["avx2-float32", "avx2-bfloat16", "avx512-float32", "avx512_bf16"],
)
def kind(request: pytest.FixtureRequest) -> tuple[int, torch.dtype]:
    """Columns of a panel and the type of the weight."""
    panel, dtype = request.param
    if panel not in native_kernels.usable_panels(dtype):
        pytest.skip("this processor lacks the instructions")
    return panel, dtype


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, *, terms: int = 1) -> None:
    """`found` is `exact` rounded once to its dtype, sums of `terms` being made in float32."""
    assert found.shape == exact.shape
    scale = exact.abs() + exact.abs().mean()
    off = ((found.double() - exact).abs() / scale).max().item()
    assert off <= ROUNDING[found.dtype] + 1e-7 * terms, f"off by {off:.2e}"


@pytest.mark.parametrize("rows", [1, 6, 100])
def test_threads_are_called_for_what_several_can_do(
    kind: tuple[int, torch.dtype], rows: int
) -> None:
    panel, dtype = kind
    x = torch.randn(rows, 1024).to(dtype)
    for panels, expected in ((1, 0), (6, 1)):
        linear = PanelLinear(torch.randn(panels * panel, 1024).to(dtype), None, panel=panel)
        exact, parallel = linear(x), CountedParallel()
        linear._args.parallel = parallel.address
        torch.set_num_threads(3)
        assert torch.equal(linear(x), exact)
        widening = int(panel == 16 and rows > 6 and rows * 1024 > 64 << 10)
        assert parallel.teams == [3] * (expected + widening)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("columns", "inputs"), [(64, 32), (1, 2), (63, 18), (65, 64), (200, 96), (795, 2048)]
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear(
    kind: tuple[int, torch.dtype], rows: int, columns: int, inputs: int, with_bias: bool
) -> None:
    panel, dtype = kind
    weight = torch.randn(columns, inputs).to(dtype)
    bias = torch.randn(columns).to(dtype) if with_bias else None
    x = torch.randn(rows, 2 * inputs).to(dtype)[:, :inputs]  # rows with gaps between
    linear = PanelLinear(weight, bias, panel=panel)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_rounded(linear(x), exact, terms=inputs)
    assert torch.equal(linear.dense(), weight)


def test_several_weights_are_one(kind: tuple[int, torch.dtype]) -> None:
    """Of outputs that fill no panel, as if they had been joined before; also where lines cannot be
    written past the cache, since the panels begin in between."""
    panel, dtype = kind
    weights = [torch.randn(columns, 38).to(dtype) for columns in (48, 16, 200)]
    joined = torch.cat(weights)
    bias, x = torch.randn(264).to(dtype), torch.randn(5, 38).to(dtype)
    expected = PanelLinear(joined, bias, panel=panel)
    words = 38 * dtype.itemsize // 4
    count = -(-264 // panel) * words * panel
    for first in (0, 1):
        memory = torch.full((count + 1,), -1, dtype=torch.int32)[first:]
        out = memory[:count].view(-1, words, panel)
        several = PanelLinear(weights, bias, panel=panel, out=out)
        assert torch.equal(several.dense(), joined)
        assert first or torch.equal(several(x), expected(x))
    gate, up = torch.randn(2, 96, 38).to(dtype)
    gated = PanelLinear([gate, up], None, Gate.SILU, panel=panel)
    whole = PanelLinear(torch.cat([gate, up]), None, Gate.SILU, panel=panel)
    assert torch.equal(gated(x), whole(x))
    assert torch.equal(gated.dense(), torch.cat([gate, up]))


@pytest.mark.parametrize("gate", [None, *Gate])
def test_a_row_has_one_result_to_the_bit(kind: tuple[int, torch.dtype], gate: Gate | None) -> None:
    """Beside however many others."""
    panel, dtype = kind
    linear = PanelLinear(
        torch.randn(320, 600).to(dtype), torch.randn(320).to(dtype), gate, panel=panel
    )
    x = torch.randn(210, 600).to(dtype)
    all_rows = linear(x)
    for count in (*range(1, 15), 25, 97, 200):
        for first in (0, 3, 210 - count):
            some = slice(first, first + count)
            assert torch.equal(linear(x[some]), all_rows[some]), (count, first)


@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("columns", [32, 96])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_gated_linear(
    kind: tuple[int, torch.dtype], gate: Gate, columns: int, with_bias: bool
) -> None:
    panel, dtype = kind
    weight = torch.randn(2 * columns, 48).to(dtype) / 3
    bias = torch.randn(2 * columns).to(dtype) if with_bias else None
    x = torch.randn(3, 3, 48).to(dtype)
    linear = PanelLinear(weight, bias, gate, panel=panel)
    both = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    first, second = both.chunk(2, dim=-1)
    assert_rounded(linear(x), ACTIVATIONS[gate](first) * second, terms=48)
    assert torch.equal(linear.dense(), weight)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13])
def test_gated_linear_with_addends(kind: tuple[int, torch.dtype], rows: int) -> None:
    """They are added ahead of the gate, before anything is rounded; zeros change no bit."""
    panel, dtype = kind
    weight, bias = torch.randn(192, 48).to(dtype) / 3, torch.randn(192).to(dtype)
    x, addend = torch.randn(rows, 48).to(dtype), torch.randn(rows, 192)
    for gate in Gate:
        linear = PanelLinear(weight, bias, gate, panel=panel)
        both = functional.linear(x.double(), weight.double(), bias.double()) + addend.double()
        first, second = both.chunk(2, dim=-1)
        assert_rounded(linear(x, addend), ACTIVATIONS[gate](first) * second, terms=49)
        assert torch.equal(linear(x, torch.zeros(rows, 192)), linear(x))


def test_inputs_of_another_type_are_refused(kind: tuple[int, torch.dtype]) -> None:
    panel, dtype = kind
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(TypeError, match="and the inputs are"):
        PanelLinear(torch.ones(4, 8, dtype=dtype), None, panel=panel)(torch.ones(1, 8, dtype=other))


@pytest.mark.parametrize("inputs", [0, 7])
def test_odd_and_no_inputs_are_refused(kind: tuple[int, torch.dtype], inputs: int) -> None:
    panel, dtype = kind
    with pytest.raises(ValueError, match=f"there are {inputs}"):
        PanelLinear(torch.ones(4, inputs, dtype=dtype), None, panel=panel)


def test_no_weight_behind_the_last_is_used(kind: tuple[int, torch.dtype]) -> None:
    panel, dtype = kind
    weight = torch.full((70, 4), float("nan")).to(dtype)
    weight[:65] = 1
    assert torch.equal(
        PanelLinear(weight[:65], None, panel=panel)(torch.ones(1, 4).to(dtype)),
        torch.full((1, 65), 4.0).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 15, 64, 256, 1000])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, dim: int, offset: float) -> None:
    weight = torch.randn(dim).to(dtype)
    x = 3 * torch.randn(2, 37, 2 * dim).to(dtype)[..., :dim]
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert_rounded(RmsNorm(weight, 1e-5, offset)(x), exact * (offset + weight.double()), terms=10)


def test_a_norm_refuses_inputs_of_another_type() -> None:
    norm = RmsNorm(torch.ones(8), 1e-6, 0.0)
    with pytest.raises(TypeError, match=r"float32 and the inputs are torch\.bfloat16"):
        norm(torch.ones(2, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 10), (4, 64), (2, 600)])
def test_rotate(dtype: torch.dtype, heads: int, dim: int) -> None:
    states = torch.randn(heads, 50, dim).to(dtype).transpose(0, 1)  # heads first in memory
    cosine, sine = torch.randn(50, dim).to(dtype), torch.randn(50, dim).to(dtype)
    low, high = states.double().chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    exact = states.double() * cosine.double()[:, None] + turned * sine.double()[:, None]
    assert_rounded(rotate(states, cosine, sine), exact, terms=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("dim", [1, 33, 700])
def test_gated(dtype: torch.dtype, gate: Gate, dim: int) -> None:
    x = 4 * torch.randn(3, 21, 2 * dim).to(dtype)
    first, second = x.double().chunk(2, dim=-1)
    assert_rounded(gated(x, gate), ACTIVATIONS[gate](first) * second, terms=20)


def test_extreme_gates_stay_finite() -> None:
    x = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 1, 1, 1, 1, 1]])
    for gate in Gate:
        expected = ACTIVATIONS[gate](x[:, :5])
        torch.testing.assert_close(gated(x, gate), expected, atol=1e-30, rtol=1e-5)
