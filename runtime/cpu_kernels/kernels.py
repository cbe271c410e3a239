"""vkv's own CPU kernels between attention calls: linears, norms, rotary embedding, gates.

A small C library (`native/`) with a plain C ABI through ctypes, on PyTorch's own threads. Tensors
are [rows, elements], the last dimension contiguous.
"""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from ...quant import empty_apart
from ...vmem.errors import NativeUnavailable
from ...vmem.native_function import NativeFunction
from ...vmem.native_library import load_library, openmp_parallel

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum vkv_dtype
_PANELS = (16, 64)  # VKV_PANEL_AVX2, VKV_PANEL_AVX512

_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_THREADS = (("num_threads", _INT32), ("parallel", _POINTER))


class Gate(IntEnum):
    """Activations of a gated feed-forward layer (enum vkv_gate)."""

    SILU = 1
    GELU_TANH = 2


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("inputs", "weight", "bias", "addend", "out", "workspace")),
        *((name, _INT64) for name in ("workspace_bytes", "input_stride", "out_stride")),
        *((name, _INT32) for name in ("num_rows", "num_columns", "num_words")),
        *((name, _INT32) for name in ("panel_columns", "gate", "dtype")),
        *_THREADS,
    )


class _RmsNorm(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("inputs", "weight", "out")),
        ("input_stride", _INT64),
        *((name, _INT32) for name in ("num_rows", "dim", "dtype")),
        *((name, _FLOAT) for name in ("eps", "offset")),
        *_THREADS,
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("inputs", "cosine", "sine", "out")),
        *((name, _INT64) for name in ("token_stride", "head_stride")),
        *((name, _INT32) for name in ("num_tokens", "num_heads", "dim", "dtype")),
        *_THREADS,
    )


class _Gated(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("inputs", "out")),
        ("input_stride", _INT64),
        *((name, _INT32) for name in ("num_rows", "dim", "dtype", "gate")),
        *_THREADS,
    )


class _Add(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("left", "right", "out")),
        ("count", _INT64),
        ("dtype", _INT32),
        *_THREADS,
    )


class _Draw(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("logits", "rows", "peaks", "temperatures", "floors")),
        *((name, _POINTER) for name in ("keys", "tokens")),
        ("row_stride", _INT64),
        *((name, _INT32) for name in ("num_rows", "vocab_size", "dtype")),
        *_THREADS,
    )


class _Pack(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.POINTER(_POINTER)),
        ("columns", ctypes.POINTER(_INT64)),
        ("packed", _POINTER),
        ("num_words", _INT64),
        *((name, _INT32) for name in ("num_weights", "panel_columns", "gated")),
        *_THREADS,
    )


_STRUCTS: dict[str, type[ctypes.Structure]] = {  # of each kernel, its arguments
    "linear": _Linear,
    "rms_norm": _RmsNorm,
    "rotate": _Rotate,
    "gated": _Gated,
    "add": _Add,
    "draw": _Draw,
    "pack": _Pack,
}


class Call(ctypes.Structure):
    """`struct vkv_call`: a kernel's address, and those of its arguments."""

    _fields_ = tuple((name, _POINTER) for name in ("function", "first", "second"))


def dtype_code(dtype: torch.dtype) -> int:
    """What C calls it (enum vkv_dtype)."""
    return _DTYPES[dtype]


def available(dtype: torch.dtype) -> bool:
    """Whether there is a library here, or a compiler to make it, and kernels for `dtype`."""
    if dtype not in _DTYPES:
        return False
    try:
        library()
    except NativeUnavailable:
        return False
    return True


def best_panel(dtype: torch.dtype) -> int | None:
    """Columns of the panels that `PanelLinear` lays weights of `dtype` in; None if it cannot."""
    if not available(dtype):
        return None
    return library().vkv_best_panel(_DTYPES[dtype]) or None


def has_matrix_unit(dtype: torch.dtype) -> bool:
    """Whether this processor has one for `dtype`, which PyTorch's kernels use and vkv's do not."""
    return available(dtype) and bool(library().vkv_has_matrix_unit(_DTYPES[dtype]))


def usable_panels(dtype: torch.dtype) -> list[int]:
    """Columns of every kind of panel that this processor has a kernel of `dtype` for."""
    if not available(dtype):
        return []
    return [columns for columns in _PANELS if library().vkv_has_panel(columns, _DTYPES[dtype])]


