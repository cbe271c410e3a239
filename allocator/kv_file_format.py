"""What a file of keys and values looks like: arithmetic and encoding, no file.

    | magic, version, length and checksum of the header | header (msgpack) | stream 0 | stream 1 | …

Each stream begins at a multiple of 4 KiB, so that it can be mapped, and has the bytes of all
tokens, as the token format says. The header has a checksum of every chunk of every stream.
"""

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
import xxhash

from ..vmem.errors import KVFileDamaged, KVFileMismatch
from .layout import TokenFormat

MAGIC = b"\x89vkv-kv\n"
VERSION = 1
CHUNK_BYTES = 1 << 20
ALIGNMENT = 4096
_PRELUDE = struct.Struct("<8sIIQ")  # magic, version, bytes of the header, checksum of all before
PRELUDE_BYTES = _PRELUDE.size
_Part = tuple[int, str, int, int]


@dataclass(frozen=True, kw_only=True)
class KVFacts:
    """What is to be saved, but for the keys and values themselves.

    Attributes:
        model: a fingerprint of the model that computed them.
        token_format: what the bytes of a token are.
        tokens: what they were computed from.
        variant: what else they depend on, or who may read them; the file tells it only to those who
            know it.
        extra: bytes of the caller's own.
        chunk_bytes: of a stream, that share a checksum.
    """

    model: str
    token_format: TokenFormat
    tokens: Sequence[int]
    variant: str = ""
    extra: bytes = b""
    chunk_bytes: int = CHUNK_BYTES


class KVFileHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The header as it is in the file.

    Attributes:
        key, variant: a random key, and the digest of the variant under it.
        tokens: 4 bytes each.
        checksums: xxh3_64 of the chunks, 8 bytes each, stream by stream.
    """

    model: str
    dtype: str
    streams: tuple[tuple[_Part, ...], ...]
    key: bytes
    variant: bytes
    tokens: bytes
    extra: bytes
    chunk_bytes: int
    checksums: bytes

    @classmethod
    def of(cls, facts: KVFacts) -> "KVFileHeader":
        """The header for `facts`, with checksums still to come (`with_checksums`)."""
        key = os.urandom(16)
        header = cls(
            model=facts.model,
            dtype=facts.token_format.dtype,
            streams=facts.token_format.streams,
            key=key,
            variant=_digest(facts.variant, key),
            tokens=np.asarray(facts.tokens, dtype="<i4").tobytes(),
            extra=facts.extra,
            chunk_bytes=facts.chunk_bytes,
            checksums=b"",
        )
        return header.with_checksums([0] * sum(map(header.num_chunks, range(len(header.streams)))))

    def with_checksums(self, checksums: Sequence[int]) -> "KVFileHeader":
        """The same, with the checksums of all chunks."""
        encoded = np.asarray(checksums, dtype="<u8").tobytes()
        return msgspec.structs.replace(self, checksums=encoded)

    def is_for(self, variant: str) -> bool:
        """Whether the tokens are of this variant."""
        return _digest(variant, self.key) == self.variant

    @property
    def token_format(self) -> TokenFormat:
        """What the bytes of a token are."""
        return TokenFormat(self.dtype, self.streams)

    @property
    def num_tokens(self) -> int:
        """Tokens with keys and values in the file."""
        return len(self.tokens) // 4

    def token_ids(self) -> np.ndarray:
        """The tokens, int64."""
        return np.frombuffer(self.tokens, dtype="<i4").astype(np.int64)

    def stream_bytes(self, stream: int) -> int:
        """Bytes of all tokens in a stream."""
        return self.num_tokens * self.token_format.widths[stream]

    def num_chunks(self, stream: int) -> int:
        """Chunks of a stream; the last may be shorter."""
        return -(-self.stream_bytes(stream) // self.chunk_bytes)

    def encode(self) -> bytes:
        """The beginning of the file. Its length does not depend on the checksums."""
        body = msgspec.msgpack.encode(self)
        start = _PRELUDE.pack(MAGIC, VERSION, len(body), 0)
        checksum = xxhash.xxh3_64_intdigest(start + body)
        return _PRELUDE.pack(MAGIC, VERSION, len(body), checksum) + body


@dataclass(frozen=True)
class Regions:
    """Where each stream begins in the file, and where the file ends, in bytes."""

    offsets: tuple[int, ...]
    end: int = field(default=0)

    @classmethod
    def of(cls, header: KVFileHeader, header_bytes: int) -> "Regions":
        """Of a file whose header, encoded, takes `header_bytes`."""
        offsets, end = [], _align(header_bytes)
        for stream in range(len(header.streams)):
            offsets.append(end)
            end = _align(end + header.stream_bytes(stream))
        return cls(tuple(offsets), end)


def header_bytes(prelude: bytes) -> int:
    """How long the encoded header is that begins with `prelude`.

    Raises KVFileMismatch for the beginning of another kind of file or of a newer format.
    """
    if len(prelude) < PRELUDE_BYTES or not prelude.startswith(MAGIC):
        raise KVFileMismatch("it is no file of keys and values; give one that vkv saved")
    _, version, size, _ = _PRELUDE.unpack(prelude)
    if version != VERSION:
        raise KVFileMismatch(
            f"its format is number {version}, and this vkv reads {VERSION}; use the vkv that wrote "
            "it"
        )
    return PRELUDE_BYTES + size


def decode(encoded: bytes) -> KVFileHeader:
    """The header that `encode` made. Raises KVFileDamaged."""
    magic, version, size, checksum = _PRELUDE.unpack(encoded[:PRELUDE_BYTES])
    body = encoded[PRELUDE_BYTES:]
    start = _PRELUDE.pack(magic, version, size, 0)
    if xxhash.xxh3_64_intdigest(start + body) != checksum:
        raise KVFileDamaged("its header was changed since it was written")
    try:
        header = msgspec.msgpack.decode(body, type=KVFileHeader)
    except msgspec.MsgspecError as error:
        raise KVFileDamaged(f"its header cannot be read: {error}") from error
    is_dtype = isinstance(getattr(torch, header.dtype, None), torch.dtype)
    if not is_dtype or not min([header.chunk_bytes, *header.token_format.widths, 1]) > 0:
        raise KVFileDamaged("its header says what cannot be")
    if not header.streams or not header.tokens:
        raise KVFileDamaged("its header tells of nothing")
    chunks = sum(map(header.num_chunks, range(len(header.streams))))
    if len(header.tokens) % 4 or len(header.checksums) != 8 * chunks:
        raise KVFileDamaged("its header contradicts itself")
    return header


def chunks_of(pieces: Iterable[torch.Tensor], chunk_bytes: int) -> Iterator[memoryview]:
    """A stream's bytes, which lie in `pieces`, chunk by chunk; copied where no piece holds one."""
    begun = bytearray()
    for piece in pieces:
        for part in piece.split(64 * chunk_bytes):  # a device's memory comes in parts
            view = part.cpu().numpy().data
            while len(view):
                if not begun and len(view) >= chunk_bytes:
                    yield view[:chunk_bytes]
                    view = view[chunk_bytes:]
                    continue
                room = chunk_bytes - len(begun)
                begun += view[:room]
                view = view[room:]
                if len(begun) == chunk_bytes:
                    yield memoryview(begun)
                    begun = bytearray()
    if begun:
        yield memoryview(begun)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _digest(variant: str, key: bytes) -> bytes:
    return hashlib.blake2b(variant.encode(), key=key, digest_size=16).digest()
