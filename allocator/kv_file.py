"""Tokens' keys and values in a file, to be mapped or read."""

import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import xxhash

from ..vmem.errors import KVFileDamaged, KVFileError, KVFileInaccessible, KVFileMismatch
from .kv_file_format import MAGIC, PRELUDE_BYTES, Regions, decode, header_bytes
from .layout import TokenFormat

_log = logging.getLogger(__name__)

_MOST_THREADS = 4  # that compare checksums; memory is at its limit with that many
_STAGING_BYTES = 16 << 20  # on the way to a device
_UNKNOWN, _SOUND = 0, 1
_Chunk = tuple[int, int]  # stream, number


class KVFile:
    """An open file of keys and values. Only its header has been read.

    What is in it is checked before it is used (`verify`), each chunk once. Of a file that is
    damaged the tokens before the damage may be used. For one thread at a time.

    Attributes:
        path: where it was opened; another file may be there by now.
        header: what it says of itself.
        tokens: the tokens, int64.
        num_bytes: of the file, as it should be.
        offsets: where each stream begins.
        num_sound: tokens before the first damage that was found.
        damage: what was found, in words; None if nothing was.
    """

    def __init__(self, path: Path, fd: int) -> None:
        """Takes `fd` over. Raises a KVFileError if the header cannot be read."""
        self.path = path
        self.fd = fd
        self.damage: str | None = None
        with _naming(path):
            found = os.fstat(fd).st_size
            prelude = self._read(0, min(found, PRELUDE_BYTES))
            if len(prelude) < PRELUDE_BYTES and MAGIC.startswith(prelude[: len(MAGIC)]):
                raise KVFileDamaged("it was cut short within its header")
            size = header_bytes(prelude)
            if size > found:
                raise KVFileDamaged("it was cut short within its header")
            self.header = decode(self._read(0, size))
        regions = Regions.of(self.header, size)
        self.offsets, self.num_bytes = regions.offsets, regions.end
        self.tokens = self.header.token_ids()
        self.num_sound = len(self.tokens)
        streams = range(len(self.header.streams))
        self._checksums = np.frombuffer(self.header.checksums, dtype="<u8")
        counts = [self.header.num_chunks(stream) for stream in streams]
        self._firsts = [sum(counts[:stream]) for stream in streams]  # of each stream's chunks
        self._states = bytearray(len(self._checksums))
        if found < self.num_bytes:
            self._note(self._whole_tokens(found), f"it was cut short after {found} bytes")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "KVFile":
        """Open a file and read its header, and nothing else.

        Raises KVFileInaccessible, KVFileMismatch or KVFileDamaged, each naming the file.
        """
        path = Path(path)
        try:
            # Opening a pipe would wait for its other end.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise KVFileInaccessible(f"{path} cannot be opened: {_why(error)}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise KVFileInaccessible(f"{path} is no regular file; give one that vkv saved")
            return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise

    def check_fits(self, model: str, token_format: TokenFormat) -> None:
        """Raises KVFileMismatch unless the file is of this model and of this format."""
        if self.header.model != model:
            raise KVFileMismatch(
                f"{self.path} was saved by another model, or by this one with other weights or "
                "options; open it with the model that saved it"
            )
        if self.header.token_format != token_format:
            raise KVFileMismatch(
                f"{self.path} keeps {self.header.token_format.token_bytes} bytes a token as "
                f"{self.header.dtype} in {len(self.header.streams)} streams, and this cache "
                f"{token_format.token_bytes} as {token_format.dtype} in "
                f"{len(token_format.streams)}; use the dtype, kv, layers_per_range and split_kv "
                "that it was saved with"
            )

    # -- what is sound -----------------------------------------------------------------------

    def verify(self, start: int, stop: int) -> int:
        """Compare tokens `start … stop` with their checksums; returns where the sound ones end.

        That is `stop`, or the first token behind `start` of which a byte is not as it was written;
        nothing behind that may be used. A chunk is read once, however often it is asked for.
        """
        unknown = [c for c in self._chunks(start, stop) if self._states[self._place(c)] != _SOUND]
        threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(unknown) // 4)
        if threads < 2:
            self._compare(unknown)
        else:
            shares = [unknown[first::threads] for first in range(threads)]
            try:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(self._compare, shares))
            except RuntimeError:  # the system has no more threads
                self._compare(unknown)
        lost = [chunk for chunk in unknown if self._states[self._place(chunk)] != _SOUND]
        if lost:
            self._note_chunk(min(lost, key=self._first_token))
        return min(stop, self.num_sound)

    def _whole_tokens(self, num_bytes: int) -> int:
        """Tokens of which the first `num_bytes` bytes of the file hold all."""
        widths = self.header.token_format.widths
        pairs = zip(self.offsets, widths, strict=True)
        return min([len(self.tokens), *(max(0, num_bytes - at) // width for at, width in pairs)])

    def _first_token(self, chunk: _Chunk) -> int:
        """The first token with a byte in a chunk."""
        stream, number = chunk
        return number * self.header.chunk_bytes // self.header.token_format.widths[stream]

    def _chunks(self, start: int, stop: int) -> Iterator[_Chunk]:
        """Those with bytes of tokens `start … stop`, but of tokens known to be sound or lost."""
        size, stop = self.header.chunk_bytes, min(stop, self.num_sound)
        for stream, width in enumerate(self.header.token_format.widths):
            for number in range(start * width // size, -(-stop * width // size)):
                yield stream, number

    def _place(self, chunk: _Chunk) -> int:
        return self._firsts[chunk[0]] + chunk[1]

    def _compare(self, chunks: Sequence[_Chunk]) -> None:
        """Mark those of `chunks` that are as they were written."""
        size = self.header.chunk_bytes
        buffer = memoryview(bytearray(size))
        for stream, number in chunks:
            begin = number * size
            view = buffer[: min(size, self.header.stream_bytes(stream) - begin)]
            try:
                whole = self._read_into(view, self.offsets[stream] + begin)
            except OSError:
                whole = False
            place = self._place((stream, number))
            if whole and xxhash.xxh3_64_intdigest(view) == int(self._checksums[place]):
                self._states[place] = _SOUND

    def _note_chunk(self, chunk: _Chunk) -> None:
        stream, number = chunk
        place = self.offsets[stream] + number * self.header.chunk_bytes
        words = f"chunk {number} of stream {stream}, at byte {place}, is not as it was written"
        self._note(self._first_token(chunk), words)

    def _note(self, num_sound: int, words: str) -> None:
        if num_sound < self.num_sound:
            self.num_sound = num_sound
            self.damage = words
            _log.warning(
                "%s: %s; tokens from number %d on are computed again", self.path, words, num_sound
            )

    # -- what is in it -----------------------------------------------------------------------

    def read_into(
        self, spans: Sequence[Sequence[torch.Tensor]], starts: Sequence[int] | None = None
    ) -> None:
        """Read the first tokens into `spans`: of each stream the pieces that they lie in, uint8.

        With `starts`, the first bytes of each stream, so many, are left as they are. Raises
        KVFileDamaged if the file has been cut short meanwhile, KVFileInaccessible if the system
        cannot read it.
        """
        starts = starts or [0] * len(spans)
        with _naming(self.path):
            for offset, pieces, start in zip(self.offsets, spans, starts, strict=True):
                position = 0
                for piece in pieces:
                    skipped = min(len(piece), max(0, start - position))
                    self._fill(piece[skipped:], offset + position + skipped)
                    position += len(piece)

    def _fill(self, piece: torch.Tensor, offset: int) -> None:
        if not piece.is_cpu:
            for part in piece.split(_STAGING_BYTES):
                host = torch.empty(len(part), dtype=torch.uint8)
                self._fill(host, offset)
                part.copy_(host)
                offset += len(part)
        elif len(piece) and not self._read_into(piece.numpy().data, offset):
            raise KVFileDamaged("it was cut short")

    def _read(self, offset: int, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        self._read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def _read_into(self, view: memoryview, offset: int) -> bool:
        """Fill `view`; False if the file ends before it is full."""
        while len(view):
            count = os.preadv(self.fd, [view], offset)
            if not count:
                return False
            view, offset = view[count:], offset + count
        return True

    def close(self) -> None:
        """Let go of the file; what is mapped of it stays."""
        os.close(self.fd)

    def __enter__(self) -> "KVFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What goes wrong within is told with the file's name."""
    try:
        yield
    except KVFileError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise KVFileInaccessible(f"{path} cannot be read: {_why(error)}") from error


def _why(error: OSError) -> str:
    """What the system said, and what can be done."""
    said = os.strerror(error.errno or 0)
    remedies = {
        errno.ENOENT: "save one there first",
        errno.EACCES: "it is its owner's alone; run as that user",
        errno.EISDIR: "give a file's name",
    }
    remedy = remedies.get(error.errno or 0)
    return f"{said}; {remedy}" if remedy else said
