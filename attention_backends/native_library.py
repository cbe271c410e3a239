"""The compiled attention kernels behind `native`, and the struct that they are called with."""

import ctypes
from functools import cache
from pathlib import Path

from ..vmem.errors import UnsupportedAttention
from .native_build import find_library

_SOURCE = Path(__file__).parent / "native"
_BUILT = Path(__file__).parent / "_native.abi3.so"


class AttentionArgs(ctypes.Structure):
    """`struct vkv_attention` of `native/attention.h`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("sinks", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query_starts", "kv_lens", "slots")),
        *((name, ctypes.c_int64) for name in ("query_token_stride", "query_head_stride")),
        ("key_slot_stride", ctypes.c_int64),
        ("key_token_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_slot_stride", ctypes.c_int64),
        ("value_token_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("out_token_stride", "out_head_stride")),
        *((name, ctypes.c_int32) for name in ("num_seqs", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("key_dim", "value_dim", "dtype", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


class Rows(ctypes.Structure):
    """`struct vkv_rows` of `native/attention.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "cache")),
        *((name, ctypes.c_int64) for name in ("row_token_stride", "row_head_stride")),
        *((name, ctypes.c_int64) for name in ("slot_stride", "token_stride", "head_stride")),
        *((name, ctypes.c_int32) for name in ("num_heads", "dim", "item_bytes")),
    )


class Sequences(ctypes.Structure):
    """`struct vkv_sequences` of `native/attention.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query_starts", "kv_lens", "slots")),
        ("num_seqs", ctypes.c_int32),
    )


@cache
def load_library() -> ctypes.CDLL:
    """The kernels, compiled now if need be. The GIL is free while they run.

    Raises UnsupportedAttention if there is no library and no way to compile one.
    """
    library = ctypes.CDLL(str(find_library(_SOURCE, _BUILT)))
    library.vkv_attend.argtypes = [ctypes.POINTER(AttentionArgs)]
    library.vkv_attend.restype = ctypes.c_int64
    library.vkv_store.argtypes = [ctypes.POINTER(Rows), ctypes.POINTER(Sequences)]
    library.vkv_store.restype = ctypes.c_int64
    library.vkv_instruction_set.argtypes = [ctypes.c_int32]
    library.vkv_instruction_set.restype = ctypes.c_char_p
    return library


def unavailable_reason() -> str | None:
    """Why there can be no library here, or None."""
    try:
        load_library()
    except UnsupportedAttention as error:
        return str(error)
    return None
