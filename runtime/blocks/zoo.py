"""A zoo of blocks: several models in a folder, in which what they have in common is there once."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ...vmem.errors import BadZoo, InvalidConfig, UnknownModel
from .chain import MANIFEST, Approximated, Block, Chain, manifest, read_manifest
from .checkpoint import Checkpoint
from .cutting import Cut, cut
from .store import Store, sha256, write_through
from .tensor_file import Stored, digest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_THREADS = 4
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Added:
    """What came of adding a model.

    Attributes:
        num_new: of its blocks, those that the zoo did not have.
        new_bytes: of their tensors.
    """

    chain: Chain
    num_new: int
    new_bytes: int


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A block of the zoo that is to be used in place of a model's own.

    Attributes:
        digest: of the block that is used.
        of: the model it is of.
        similarity: of what the two compute, at least, as it was measured.
    """

    digest: str
    of: str
    similarity: float


@dataclass(frozen=True)
class Cutting:
    """A checkpoint, and where it is cut."""

    name: str
    checkpoint: Checkpoint
    cuts: tuple[Cut, ...]

    def tensors(self, index: int) -> dict[str, Stored]:
        """Those of a block, by the names that its file has for them."""
        one = self.cuts[index]
        found = self.checkpoint.tensors
        return {name.removeprefix(one.prefix): found[name] for name in one.names}

    def block(self, index: int, name: str) -> Block:
        """What is to be known of a block with this digest."""
        one, tensors = self.cuts[index], self.tensors(index).values()
        return Block(
            kind=one.kind,
            layer=one.layer,
            digest=name,
            num_bytes=sum(stored.num_bytes for stored in tensors),
            tensors=one.names,
            prefix=one.prefix,
            layout=tuple((stored.dtype, stored.shape) for stored in tensors),
        )

    def chain(self, folder: Path, blocks: Sequence[Block], files: Mapping[str, str]) -> Chain:
        """The model of these blocks."""
        config = json.loads((self.checkpoint.folder / "config.json").read_bytes())
        return Chain(
            name=self.name, folder=folder, config=config, blocks=tuple(blocks), files=files
        )


@dataclass(frozen=True, kw_only=True)
class ZooSize:
    """What a zoo keeps, in bytes of tensors.

    Attributes:
        num_blocks: different ones.
        model_bytes: of all models, each as if it were alone.
        kept_bytes: of the blocks that are there.
    """

    num_models: int
    num_blocks: int
    model_bytes: int
    kept_bytes: int

    @property
    def saved_bytes(self) -> int:
        """What copies would have taken."""
        return self.model_bytes - self.kept_bytes


