"""Tensors over raw addresses, through the DLPack exchange format.

PyTorch imports a DLPack capsule without copying and without probing the pointer, so a tensor
may span reserved addresses that nothing backs yet. The descriptor lives in one block from the C
library's `malloc`, and its deleter *is* the C library's `free`: no Python callback runs when a
tensor dies, on whatever thread and however late.

Source: DLPack, https://dmlc.github.io/dlpack/latest/c_api.html (DLManagedTensor, unversioned).
"""

import ctypes
from collections.abc import Sequence

import torch
from torch.utils.dlpack import from_dlpack

from .errors import InvalidConfig

_CPU, _CUDA = 1, 2  # DLDeviceType
_SIGNED, _UNSIGNED, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6  # DLDataTypeCode

_TYPE_CODES: dict[torch.dtype, int] = {
    torch.float16: _FLOAT,
    torch.float32: _FLOAT,
    torch.float64: _FLOAT,
    torch.bfloat16: _BFLOAT,
    torch.int8: _SIGNED,
    torch.int16: _SIGNED,
    torch.int32: _SIGNED,
    torch.int64: _SIGNED,
    torch.uint8: _UNSIGNED,
    torch.bool: _BOOL,
}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", _DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_free_address = ctypes.cast(_libc.free, ctypes.c_void_p).value

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_CAPSULE_NAME = b"dltensor"  # kept alive here: a capsule stores the pointer, not the text


def strided_extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to one past the last that a strided tensor can reach."""
    if len(shape) != len(strides) or min((*shape, *strides), default=0) < 0:
        raise InvalidConfig(
            f"shape {tuple(shape)} and strides {tuple(strides)} must be of equal length and hold "
            "nothing negative"
        )
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def tensor_from_address(
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A tensor of `shape` over `address` on `device`; `strides` in elements. Nothing is read."""
    if dtype not in _TYPE_CODES:
        raise InvalidConfig(
            f"no tensor of {dtype} can be laid over an address; use one of "
            f"{', '.join(sorted(map(str, _TYPE_CODES)))}"
        )
    ndim = len(shape)
    header = ctypes.sizeof(_DLManagedTensor)
    block = _libc.malloc(header + 2 * 8 * ndim)
    if not block:
        raise MemoryError("no memory for a tensor descriptor")
    (ctypes.c_int64 * (2 * ndim)).from_address(block + header)[:] = [*shape, *strides]
    managed = _DLManagedTensor.from_address(block)
    managed.dl_tensor = _DLTensor(
        data=address,
        device_type=_CUDA if device.type == "cuda" else _CPU,
        device_id=device.index or 0,
        ndim=ndim,
        type_code=_TYPE_CODES[dtype],
        type_bits=dtype.itemsize * 8,
        type_lanes=1,
        shape=block + header,
        strides=block + header + 8 * ndim,
        byte_offset=0,
    )
    managed.manager_ctx = None
    managed.deleter = _free_address
    return from_dlpack(_new_capsule(block, _CAPSULE_NAME, None))
