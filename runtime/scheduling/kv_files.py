"""Files of keys and values that requests may begin with, in place of computing them."""

import logging
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from ...allocator import Exits, KVFile, Slot, SlotCache, common_prefix
from ...allocator.transfer import KVDir
from ...vmem.errors import (
    DriverError,
    InvalidConfig,
    InvalidOperation,
    KVFileError,
    OutOfMappings,
)

_log = logging.getLogger(__name__)

MOST_FILES = 64  # open at once; the one that was not used for longest is closed for another


class KVFiles:
    """The open files of one model, of the cache's token format, by their paths.

    What is found in them is checked before a slot begins with it. Whatever is damaged is computed
    as if there were no file. Not for use from several threads at once.

    Args:
        exits: how slots are let go that could not be filled.
        folder: where what requests compute is saved by itself, and found; None for nowhere.
    """

    def __init__(self, exits: Exits, folder: KVDir | None = None) -> None:
        self.folder = folder
        self._exits = exits
        self._files: dict[Path, KVFile] = {}  # least recently used first
        self._of_folder: dict[Path, Path] = {}  # those among them, as the folder names them

    def __len__(self) -> int:
        return len(self._files)

    @property
    def may_have_some(self) -> bool:
        """False if no prompt can begin with a file."""
        return bool(self._files) or self.folder is not None

    def add(self, file: KVFile) -> None:
        """Take a file over, in place of one that was opened under the same path."""
        path = file.path.absolute()
        self._close(path)
        while len(self._files) >= MOST_FILES:
            self._close(next(iter(self._files)))
        self._files[path] = file

    def _close(self, path: Path) -> None:
        self._of_folder.pop(path, None)
        file = self._files.pop(path, None)
        if file is not None:
            file.close()

    def save(self, slot: Slot, tokens: Sequence[int], variant: str = "") -> None:
        """Have the folder save what a slot holds that is about to be let go."""
        if self.folder is not None:
            self.folder.save(slot, tokens, variant)
            for path, name in list(self._of_folder.items()):
                if name not in self.folder:  # it was given up: open, it kept its room on the disk
                    self._close(path)

    @property
    def is_saving(self) -> bool:
        """True until `settle` has taken in all that is being written."""
        return self.folder is not None and self.folder.is_saving

    def settle(self) -> None:
        """Take in what the folder has written meanwhile."""
        if self.folder is not None:
            self.folder.settle()

    def give_way(self) -> bool:
        """Memory is short: read no more slots. False if none was being read."""
        return self.folder is not None and self.folder.give_way()

    def forget(self) -> None:
        """Close all files, and the folder: the model that they are of is no more."""
        if self.folder is not None:
            self.folder.close()
            self.folder = None
        for path in list(self._files):
            self._close(path)

    def longest_prefix(self, tokens: Sequence[int], variant: str = "") -> int:
        """The most tokens that a file has of the beginning of `tokens`, as far as is known."""
        return self._best(tokens, variant)[1]

    def open_slot(
        self,
        cache: SlotCache,
        tokens: Sequence[int],
        variant: str = "",
        *,
        owner: Hashable = None,
        least: int = 1,
        exits: Exits | None = None,
    ) -> tuple[Slot, int] | None:
        """A slot that begins with what a file has of `tokens`, and how many that are.

        None if that would be less than `least`, or if the file turns out to be of no use. `owner`
        is as of `SlotCache.adopt`. `exits`
        are those of `cache`, if it is not the one that this was made for. Raises a Shortage or
        DriverError where there is no memory for it.
        """
        exits = exits or self._exits
        file, num_tokens = self._best(tokens, variant)
        if file is None or num_tokens < least:
            return None
        num_tokens = file.verify(0, num_tokens)
        if self.folder is not None:
            if file.damage is None:
                self.folder.use(file.path)
            else:
                self.folder.discard(file.path)
        if num_tokens < least:
            return None
        self._files[file.path.absolute()] = self._files.pop(file.path.absolute())
        slot = cache.open(variant if owner is None else owner)
        try:
            _fill(cache, slot, file, num_tokens)
        except (KVFileError, InvalidConfig) as error:  # it was cut short this moment
            _log.warning("%s: %s; its tokens are computed again", file.path, error)
            exits.let_go(slot)
            return None
        except BaseException:
            exits.let_go(slot)
            raise
        return slot, num_tokens

    def _best(self, tokens: Sequence[int], variant: str) -> tuple[KVFile | None, int]:
        if self.folder is not None:
            self._open_best(self.folder, tokens, variant)
        best, longest = None, 0
        if self._files and len(tokens):
            wanted = np.asarray(tokens, dtype=np.int64)
            for file in self._files.values():
                length = common_prefix(wanted, file.tokens[: file.num_sound])
                if length > longest and file.header.is_for(variant):
                    best, longest = file, length
        return best, longest

    def _open_best(self, folder: KVDir, tokens: Sequence[int], variant: str) -> None:
        """Open the folder's best file for `tokens`, if it is not open."""
        path, _ = folder.find(tokens, variant)
        if path is not None and path.absolute() not in self._files:
            file = folder.open(path)
            if file is not None:
                self.add(file)
                self._of_folder[path.absolute()] = path


def _fill(cache: SlotCache, slot: Slot, file: KVFile, num_tokens: int) -> None:
    """Map what a new slot can have of the file, and read the rest; or read all of it."""
    starts: Sequence[int] | None = None
    try:
        starts = cache.attach(slot, file.fd, file.offsets, num_tokens)
    except (InvalidOperation, InvalidConfig, OutOfMappings, DriverError):
        # Blocks, a device, a system whose pages are larger than 4 KiB, too many mappings.
        cache.grow(slot, num_tokens)
    file.read_into(cache.spans(slot, 0, num_tokens), starts)