class PanelLinear:
    """A linear whose weight lies in panels, as `native/kernels.h` says.

    Args:
        weight: bfloat16 or float32 [out_features, in_features], in_features even; or several of
            these, whose outputs come one after the other.
        bias: [out_features] or None.
        gate: with one, the first half of the columns passes it and multiplies the second; the
            half is then a multiple of 32.
        panel: columns of a panel, of `usable_panels(dtype)`.
        out: where the panels go, int32 [panels, in_features in words, panel]; None for memory of
            its own.

    Raises ValueError if in_features is odd or zero; a call, TypeError for inputs of another type.
    """

    def __init__(
        self,
        weight: torch.Tensor | Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        gate: Gate | None = None,
        *,
        panel: int,
        out: torch.Tensor | None = None,
    ) -> None:
        weights = [weight] if isinstance(weight, torch.Tensor) else list(weight)
        self._dtype, in_features = weights[0].dtype, weights[0].shape[1]
        if in_features == 0 or in_features % 2:
            raise ValueError(f"panels hold pairs of inputs, and there are {in_features}")
        words = [weight.detach().contiguous().view(torch.int32) for weight in weights]
        self._shape = columns, num_words = sum(map(len, words)), words[0].shape[1]
        self.out_features = columns if gate is None else columns // 2
        shape = -(-columns // panel), num_words, panel
        self._weight = empty_apart(shape, torch.int32) if out is None else out
        assert self._weight.shape == shape, (self._weight.shape, shape)
        assert self._weight.is_contiguous(), "read from one end to the other"
        _pack(words, self._weight, is_gated=gate is not None)
        self._bias = None if bias is None else _panel_bias(bias, gate, panel)
        self._multiply = _kernel("linear")
        self._args = _Linear(
            weight=self._weight.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_columns=columns,
            num_words=num_words,
            panel_columns=panel,
            gate=gate or 0,
            dtype=_DTYPES[self._dtype],
            parallel=openmp_parallel(),
        )

    def __call__(self, inputs: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in_features] to [..., out_features].

        With a gate an `addend`, float32 [rows, columns] without gaps, is added ahead of it.
        """
        if inputs.dtype != self._dtype:
            raise TypeError(f"the weight is {self._dtype} and the inputs are {inputs.dtype}")
        inputs, num_rows, stride = rows_of(inputs)
        out = inputs.new_empty((*inputs.shape[:-1], self.out_features))
        args = _Linear.from_buffer_copy(self._args)  # threads may share the module
        args.inputs, args.out = inputs.data_ptr(), out.data_ptr()
        args.input_stride, args.out_stride = stride, self.out_features
        args.num_rows, args.num_threads = num_rows, torch.get_num_threads()
        if addend is not None:
            assert self._args.gate, "only gates have addends"
            assert addend.is_contiguous()
            assert addend.shape == (num_rows, self._shape[0]), addend.shape
            args.addend = addend.data_ptr()
        self._multiply(args)
        return out

    def lay_out_again(self, weight: torch.Tensor) -> None:
        """Take the numbers of another weight of the same shape, where recorded calls read them."""
        words = weight.detach().contiguous().view(torch.int32)
        assert words.shape == self._shape, (words.shape, self._shape)
        _pack([words], self._weight, is_gated=self._args.gate != 0)

    def dense(self) -> torch.Tensor:
        """The weight again, bit for bit."""
        weight = torch.empty(self._shape, dtype=torch.int32)
        library().vkv_unpack(
            self._weight.data_ptr(),
            weight.data_ptr(),
            *weight.shape,
            self._args.panel_columns,
            self._args.gate != 0,
        )
        return weight.view(self._dtype)


class RmsNorm:
    """x / sqrt(mean(x²) + eps) * (offset + weight), over the last dimension.

    A call raises TypeError for inputs of another type than the weight's.
    """

    def __init__(self, weight: torch.Tensor, eps: float, offset: float) -> None:
        self._weight = weight.detach()
        self._normalise = _kernel("rms_norm")
        self._args = _RmsNorm(
            weight=self._weight.data_ptr(),
            dim=len(weight),
            dtype=_DTYPES[weight.dtype],
            eps=eps,
            offset=offset,
            parallel=openmp_parallel(),
        )

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., dim] to a tensor of the same shape, without gaps."""
        if inputs.dtype != self._weight.dtype:
            raise TypeError(f"the weight is {self._weight.dtype} and the inputs are {inputs.dtype}")
        inputs, num_rows, stride = rows_of(inputs)
        out = inputs.new_empty(inputs.shape)
        args = _RmsNorm.from_buffer_copy(self._args)  # threads may share the module
        args.inputs, args.out = inputs.data_ptr(), out.data_ptr()
        args.input_stride, args.num_rows = stride, num_rows
        args.num_threads = torch.get_num_threads()
        self._normalise(args)
        return out


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [num_tokens, num_heads, dim], strided, by [num_tokens, dim] angles."""
    out = states.new_empty(states.shape)
    args = _Rotate(
        inputs=states.data_ptr(),
        cosine=cosine.data_ptr(),
        sine=sine.data_ptr(),
        out=out.data_ptr(),
        token_stride=states.stride(0),
        head_stride=states.stride(1),
        num_tokens=states.shape[0],
        num_heads=states.shape[1],
        dim=states.shape[2],
        dtype=_DTYPES[states.dtype],
        num_threads=torch.get_num_threads(),
        parallel=openmp_parallel(),
    )
    _kernel("rotate")(args)
    return out


def gated(inputs: torch.Tensor, gate: Gate) -> torch.Tensor:
    """gate(first half) * second half of [..., 2 dim]."""
    inputs, num_rows, stride = rows_of(inputs)
    dim = inputs.shape[-1] // 2
    out = inputs.new_empty((*inputs.shape[:-1], dim))
    args = _Gated(
        inputs=inputs.data_ptr(),
        out=out.data_ptr(),
        input_stride=stride,
        num_rows=num_rows,
        dim=dim,
        dtype=_DTYPES[inputs.dtype],
        gate=gate,
        num_threads=torch.get_num_threads(),
        parallel=openmp_parallel(),
    )
    _kernel("gated")(args)
    return out


def add(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """out = left + right, all of one shape and dtype, without gaps."""
    args = _Add(
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
        count=out.numel(),
        dtype=_DTYPES[out.dtype],
        num_threads=torch.get_num_threads(),
        parallel=openmp_parallel(),
    )
    _kernel("add")(args)


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    *,
    peaks: torch.Tensor,
    temperatures: torch.Tensor,
    floors: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """A token of each row, int64 [num_rows], drawn from exp((logit - peak) / temperature).

    Args:
        logits: float32 or bfloat16 [.., vocab_size], contiguous along a row.
        rows: int64 [num_rows], where each lies in `logits`.
        peaks: float32 [num_rows], the largest logit of each.
        temperatures: float32 [num_rows].
        floors: float32 [num_rows], the least exponent that is drawn; -inf for none.
        keys: int64 [num_rows], random.
    """
    assert logits.stride(1) == 1, "rows have no gaps"
    tokens = torch.empty_like(rows)
    args = _Draw(
        logits=logits.data_ptr(),
        rows=rows.data_ptr(),
        peaks=peaks.data_ptr(),
        temperatures=temperatures.data_ptr(),
        floors=floors.data_ptr(),
        keys=keys.data_ptr(),
        tokens=tokens.data_ptr(),
        row_stride=logits.stride(0),
        num_rows=len(rows),
        vocab_size=logits.shape[1],
        dtype=_DTYPES[logits.dtype],
        num_threads=torch.get_num_threads(),
        parallel=openmp_parallel(),
    )
    _kernel("draw")(args)
    return tokens


def rows_of(inputs: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The tensor as evenly spaced rows: itself or a copy, how many there are, and their stride."""
    if inputs.is_contiguous():
        return inputs, inputs.numel() // inputs.shape[-1], inputs.shape[-1]
    shape, strides = inputs.shape, inputs.stride()
    outer = [(n, step) for n, step in zip(shape[:-1], strides[:-1], strict=True) if n > 1]
    evenly = all(a[1] == b[0] * b[1] for a, b in pairwise(outer))
    if strides[-1] != 1 or not evenly or not outer:
        inputs = inputs.contiguous()
        return inputs, inputs.numel() // shape[-1], shape[-1]
    return inputs, inputs.numel() // shape[-1], outer[-1][1]


def _pack(weights: Sequence[torch.Tensor], packed: torch.Tensor, *, is_gated: bool) -> None:
    """Lay weights, int32 [columns of each, words], out as [panels, words, columns of a panel]."""
    count = len(weights)
    addresses = (_POINTER * count)(*(weight.data_ptr() for weight in weights))
    columns = (_INT64 * count)(*map(len, weights))
    args = _Pack(
        weights=addresses,
        columns=columns,
        packed=packed.data_ptr(),
        num_words=packed.shape[1],
        num_weights=count,
        panel_columns=packed.shape[2],
        gated=is_gated,
        num_threads=torch.get_num_threads(),
        parallel=openmp_parallel(),
    )
    _kernel("pack")(args)


def _panel_bias(bias: torch.Tensor, gate: Gate | None, panel: int) -> torch.Tensor:
    """The bias in float32, in the order of the panels' columns, zero behind the last."""
    bias = bias.detach().float()
    if gate is not None:  # [2, panels, half a panel] to [panels, 2, half a panel]
        bias = bias.view(2, -1, panel // 2).transpose(0, 1).reshape(-1)
    return torch.nn.functional.pad(bias, (0, -len(bias) % panel)).contiguous()


@cache
def _kernel(name: str) -> NativeFunction:
    return NativeFunction(library(), name, _STRUCTS[name])


@cache
def library() -> ctypes.CDLL:
    """The kernels. Raises NativeUnavailable if they are not built and cannot be compiled here."""
    library = load_library(Path(__file__).parent)
    library.vkv_unpack.argtypes = [_POINTER, _POINTER, _INT64, _INT64, _INT64, _INT32]
    library.vkv_unpack.restype = None
    library.vkv_replay.argtypes = [_POINTER, _INT64, _INT64, ctypes.POINTER(_INT64)]
    library.vkv_replay.restype = _INT64
    library.vkv_has_panel.argtypes = [_INT32, _INT32]
    library.vkv_best_panel.argtypes = [_INT32]
    library.vkv_has_matrix_unit.argtypes = [_INT32]
    for name in ("vkv_has_panel", "vkv_best_panel", "vkv_has_matrix_unit"):
        getattr(library, name).restype = _INT32
    return library
