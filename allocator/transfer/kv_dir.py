"""A folder of files of keys and values, by content: what was computed once is found again.

Requests' tokens are written beside the steps. A file is written where no other has most of its
tokens already, so that a conversation that gets longer is written a few times in all, and requests
that share a long beginning once.
"""

import hashlib
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...vmem import Fence
from ...vmem.errors import InvalidConfig, InvalidOperation, KVFileDamaged, KVFileError
from ..kv_file import KVFile
from ..kv_file_format import KVFacts, KVFileHeader
from ..kv_file_writer import KVFileWriter
from ..parking import common_prefix
from ..slot import Slot
from ..slot_cache import SlotCache
from .copier import Copier
from .transfers import Outgoing, Spans, TransferKey, Transfers

_SUFFIX = ".vkv"
_LEAST_TOKENS = 256  # that are worth a file
_BUCKET_TOKENS = 16  # files are looked up by their first ones
_PIECE_BYTES = 16 << 20  # written between two looks whether it is still wanted
_PAUSE_S = 30.0  # after the system refused to write

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Entry:
    """A file of the folder, as its header says."""

    path: Path
    header: KVFileHeader
    tokens: np.ndarray
    num_bytes: int

    @property
    def bucket(self) -> bytes:
        return _bucket(self.tokens)


