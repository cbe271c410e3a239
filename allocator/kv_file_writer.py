"""Writing a file of keys and values so that the old one or the new one is there, each whole."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import xxhash

from ..vmem.errors import KVFileInaccessible, KVFileMismatch
from .kv_file_format import MAGIC, KVFacts, KVFileHeader, Regions, chunks_of

_PREFIX, _SUFFIX = ".vkv-", ".part"


class KVFileWriter:
    """Writes one file: `write`, then `commit`. Left without a commit, it leaves nothing behind.

    The file is written under another name in the same folder, for its owner's eyes from the first
    moment on, and takes its place when all of it is on the disk. A writer holds a lock on what it
    writes, so that the next one can tell what a dead writer left, and removes it.

    Args:
        path: where the file will be. What is there is replaced; a link is followed.
        facts: what the header says.

    Attributes:
        num_bytes: of the file, once written.

    Raises KVFileInaccessible if the system refuses, KVFileMismatch if something else than a file of
    keys and values is there, which is left as it is.
    """

    def __init__(self, path: str | os.PathLike[str], facts: KVFacts) -> None:
        self.path = Path(path)
        self._target = Path(os.path.realpath(path))
        self._header = KVFileHeader.of(facts)
        self._regions = Regions.of(self._header, len(self._header.encode()))
        self.num_bytes = self._regions.end
        with self._naming():
            _check_target(self._target)
            _remove_leftovers(self._target.parent)
            self._part, fd = _create_part(self._target.parent)
        self._fd: int | None = fd

    def write(self, streams: Sequence[Iterable[torch.Tensor]]) -> None:
        """Write all tokens: of each stream the pieces that they lie in, uint8, in order."""
        checksums: list[int] = []
        with self._naming():
            os.ftruncate(self._open_fd, self.num_bytes)
            for stream, pieces in enumerate(streams):
                offset = self._regions.offsets[stream]
                for chunk in chunks_of(pieces, self._header.chunk_bytes):
                    checksums.append(xxhash.xxh3_64_intdigest(chunk))
                    self._write(chunk, offset)
                    offset += len(chunk)
                written = offset - self._regions.offsets[stream]
                assert written == self._header.stream_bytes(stream), "a stream of other tokens"
            self._write(memoryview(self._header.with_checksums(checksums).encode()), 0)

    def commit(self) -> None:
        """Wait until all is on the disk, and put the file in its place."""
        with self._naming():
            os.fsync(self._open_fd)
            os.replace(self._part, self._target)
            _sync_folder(self._target.parent)

    def discard(self) -> None:
        """Leave nothing of a file that is not committed; called at the end of `with`."""
        if self._fd is not None:
            with suppress(OSError):  # committed, or the folder has gone
                os.unlink(self._part)
            os.close(self._fd)
            self._fd = None

    @property
    def _open_fd(self) -> int:
        assert self._fd is not None, "a writer that was discarded"
        return self._fd

    def _write(self, view: memoryview, offset: int) -> None:
        while len(view):
            count = os.pwrite(self._open_fd, view, offset)
            view, offset = view[count:], offset + count

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise KVFileInaccessible(
                f"{self.path} cannot be written: {os.strerror(error.errno or 0)}{_remedy(error)}"
            ) from error

    def __enter__(self) -> "KVFileWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.discard()


def _check_target(target: Path) -> None:
    """Raises if what is there is not to be replaced."""
    try:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):
        return  # what cannot be read is replaced if the folder allows it
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise KVFileInaccessible(f"{target} is no regular file; choose another name")
        if os.pread(fd, len(MAGIC), 0) not in (b"", MAGIC):
            raise KVFileMismatch(
                f"{target} is no file of keys and values, and is left as it is; choose another name"
            )
    finally:
        os.close(fd)


def _create_part(folder: Path) -> tuple[Path, int]:
    """A new file under a passing name, locked."""
    while True:
        path = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # where there are no locks nobody will take it for a leftover
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # taken for a leftover before it was locked


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers left that are no more."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.startswith(_PREFIX)]
    for path in (folder / name for name in names if name.endswith(_SUFFIX)):
        with suppress(OSError):  # gone meanwhile, or another user's
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to wait for
            raise
    finally:
        os.close(fd)


def _remedy(error: OSError) -> str:
    remedies = {
        errno.ENOSPC: "free some space, or choose another folder",
        errno.EDQUOT: "free some space, or choose another folder",
        errno.EFBIG: "raise the limit on the size of files",
        errno.ENOENT: "make the folder first",
        errno.ENOTDIR: "give the name of a file in a folder",
        errno.EACCES: "choose a folder that may be written to",
        errno.EROFS: "choose a folder that may be written to",
        errno.EISDIR: "choose another name",
    }
    remedy = remedies.get(error.errno or 0)
    return f"; {remedy}" if remedy else ""
