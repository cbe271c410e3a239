"""Files by content: written whole or not at all, each once, by as many processes as like to."""

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ...vmem.errors import BadCheckpoint, BadZoo
from .tensor_file import Stored, digest, read_header, write

_MARK = "zoo.json"  # what tells a zoo from any other folder
_SAID = b'{"format": "vkv zoo 1"}\n'
_UNFINISHED = ".unfinished-"  # begins the names of what is being written
_SUFFIX = ".safetensors"


class Store:
    """The folders of a zoo, and who may write to them when.

    Whoever adds holds a lock that is shared; whoever takes away holds it alone. The system lets go
    of a lock when its process ends, however it does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks, self.files, self.models = (
            path / name for name in ("blocks", "files", "models")
        )

    @property
    def is_there(self) -> bool:
        """Whether the folder is a zoo."""
        return (self.path / _MARK).is_file()

    def check(self) -> None:
        """Raises BadZoo if the folder is no zoo, or one of a format that is not known here."""
        try:
            said = (self.path / _MARK).read_bytes()
        except OSError as error:
            raise BadZoo(
                f"{self.path} is no zoo of blocks ({error.strerror}); `vkv blocks add ZOO MODEL` "
                "makes one"
            ) from error
        if said != _SAID:
            raise BadZoo(f"{self.path} is a zoo of another format, {said[:40]!r}; use a newer vkv")

    def create(self) -> None:
        """Make the folder a zoo, if it is none yet.

        Raises BadZoo if something else is there, or it cannot be made.
        """
        if self.is_there:
            return self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            own = {"blocks", "files", "models", _MARK}
            names = {path.name for path in self.path.iterdir()} - own
            if any(not name.startswith(_UNFINISHED) for name in names):
                raise BadZoo(f"{self.path} holds other things; give a new folder, or a zoo")
            for folder in (self.blocks, self.files, self.models):
                folder.mkdir(exist_ok=True)
            self._place(self.path / _MARK, lambda file: file.write(_SAID))
        except OSError as error:
            raise BadZoo(f"{self.path} cannot be made a zoo: {error}") from error

    # -- who may write ---------------------------------------------------------------------------

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Nothing is taken away meanwhile; others may add, too."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else adds or takes away meanwhile."""
        with self._locked(fcntl.LOCK_EX):
            yield

    @contextmanager
    def alone_if_possible(self) -> Iterator[bool]:
        """The same, if nobody else is at it; whether that is so."""
        try:
            with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield True
        except BlockingIOError:
            yield False

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        try:
            descriptor = os.open(self.path / _MARK, os.O_RDWR)
        except OSError as error:
            raise BadZoo(f"{self.path} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    # -- writing ---------------------------------------------------------------------------------

    def block_path(self, name: str) -> Path:
        """Where the block of this digest is, or would be."""
        return self.blocks / f"{name}{_SUFFIX}"

    def file_path(self, name: str) -> Path:
        """Where the file of this digest is, or would be."""
        return self.files / name

    def add_block(self, tensors: Mapping[str, Stored]) -> tuple[str, bool]:
        """Store a block; returns its digest, and whether it was not there before.

        A block that is there is believed: `verify` is who reads it again.
        """
        name = digest(tensors)
        path = self.block_path(name)
        if path.is_file():
            return name, False
        self._place(path, lambda file: write(tensors, file))
        return name, True

    def add_file(self, source: Path) -> str:
        """Store a file; returns its digest."""
        data = source.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        path = self.file_path(name)
        if not path.is_file():
            self._place(path, lambda file: file.write(data))
        return name

    def _place(self, path: Path, fill: Callable[[BinaryIO], object]) -> None:
        """A file of which every reader sees all or nothing, also after the machine went down."""
        unfinished = path.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
        try:
            with unfinished.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    @contextmanager
    def new_model(self, name: str) -> Iterator[Path]:
        """A folder to fill, which becomes that of the model `name` when the block ends well.

        Raises FileExistsError if there is a model of that name by then.
        """
        unfinished = self.models / f"{_UNFINISHED}{secrets.token_hex(8)}"
        unfinished.mkdir()
        try:
            yield unfinished
            sync_folder(unfinished)
            try:
                unfinished.rename(self.models / name)
            except OSError as error:  # which system call it is that says so differs
                raise FileExistsError(error.errno, error.strerror, name) from error
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_folder(self.models)

    # -- taking away -----------------------------------------------------------------------------

    def remove_model(self, name: str) -> None:
        """Take a model's folder away. The caller is alone."""
        unfinished = self.models / f"{_UNFINISHED}{secrets.token_hex(8)}"
        (self.models / name).rename(unfinished)  # gone at once, and not file by file
        shutil.rmtree(unfinished)

    def sweep(self, blocks: Collection[str], files: Collection[str]) -> int:
        """Take away all but the blocks and files of these digests; returns the bytes.

        What was left unfinished goes, too. The caller is alone. Processes that have a block mapped
        keep it: the system takes the bytes back when the last one has ended.
        """
        num_bytes = 0
        for path in self.block_files():
            if path.name.removesuffix(_SUFFIX) not in blocks:
                num_bytes += path.stat().st_size
                path.unlink()
        for path in self.files.iterdir():
            if path.name not in files:
                num_bytes += path.stat().st_size
                path.unlink()
        for path in self.models.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)
        return num_bytes

    # -- reading ---------------------------------------------------------------------------------

    def block_files(self) -> list[Path]:
        """All blocks, and what is unfinished of them."""
        return sorted(self.blocks.iterdir())

    def model_names(self) -> tuple[str, ...]:
        """The models, by name."""
        names = (path.name for path in self.models.iterdir())
        return tuple(sorted(name for name in names if not name.startswith(".")))

    def damage_of_block(self, name: str) -> str | None:
        """Reads a block again; what is wrong with it, or None."""
        path = self.block_path(name)
        try:
            found = digest(read_header(path))
        except (BadCheckpoint, OSError) as error:
            return str(error)
        return None if found == name else f"{path} holds other bytes than were written"

    def damage_of_file(self, name: str) -> str | None:
        """The same of a file."""
        path = self.file_path(name)
        try:
            found = sha256(path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None if found == name else f"{path} holds other bytes than were written"


def sha256(path: Path) -> str:
    """The digest that a file is kept by."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_through(path: Path, data: bytes) -> None:
    """Write a new file, and wait for the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the names in a folder survive the machine's going down."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