class WriteJob:
    """One file on its way to the disk. What has the slot, its owner, lives until that was read.

    Attributes:
        num_bytes: of keys and values.
        is_read: nothing of the slot is needed any more; the system writes on.
        error: why it failed; None if it did not.
    """

    def __init__(
        self, path: Path, facts: KVFacts, source: Spans, after: Fence, owner: object = None
    ) -> None:
        self.path = path
        self.num_bytes = sum(len(piece) for pieces in source for piece in pieces)
        self.is_read = False
        self.error: Exception | None = None
        self._facts = facts
        self._source = source
        self._owner = owner
        self._after = after
        self._done = threading.Event()
        self._is_cancelled = False

    @property
    def is_done(self) -> bool:
        """True once it has succeeded or failed."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Leave the file out, and wait until nothing of the slot is touched any more."""
        self._is_cancelled = True
        self._done.wait()

    def run(self, stream: object = None) -> None:
        """Write, on the calling thread. Never raises: `error` says what went wrong."""
        try:
            self._after.wait()
            with KVFileWriter(self.path, self._facts) as writer:
                writer.write([self._pieces(pieces) for pieces in self._source])
                self.is_read = True
                self._source, self._owner = [], None
                writer.commit()
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            self.error = error
        finally:
            self.is_read = True
            self._source, self._owner = [], None
            self._done.set()

    def _pieces(self, pieces: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for piece in pieces:
            for part in piece.split(_PIECE_BYTES):
                if self._is_cancelled:
                    raise InvalidOperation("the file is not wanted any more")
                yield part


class KVDir:
    """Saves what slots hold as files, and says which file has the beginning of a prompt.

    Only files of this model and this cache's token format count; others stay where they are, and
    take their part of the limit. What is used least recently goes first. For one thread at a time,
    beside the writer's.

    Args:
        folder: made if it is not there, for its owner alone.
        limit_bytes: the most that all files may take: those that are there now, and those to come
            that this process writes.
        cache: whose slots they are.
        model: its fingerprint.

    Attributes:
        num_saved, num_failed: files written so far, and those that could not be.

    Raises InvalidConfig if the folder cannot be used.
    """

    def __init__(self, folder: Path, limit_bytes: int, cache: SlotCache, model: str) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.num_saved = self.num_failed = 0
        self._cache = cache
        self._model = model
        self._transfers = Transfers(cache, most_ended=1)  # nobody says anything twice of them
        self._writer = Copier(torch.device("cpu"), max_bytes=limit_bytes)
        self._numbers = itertools.count()
        self._entries: OrderedDict[Path, _Entry] = OrderedDict()  # least recently used first
        self._buckets: dict[bytes, list[_Entry]] = {}
        self._aside: dict[Path, int] = {}  # bytes of files that are there and not to be found
        self._jobs: list[tuple[WriteJob, Outgoing, np.ndarray, str]] = []
        self._rests_until_s = 0.0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = sorted(folder.glob(f"*{_SUFFIX}"), key=_used_at_s)
        except OSError as error:
            raise InvalidConfig(
                f"kv_dir {folder} cannot be used: {error}; choose another"
            ) from error
        for path in found:
            self._take_in(path)

    # -- what there is -----------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """What the files take."""
        listed = sum(entry.num_bytes for entry in self._entries.values())
        return listed + sum(self._aside.values())

    @property
    def num_files(self) -> int:
        """Files of this model."""
        return len(self._entries)

    def __contains__(self, path: Path) -> bool:
        """Whether a file can be found."""
        return path in self._entries

    def find(self, tokens: Sequence[int], variant: str = "") -> tuple[Path | None, int]:
        """The file that has most of the beginning of `tokens`, and how many that are."""
        best, longest = None, 0
        if len(tokens) >= _BUCKET_TOKENS:
            wanted = np.asarray(tokens, dtype=np.int64)
            for entry in self._buckets.get(_bucket(wanted), ()):
                length = common_prefix(wanted, entry.tokens)
                if length > longest and entry.header.is_for(variant):
                    best, longest = entry.path, length
        return best, longest

    def use(self, path: Path) -> None:
        """Note that a file was of use, for other processes too."""
        if path in self._entries:
            self._entries.move_to_end(path)
            try:
                os.utime(path)
            except OSError as error:  # another process gave it up
                _log.debug("%s is gone: %s", path, error)

    def open(self, path: Path) -> KVFile | None:
        """A file of the folder. None if that cannot be: it is not found any more then."""
        try:
            file = KVFile.open(path)
        except KVFileDamaged as error:
            _log.warning("%s; its tokens are computed again", error)
            self.discard(path)
            return None
        except KVFileError as error:  # it is gone; or whole, and too many files are open
            _log.warning("%s; its tokens are computed again", error)
            self._put_aside(path)
            return None
        if not self._is_ours(file):  # somebody has put it in the place of the one that was
            file.close()
            self._put_aside(path)
            return None
        return file

    def discard(self, path: Path) -> None:
        """Remove a file that turned out to be of no use."""
        if path in self._entries:
            _remove(path)
            self._put_aside(path)

    def _is_ours(self, file: KVFile) -> bool:
        ours = self._model, self._cache.geometry.token_format
        return (file.header.model, file.header.token_format) == ours

    def _put_aside(self, path: Path) -> None:
        """Have a file found no more. As long as it is there it takes its part of the limit."""
        num_bytes = self._entries[path].num_bytes
        self._forget(path)
        if os.path.lexists(path):
            self._aside[path] = num_bytes

    def _forget(self, path: Path) -> None:
        entry = self._entries.pop(path)
        bucket = self._buckets[entry.bucket]
        bucket.remove(entry)
        if not bucket:
            del self._buckets[entry.bucket]

    # -- what comes --------------------------------------------------------------------------

    def save(self, slot: Slot, tokens: Sequence[int], variant: str = "") -> bool:
        """Begin to write the KV of `tokens`, which `slot` holds, if it is worth a file.

        The slot is pinned until it has been read; its owner may let it go at once.
        """
        array = np.asarray(tokens, dtype=np.int64)
        num_covered = max(self.find(tokens, variant)[1], self._num_pending(array, variant))
        token_format = self._cache.geometry.token_format
        num_bytes = len(tokens) * token_format.token_bytes
        if (
            len(tokens) - num_covered < max(_LEAST_TOKENS, num_covered // 2)
            or time.monotonic() < self._rests_until_s
            or not self._writer.has_room(num_bytes)
            or not self._make_room(num_bytes)
        ):
            return False
        facts = KVFacts(
            model=self._model, token_format=token_format, tokens=tokens, variant=variant
        )
        key = TransferKey(f"file {next(self._numbers)}", 0)
        outgoing = self._transfers.send(key, slot, len(tokens))
        try:
            spans = outgoing.spans(0, len(tokens))
            fence = self._cache.pool.driver.record_fence()
            job = WriteJob(self._path_of(array, variant), facts, spans, fence, self._cache)
            self._writer.submit(job)
        except BaseException:
            outgoing.abort()
            raise
        self._jobs.append((job, outgoing, array, variant))
        return True

    @property
    def is_saving(self) -> bool:
        """True until `settle` has taken in all that is being written."""
        return bool(self._jobs)

    def settle(self) -> None:
        """Unpin what has been read, and take in what has been written."""
        done = [job for job, *_ in self._jobs if job.is_done]  # first: others may end meanwhile
        for job, outgoing, _, _ in self._jobs:
            if job.is_read:
                outgoing.commit()
        self._jobs = [entry for entry in self._jobs if entry[0] not in done]
        for job in done:
            if job.error is None:
                self.num_saved += 1
                self._take_in(job.path)
            elif not isinstance(job.error, InvalidOperation):
                self.num_failed += 1
                self._rests_until_s = time.monotonic() + _PAUSE_S
                why = str(job.error) or repr(job.error)
                _log.warning("%s; nothing is saved for %g s", why, _PAUSE_S)

    def give_way(self) -> bool:
        """Memory is short: leave out what is being read. False if that frees nothing."""
        reading = [entry for entry in self._jobs if not entry[0].is_read]
        for job, _, _, _ in reading:
            job.cancel()
        self.settle()
        return bool(reading)

    def _num_pending(self, tokens: np.ndarray, variant: str) -> int:
        """The most of `tokens` that files under way have."""
        pending = [entry[2] for entry in self._jobs if entry[3] == variant]
        return max((common_prefix(tokens, other) for other in pending), default=0)

    def _path_of(self, tokens: np.ndarray, variant: str) -> Path:
        digest = hashlib.blake2b(tokens.tobytes(), key=self._model.encode()[:64], digest_size=16)
        digest.update(repr((variant, self._cache.geometry.token_format)).encode())
        return self.folder / f"{digest.hexdigest()}{_SUFFIX}"

    def _make_room(self, num_bytes: int) -> bool:
        """Give up files, the least recently used first, until `num_bytes` more are allowed."""
        wanted = num_bytes + sum(entry[0].num_bytes for entry in self._jobs)
        if wanted + sum(self._aside.values()) > self.limit_bytes:
            return False
        while self.num_bytes + wanted > self.limit_bytes and self._entries:
            oldest = next(iter(self._entries))
            if not _remove(oldest):  # it can be read all the same
                self._rests_until_s = time.monotonic() + _PAUSE_S
                return False
            self._forget(oldest)
        return True

    def _take_in(self, path: Path) -> None:
        """List a file; one that is damaged goes, one of another model or kind stays."""
        self._aside.pop(path, None)
        try:
            with KVFile.open(path) as file:
                is_gone = file.damage is not None and _remove(path)
                if file.damage is not None or not self._is_ours(file):
                    if not is_gone:
                        self._aside[path] = file.num_bytes
                    return
                entry = _Entry(path, file.header, file.tokens, file.num_bytes)
        except KVFileError as error:
            _log.warning("%s; it is left out", error)
            return
        if path in self._entries:
            self._forget(path)
        self._entries[path] = entry
        self._buckets.setdefault(entry.bucket, []).append(entry)

    # -- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Finish what is under way. The files stay."""
        self._writer.stop()
        self.settle()


def _bucket(tokens: np.ndarray) -> bytes:
    return tokens[:_BUCKET_TOKENS].tobytes()


def _used_at_s(path: Path) -> float:
    """When a file was last of use; 0 for one that another process has just given up."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> bool:
    """Remove a file, if it is there; False if the system refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s cannot be removed: %s", path, error)
        return False
    return True
