"""A model of a zoo: its blocks in order, and its tensors mapped from their files."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ...quant.loading import described_in
from ...vmem.errors import BadCheckpoint, BadZoo, ChainMismatch
from .cutting import Kind
from .store import Store
from .tensor_file import map_tensors

Place = tuple[Kind, int | None, int]  # kind, layer, and which of these
MANIFEST = "chain.json"  # in a model's folder, in place of its *.safetensors
_FORMAT = "vkv chain 1"
# What a config says beside how to compute, and which may so differ between models of one batch.
_OF_NO_ACCOUNT = frozenset(
    (
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("use_cache", "task_specific_params", "finetuning_task", "id2label", "label2id"),
        *("output_attentions", "output_hidden_states", "return_dict", "problem_type"),
        "chunk_size_feed_forward",
    )
)
_VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class Approximated:
    """What stands behind a block that is another model's, since the two compute almost the same.

    Attributes:
        digest: of the model's own block, which is not kept for its sake.
        of: the model whose block is used in its place.
        similarity: of their outputs, at least, as it was measured (`similarity.py`).
    """

    digest: str
    of: str
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tensors of a model that are stored, and computed, together.

    Attributes:
        kind: "embedding", "attention" and "feed_forward" of a layer, each with its norms, "norm"
            (behind the layers), "head", or "other"; "layer" for one in which attention cannot be
            told from the rest.
        layer: counted from 0; None outside of layers.
        digest: SHA-256 of names, dtypes, shapes and bytes, in hexadecimal digits. Blocks of one
            digest are equal, whatever model and layer they are of.
        num_bytes: of its tensors.
        tensors: what the checkpoint calls them.
        prefix: what these begin with, and the names in the block's file leave out.
        layout: dtype and shape of each.
        approximated: set for a block that is not the model's own.
    """

    kind: Kind
    layer: int | None
    digest: str
    num_bytes: int
    tensors: tuple[str, ...]
    prefix: str
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    approximated: Approximated | None = None

    @property
    def place(self) -> str:
        """Where in a model it is, in words: "attention of layer 3"."""
        kind = self.kind.replace("_", "-")
        return kind if self.layer is None else f"{kind} of layer {self.layer}"

    @property
    def relative_names(self) -> tuple[str, ...]:
        """What its file calls its tensors."""
        return tuple(name.removeprefix(self.prefix) for name in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A model as a zoo has it.

    Attributes:
        folder: config and tokenizer, as of any model's folder; the manifest is there, too.
        config: what config.json says.
        blocks: in the order of computing.
        files: digests of its other files, by name.
    """

    name: str
    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the model computes: its config and its blocks."""
        said = {k: v for k, v in self.config.items() if k not in _OF_NO_ACCOUNT}
        blocks = [(b.kind, b.layer, b.digest, b.relative_names) for b in self.blocks]
        text = json.dumps(["vkv chain 1", said, blocks], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Of all its blocks, those it shares and those that it has several times included."""
        return sum(block.num_bytes for block in self.blocks)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where each block is, by which those of two models are set beside each other."""
        seen: Counter[tuple[Kind, int | None]] = Counter()
        found = []
        for block in self.blocks:
            found.append((block.kind, block.layer, seen[block.kind, block.layer]))
            seen[block.kind, block.layer] += 1
        return tuple(found)

    def read(self, block: Block) -> dict[str, torch.Tensor]:
        """The tensors of a block by the checkpoint's names, mapped from disk and not copied.

        Raises BadCheckpoint if its file is gone or damaged.
        """
        mapped = map_tensors(self.file_of(block))
        names = dict(zip(block.relative_names, block.tensors, strict=True))
        if mapped.keys() != names.keys():
            raise BadCheckpoint(
                f"the {block.place} of {self.folder} has other tensors than its manifest says; add "
                "the model again"
            )
        return {names[relative]: tensor for relative, tensor in mapped.items()}

    def file_of(self, block: Block) -> Path:
        """Where a block's tensors are mapped from."""
        return self._store.block_path(block.digest)

    @property
    def tensor_files(self) -> list[Path]:
        """Those of all blocks."""
        return [self.file_of(block) for block in self.blocks]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of the checkpoint's tensors, as of `read`."""
        return {name: one for block in self.blocks for name, one in self.read(block).items()}

    def same_as(self, other: "Chain") -> tuple[bool, ...]:
        """For each of this chain's blocks, whether `other` has an equal one in that place."""
        theirs = dict(zip(other.places, other.blocks, strict=True))
        return tuple(
            place in theirs and theirs[place].digest == block.digest
            for place, block in zip(self.places, self.blocks, strict=True)
        )

    def check_fits(self, other: "Chain") -> None:
        """See whether two chains can run in one batch: they may differ in numbers alone.

        Raises ChainMismatch, naming the first thing that differs: in the config, in how weights are
        stored, in a block's tensors, or in what tokens mean.
        """
        for what, mine, theirs in self._compared(other):
            if mine != theirs:
                raise ChainMismatch(
                    f"{self.name} and {other.name} cannot run together: {what} is {mine!r} of the "
                    f"one and {theirs!r} of the other; serve each by itself"
                )

    def _compared(self, other: "Chain") -> Iterator[tuple[str, Any, Any]]:
        """What must agree: its name, and what either says of it."""
        mine, theirs = _settled(self), _settled(other)
        yield "model_type", mine.get("model_type"), theirs.get("model_type")
        for name in ("quantization_config", *sorted(mine.keys() | theirs.keys())):
            yield f"{name} in config.json", mine.get(name), theirs.get(name)
        here = dict(zip(self.places, self.blocks, strict=True))
        there = dict(zip(other.places, other.blocks, strict=True))
        for place in {**here, **there}:
            one, two = here.get(place), there.get(place)
            tensors = _layout(one), _layout(two)
            where = (one or two).place  # type: ignore[union-attr]
            for name in {**tensors[0], **tensors[1]}:
                yield f"{name} in the {where}", tensors[0].get(name), tensors[1].get(name)
        if dict(self.files) != dict(other.files):
            yield "the vocabulary", _vocabulary(self), _vocabulary(other)

    @property
    def _store(self) -> Store:
        return Store(self.folder.parent.parent)


def _layout(block: Block | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    return dict(zip(block.relative_names, block.layout, strict=True)) if block else {}


def _settled(chain: Chain) -> dict[str, Any]:
    """A config with what it leaves to its defaults, and without what is of no account."""
    config = AutoConfig.from_pretrained(chain.folder, trust_remote_code=False)
    said = config.to_dict()
    described = described_in(config)
    said["quantization_config"] = described
    return {name: value for name, value in said.items() if name not in _OF_NO_ACCOUNT}


def _vocabulary(chain: Chain) -> str:
    """What tells which tokens there are, and their texts; templates and defaults may differ."""
    found = hashlib.sha256()
    if "tokenizer.json" in chain.files:
        said = json.loads((chain.folder / "tokenizer.json").read_bytes())
        added = [(token["id"], token["content"]) for token in said.get("added_tokens", ())]
        found.update(json.dumps([said.get("model"), added], sort_keys=True).encode())
    else:
        found.update(repr([chain.files.get(name) for name in _VOCABULARIES]).encode())
    return found.hexdigest()[:12]


# -- the manifest --------------------------------------------------------------------------------


def manifest(chain: Chain) -> bytes:
    """What tells a chain, to be kept beside its folder's other files."""
    said = {
        "format": _FORMAT,
        "digest": chain.digest,
        "files": dict(chain.files),
        "blocks": [_said_of(block) for block in chain.blocks],
    }
    return json.dumps(said, indent=1).encode()


def _said_of(block: Block) -> dict[str, Any]:
    said = asdict(block)
    said["tensors"] = {
        name: [dtype, list(shape)]
        for name, (dtype, shape) in zip(block.relative_names, said.pop("layout"), strict=True)
    }
    if block.approximated is None:
        del said["approximated"]
    return said


def read_manifest(folder: Path) -> Chain:
    """The chain of a model's folder. Raises BadZoo if it cannot be read."""
    try:
        said = json.loads((folder / MANIFEST).read_bytes())
        if said["format"] != _FORMAT:
            raise BadZoo(f"{folder} has a manifest of format {said['format']!r}; use a newer vkv")
        chain = Chain(
            name=folder.name,
            folder=folder,
            config=json.loads((folder / "config.json").read_bytes()),
            blocks=tuple(_block_of(block) for block in said["blocks"]),
            files=said["files"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, BadZoo):
            raise
        raise BadZoo(
            f"{folder / MANIFEST} cannot be read: {error}; remove the model and add it again"
        ) from error
    if chain.digest != said["digest"]:
        raise BadZoo(
            f"{folder} was changed since it was added: its manifest or config.json is not what it "
            "was; remove the model and add it again"
        )
    return chain


def _block_of(said: dict[str, Any]) -> Block:
    tensors, other = said["tensors"], said.get("approximated")
    return Block(
        kind=said["kind"],
        layer=said["layer"],
        digest=said["digest"],
        num_bytes=said["num_bytes"],
        tensors=tuple(said["prefix"] + name for name in tensors),
        prefix=said["prefix"],
        layout=tuple((dtype, tuple(shape)) for dtype, shape in tensors.values()),
        approximated=Approximated(**other) if other else None,
    )
