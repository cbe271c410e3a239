"""Files of tensors in the safetensors format, as bytes: no number is looked at, so none can change.

Source: https://github.com/huggingface/safetensors, "Format": the length of a header in eight bytes,
the header in JSON, and then the bytes of all tensors without a gap.
"""

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ...vmem.errors import BadCheckpoint

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100 << 20  # which safetensors takes no larger one than, either
_ALIGNMENT = 64  # of the first tensor in a file that is written here
_PIECE_BYTES = 16 << 20  # hashed or written at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        dtype: as safetensors writes it, such as "BF16".
        shape: in elements.
        start, stop: of its bytes, from the beginning of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return self.stop - self.start

    @property
    def bits(self) -> int:
        """Of an element; the dtype's own number, as in F8_E4M3 or I64."""
        found = re.search(r"\d+", self.dtype)
        return int(found.group()) if found else 8  # BOOL


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises BadCheckpoint if it is none, or was cut short."""
    try:
        with path.open("rb") as file:
            return _parse_header(path, file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read as safetensors: {error}; copy or download it again"
        ) from error


def _parse_header(path: Path, file: BinaryIO) -> dict[str, Stored]:
    """Raises ValueError and its like."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    first = _LENGTH_BYTES + length
    if length > _MOST_HEADER_BYTES or first > size:
        raise ValueError(f"its header would have {length} bytes, and the file has {size}")
    header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, said in header.items():
        start, stop = said["data_offsets"]
        stored = Stored(path, said["dtype"], tuple(said["shape"]), first + start, first + stop)
        bits = math.prod(stored.shape) * stored.bits
        if not 0 <= start <= stop or stored.stop > size or bits != 8 * stored.num_bytes:
            raise ValueError(
                f"tensor {name}, {stored.dtype} of {list(stored.shape)}, would lie in bytes "
                f"{stored.start} to {stored.stop} of {size}"
            )
        found[name] = stored
    return found


def pieces(stored: Stored) -> Iterator[memoryview]:
    """The bytes of a tensor, one stretch after another, mapped and not copied."""
    if not stored.num_bytes:
        return
    with (
        stored.file.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as whole,
    ):
        for start in range(stored.start, stored.stop, _PIECE_BYTES):
            with whole[start : min(start + _PIECE_BYTES, stored.stop)] as piece:
                yield piece


def digest(tensors: Mapping[str, Stored]) -> str:
    """SHA-256 over what tensors are, in hexadecimal digits: names, dtypes, shapes and bytes.

    The names in order; of each a line in JSON, and its bytes. Where in a file they lie, and what
    else is there, makes no difference.
    """
    found = hashlib.sha256(b"vkv block 1\n")
    for name in sorted(tensors):
        stored = tensors[name]
        line = json.dumps([name, stored.dtype, list(stored.shape), stored.num_bytes])
        found.update(line.encode() + b"\n")
        for piece in pieces(stored):
            found.update(piece)
    return found.hexdigest()


def write(tensors: Mapping[str, Stored], file: BinaryIO) -> None:
    """Write tensors as one safetensors file, the same bytes for the same tensors."""
    # The widest elements first, so that each tensor begins at a multiple of its elements' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].bits, name))
    header, offset = {}, 0
    for name in order:
        stored = tensors[name]
        stop = offset + stored.num_bytes
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for name in order:
        for piece in pieces(tensors[name]):
            file.write(piece)


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, mapped: their memory is the page cache's, for all processes.

    The mapping lives as long as the tensors, also when the file is removed. What is written into a
    tensor stays this process's own. Raises BadCheckpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read as safetensors: {error}; `vkv blocks verify` says what is "
            "damaged"
        ) from error