class BlockZoo:
    """Models in a folder, cut into blocks that are stored once by content.

    Several processes may use it, add to it and remove from it at the same time.

    Args:
        path: the folder. `BlockZoo.create` makes one.

    Raises BadZoo if the folder is no zoo.

    Example:
        >>> zoo = BlockZoo.create("zoo")
        >>> zoo.add("path/to/model", "base")
        >>> llm = vkv.LLM("zoo", model="base")

    Source: the block zoo of BlockLLM, arXiv:2404.18322, section 4.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().resolve()
        self._store = Store(self.path)
        self._store.check()

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> "BlockZoo":
        """The zoo in a folder, made if there is none yet. Raises BadZoo if something else is."""
        Store(Path(path).expanduser().resolve()).create()
        return cls(path)

    @staticmethod
    def is_zoo(path: str | os.PathLike[str]) -> bool:
        """Whether a folder is a zoo."""
        return Store(Path(path).expanduser()).is_there

    @property
    def models(self) -> tuple[str, ...]:
        """The names of its models."""
        return self._store.model_names()

    def chain(self, name: str) -> Chain:
        """A model. Raises UnknownModel, which names those that there are."""
        self._check_name(name)
        return read_manifest(self._store.models / name)

    def _check_name(self, name: str) -> None:
        if name not in self.models:
            raise UnknownModel(
                f"{self.path} has no model {name!r}; it has {', '.join(self.models) or 'none yet'}"
            )

    def chains(self) -> Iterator[Chain]:
        """All models."""
        return map(self.chain, self.models)

    def size(self) -> ZooSize:
        """What all of it takes, and what it would take as files of its own for each model."""
        chains = list(self.chains())
        kept = {block.digest: block.num_bytes for chain in chains for block in chain.blocks}
        return ZooSize(
            num_models=len(chains),
            num_blocks=len(kept),
            model_bytes=sum(chain.num_bytes for chain in chains),
            kept_bytes=sum(kept.values()),
        )

    # -- adding ----------------------------------------------------------------------------------

    def add(
        self,
        model: str | Path | None,
        name: str | None = None,
        *,
        instead: Mapping[int, StandIn] | None = None,
        progress: Progress | None = None,
    ) -> Added:
        """Cut a checkpoint into blocks and keep it under a name.

        Nothing of it can be seen until all is written. To add what is there already under that name
        does nothing.

        Args:
            model: a folder with *.safetensors, dense or quantised; None for the built-in model.
            name: in the zoo; by default the folder's.
            instead: blocks of the zoo to be used in place of this model's own, by the place of
                these among its blocks (`similarity.stand_ins`). One that is gone by now is not.
            progress: told the bytes of each block that is done.

        Raises BadCheckpoint or UnsupportedModel if it cannot be cut, InvalidConfig if the name is
        another model's or cannot be a folder's, BadZoo if the zoo cannot be written to.
        """
        cutting = self._cutting(model, name)
        try:
            with self._store.adding():
                return self._add(cutting, instead or {}, progress)
        except OSError as error:
            raise BadZoo(
                f"cannot write {cutting.name} to {self.path}: {error}; nothing was added"
            ) from error
        finally:
            self._tidy()

    def draft(self, model: str | Path | None, name: str | None = None) -> Chain:
        """What `add` would make of a checkpoint, with nothing written.

        Its folder is the checkpoint's, so that it has no blocks to read. Raises as `add`.
        """
        cutting = self._cutting(model, name)
        tensors = map(cutting.tensors, range(len(cutting.cuts)))
        with _threads() as pool:
            digests = list(pool.map(digest, tensors))
        return cutting.chain(
            cutting.checkpoint.folder,
            [cutting.block(index, found) for index, found in enumerate(digests)],
            {name: sha256(path) for name, path in cutting.checkpoint.other_files()},
        )

    def _cutting(self, model: str | Path | None, name: str | None) -> Cutting:
        checkpoint = Checkpoint(model)
        name = name if name is not None else checkpoint.folder.resolve().name
        if not _NAME.fullmatch(name):
            raise InvalidConfig(
                f"{name!r} cannot name a model; use letters, digits, points, - and _, and begin "
                "with a letter or digit"
            )
        return Cutting(name, checkpoint, cut(checkpoint.config, checkpoint.tensors))

    def _add(
        self, cutting: Cutting, instead: Mapping[int, StandIn], progress: Progress | None
    ) -> Added:
        def store(index: int) -> tuple[Block, bool]:
            found, is_new = self._keep(cutting, index, instead.get(index))
            if progress is not None:
                progress(found.num_bytes)
            return found, is_new

        with _threads() as pool:
            stored = list(pool.map(store, range(len(cutting.cuts))))
        chain = cutting.chain(
            self._store.models / cutting.name,
            [found for found, _ in stored],
            {n: self._store.add_file(path) for n, path in cutting.checkpoint.other_files()},
        )
        try:
            self._publish(cutting.checkpoint, chain)
        except FileExistsError:
            there = self.chain(chain.name)
            if (there.digest, dict(there.files)) != (chain.digest, dict(chain.files)):
                raise InvalidConfig(
                    f"{self.path} has another model {chain.name!r}; remove that first, or add this "
                    "one as MODEL=NAME"
                ) from None
        new = {found.digest: found.num_bytes for found, is_new in stored if is_new}
        return Added(chain=chain, num_new=len(new), new_bytes=sum(new.values()))

    def _keep(self, cutting: Cutting, index: int, other: StandIn | None) -> tuple[Block, bool]:
        """The block of the zoo that is to compute a part of a model, and whether it is new."""
        tensors = cutting.tensors(index)
        if other is None or not self._store.block_path(other.digest).is_file():
            found, is_new = self._store.add_block(tensors)
            return cutting.block(index, found), is_new
        own = digest(tensors)
        if own == other.digest:
            return cutting.block(index, own), False
        behind = Approximated(digest=own, of=other.of, similarity=other.similarity)
        return replace(cutting.block(index, other.digest), approximated=behind), False

    def _publish(self, checkpoint: Checkpoint, chain: Chain) -> None:
        """Make the model's folder. Raises FileExistsError if the name is taken."""
        with self._store.new_model(chain.name) as folder:
            for path in checkpoint.own_files():
                write_through(folder / path.name, path.read_bytes())
            for name, found in chain.files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).symlink_to("../" * (name.count("/") + 2) + f"files/{found}")
            write_through(folder / MANIFEST, manifest(chain))

    # -- taking away -----------------------------------------------------------------------------

    def remove(self, *names: str) -> int:
        """Take models away, and the blocks that no other one uses; returns the bytes set free.

        A process that has loaded such a model keeps it, and the system has the bytes again when
        that has ended. Waits for whoever is adding. Raises UnknownModel, with nothing removed.
        """
        with self._store.alone():
            for name in names:
                self._check_name(name)
            try:
                for name in dict.fromkeys(names):
                    self._store.remove_model(name)
                return self._sweep()
            except OSError as error:
                raise BadZoo(f"cannot remove from {self.path}: {error}") from error

    def verify(self, *, progress: Progress | None = None) -> list[str]:
        """Read every block and file again; returns what is wrong, in words.

        Args:
            progress: told the bytes of each block that is done.
        """
        chains, found = [], []
        for name in self.models:
            try:
                chains.append(self.chain(name))
            except BadZoo as error:
                found.append(str(error))
        blocks = {block.digest: block for chain in chains for block in chain.blocks}
        files = sorted({name for chain in chains for name in chain.files.values()})

        def damage(block: Block) -> str | None:
            what = self._store.damage_of_block(block.digest)
            if progress is not None:
                progress(block.num_bytes)
            return what and f"{what} ({self._users(block.digest, chains)})"

        with _threads() as pool:
            found += filter(None, pool.map(damage, blocks.values()))
        found += filter(None, map(self._store.damage_of_file, files))
        return found

    @staticmethod
    def _users(name: str, chains: list[Chain]) -> str:
        """Which places of which models a block is."""
        return ", ".join(
            f"{block.place} of {chain.name}"
            for chain in chains
            for block in chain.blocks
            if block.digest == name
        )

    def _tidy(self) -> None:
        """Take away what was left by those who were stopped, unless somebody is adding."""
        with self._store.alone_if_possible() as is_alone:
            if is_alone:
                self._sweep()

    def _sweep(self) -> int:
        try:
            chains = list(self.chains())
        except BadZoo:  # of a model whose manifest is damaged nobody knows what it uses
            return 0
        blocks = {block.digest for chain in chains for block in chain.blocks}
        return self._store.sweep(blocks, {n for chain in chains for n in chain.files.values()})


def _threads() -> ThreadPoolExecutor:
    """To hash on, which lets go of the interpreter."""
    return ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))))
