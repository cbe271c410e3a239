"""The models that an engine runs together: its own, and relatives that share blocks with it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...allocator import MemoryLimit
from ...quant.names import ModelNames
from ...vmem.errors import InvalidConfig, UnknownModel, VkvError
from ..blocks.chain import Block, Chain
from ..model.extras.kept_weights import KeptWeights, bring_each
from ..model.loading import LoadedModel
from ..request.spec import ChainKey
from .copies import BlockCopy, Layout, copy_block
from .sites import Sites
from .steps import ChainStep, Modules, Run
from .voices import Voice, voice_of

_Place = tuple[str, str, int | None, str]  # a block's digest, kind, layer, and where in these


@dataclass(frozen=True, kw_only=True)
class ChainStats:
    """One of the models, a moment ago.

    Attributes:
        name, digest: as of `ChainKey`.
        num_requests: unfinished ones.
        num_rows: tokens that were computed by it.
        own_bytes, shared_bytes: of its blocks, those that the engine's own model lacks, and those
            that are in memory once for both; as they are stored.
        is_here: all of it is in memory.
    """

    name: str
    digest: str
    num_requests: int
    num_rows: int
    own_bytes: int
    shared_bytes: int
    is_here: bool


@dataclass(frozen=True, kw_only=True)
class BlockStats:
    """A block that the engine's own model lacks.

    Attributes:
        place, digest: where in a model, in words, and which.
        models: those that have it there.
        num_bytes: what it takes in memory now; 0 if it is not there.
        num_calls, num_rows: steps that called it, and the rows that they called it for.
    """

    place: str
    digest: str
    models: tuple[str, ...]
    num_bytes: int
    num_calls: int
    num_rows: int


class _Relative:
    """What is known of a model beside the engine's own."""

    def __init__(self, key: ChainKey, chain: Chain, base: Chain) -> None:
        self.key = key
        self.chain = chain
        same = chain.same_as(base)
        self.own = {
            _place(block): block
            for block, is_same in zip(chain.blocks, same, strict=True)
            if not is_same
        }
        self.own_bytes = sum(block.num_bytes for block in self.own.values())
        self.num_rows = 0
        self.problem: VkvError | None = None  # why it does not fit the model any more
        self.modules: Modules | None = None  # while all of its own blocks are in memory


class Chains:
    """Models of a zoo that run together, each block of them in memory once.

    The engine's own is in memory as any model is. Of the others only blocks are that it lacks, from
    when a step first needs them; they are found by content, whoever has them.

    Args:
        loaded: the engine's own model.
        chain: the same, as the zoo has it.
        others: the models that run beside it.
        limit: what their memory counts under.
        repeatable, lm_head_bits, activation_bits, generation_config: as of `EngineConfig`.

    Attributes:
        num_gone: times that a block's memory was given back, so that what was recorded with it does
            not hold.
        is_their_turn: of a batch with adapters, too, requests of other models are computed next.
        voices: of the models, by name; None for the engine's own.

    Raises ChainMismatch if some cannot run together, InvalidConfig for models that none can.

    Source: BlockLLM, arXiv:2404.18322, section 4.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        chain: Chain,
        others: Iterable[Chain],
        *,
        limit: MemoryLimit,
        repeatable: bool,
        lm_head_bits: int | None,
        activation_bits: int,
        generation_config: str | Path,
    ) -> None:
        if loaded.keeps_state:
            raise InvalidConfig(
                f"{chain.name} keeps recurrent or convolution state, and such models do not run "
                "together; open each by itself, as the folder of it in the zoo"
            )
        self._model = loaded.model
        self._layout = Layout.of(
            loaded,
            repeatable=repeatable,
            lm_head_bits=lm_head_bits,
            activation_bits=activation_bits,
        )
        self._sites = Sites(loaded.model)
        self._chain = chain
        self._memory: KeptWeights[_Place, BlockCopy] = KeptWeights(limit, self._gone)
        self.num_gone = 0
        self.is_their_turn = True
        self._calls: Counter[_Place] = Counter()
        self._rows: Counter[_Place] = Counter()
        own_kv = self._kv_digest(chain)
        self._relatives: dict[ChainKey, _Relative] = {}
        for other in others:
            chain.check_fits(other)
            kv = self._kv_digest(other)
            key = ChainKey(other.name, other.digest, "" if kv == own_kv else kv)
            self._relatives[key] = _Relative(key, other, chain)
        self.voices: dict[str, Voice | None] = {chain.name: None} | {
            key.name: voice_of(one.chain, key, chain, loaded, generation_config)
            for key, one in self._relatives.items()
        }

    # -- by name -----------------------------------------------------------------------------

    def eos_token_ids(self, key: ChainKey) -> frozenset[int]:
        """Tokens that end a text of a model."""
        voice = self.voices[key.name]
        assert voice is not None, "it is not the engine's own"
        return voice.eos_token_ids

    def check(self, key: ChainKey) -> None:
        """Raises UnknownModel unless requests may be computed by this model here, InvalidConfig if
        memory will never have room for it."""
        if key in self._relatives:
            own_bytes, limit_bytes = self._relatives[key].own_bytes, self._memory.limit_bytes
            if own_bytes > limit_bytes:
                raise InvalidConfig(
                    f"{key.name!r} has {own_bytes} bytes of its own, and kv_memory, which they "
                    f"count under, is {limit_bytes}; raise it"
                )
            return
        find_voice(self.voices, key.name)
        raise UnknownModel(
            f"the model {key.name!r} is another here than where it was asked for; open the same "
            "zoo, with the same model as its first, in both places"
        )

    def _kv_digest(self, chain: Chain) -> str:
        """Of the blocks that keys and values depend on: all but what comes behind attention."""
        names = ModelNames(self._model, ())
        digest = hashlib.sha256()
        last = max((b.layer for b in chain.blocks if b.layer is not None), default=None)
        for block in chain.blocks:
            if block.kind == "head" or self._is_last_norm(block, names):
                continue
            is_last = block.kind == "feed_forward" and block.layer == last
            if is_last and self._sites.anatomy.feeds_forward_last():
                continue
            digest.update(f"{block.kind} {block.layer} {block.digest}\n".encode())
        return digest.hexdigest()

    def _is_last_norm(self, block: Block, names: ModelNames) -> bool:
        if block.kind != "norm":
            return False
        modules = {names(tensor).rpartition(".")[0] for tensor in block.tensors}
        return all(map(self._sites.anatomy.is_behind, modules))

    # -- in memory -----------------------------------------------------------------------------

    def provide(self, keys: Iterable[ChainKey]) -> dict[ChainKey, VkvError]:
        """Have the blocks of a step's models in memory; returns those that lack some, and why.

        OutOfPages for those that lack memory now, another error for those that cannot be read.
        Models that come first get memory first. All stay until the next call.
        """
        wanted = list(dict.fromkeys(keys))
        pinned: set[_Place] = set()
        for key in wanted:
            pinned |= self._relatives[key].own.keys() if key in self._relatives else set()
        self._memory.pin(pinned)
        return bring_each(wanted, self._bring)

    def _bring(self, key: ChainKey) -> None:
        relative = self._relatives.get(key)
        if relative is None:
            raise UnknownModel(f"the model {key.name!r} is not here any more")
        if relative.problem is not None:
            raise relative.problem
        modules: dict[str, nn.Module] = {}
        for place, block in relative.own.items():
            self._memory.bring(
                place,
                block.num_bytes,
                lambda block=block: self._copy(relative.chain, block),
                f"the {block.place} of {key.name!r}",
            )
            modules |= self._memory[place].modules
        if relative.modules is None:
            self._sites.install(list(modules))
            relative.modules = modules

    def _copy(self, chain: Chain, block: Block) -> tuple[BlockCopy, int]:
        copy = copy_block(chain, block, self._sites, self._layout)
        return copy, copy.num_bytes

    def _gone(self, place: _Place) -> None:
        self.num_gone += 1
        for relative in self._relatives.values():
            if place in relative.own:
                relative.modules = None

    def forget(self) -> int:
        """Give the memory of all blocks back but the model's own; returns the bytes."""
        return self._memory.clear()

    # -- steps -----------------------------------------------------------------------------------

    def order(self, key: ChainKey | None) -> tuple[str, ...]:
        """What a step's rows are sorted by: those that share blocks come together."""
        if key is None or key not in self._relatives:
            return ()
        return tuple(digest for digest, *_ in self._relatives[key].own)

    def step(
        self,
        rows: Sequence[tuple[ChainKey | None, int]],
        kept: Sequence[tuple[ChainKey | None, int]] | None,
        device: torch.device,
        *,
        is_recorded: bool = False,
    ) -> ChainStep:
        """For a step of so many rows of each model in turn, all of which are in memory."""
        step = ChainStep(
            [self._run(*run) for run in rows],
            None if kept is None else [self._run(*run) for run in kept],
            device,
        )
        if is_recorded:
            step.prepare(self._sites.names)
        return step

    def _run(self, key: ChainKey | None, count: int) -> Run:
        if key is None:
            return {}, count
        modules = self._relatives[key].modules
        assert modules is not None, "a model of the step is not in memory"
        return modules, count

    def count(self, rows: Sequence[tuple[ChainKey | None, int]]) -> None:
        """Note that a step of these rows is computed."""
        by_place: Counter[_Place] = Counter()
        for key, count in rows:
            if key is not None:
                relative = self._relatives[key]
                relative.num_rows += count
                by_place.update(dict.fromkeys(relative.own, count))
        self._calls.update(by_place.keys())
        self._rows.update(by_place)

    # -- the model -----------------------------------------------------------------------------

    def model_changed(self) -> None:
        """Somebody changed the engine's own model: part ways at the modules that it has now.

        What its relatives were said to share with it they do not share any more.
        """
        self.forget()
        self._sites.uninstall()
        self._sites = Sites(self._model)
        problem = InvalidConfig(
            f"{self._chain.name} was changed, and others were computed by blocks of it; open the "
            "zoo again"
        )
        for relative in self._relatives.values():
            relative.problem = problem

    def stats(
        self, requests: Iterable[ChainKey | None]
    ) -> tuple[tuple[ChainStats, ...], tuple[BlockStats, ...]]:
        """Each relative, and each block that some have of their own; `requests` are unfinished."""
        count = Counter(requests)
        models = tuple(
            ChainStats(
                name=one.key.name,
                digest=one.key.digest,
                num_requests=count[one.key],
                num_rows=one.num_rows,
                own_bytes=one.own_bytes,
                shared_bytes=one.chain.num_bytes - one.own_bytes,
                is_here=all(place in self._memory for place in one.own),
            )
            for one in self._relatives.values()
        )
        return models, tuple(self._block_stats())

    def _block_stats(self) -> Iterator[BlockStats]:
        users: dict[_Place, list[str]] = {}
        blocks: dict[_Place, Block] = {}
        for relative in self._relatives.values():
            for place, block in relative.own.items():
                users.setdefault(place, []).append(relative.key.name)
                blocks[place] = block
        for place, block in blocks.items():
            yield BlockStats(
                place=block.place,
                digest=block.digest,
                models=tuple(users[place]),
                num_bytes=self._memory.num_bytes(place),
                num_calls=self._calls[place],
                num_rows=self._rows[place],
            )

    def close(self) -> None:
        """Leave the model as it was, and give all memory back. Closing twice is harmless."""
        self.forget()
        self._sites.uninstall()


def find_voice(voices: Mapping[str, Voice | None], name: str) -> Voice | None:
    """The model of a name; None for the engine's own. Raises UnknownModel, naming those that there
    are."""
    if isinstance(name, str) and name in voices:
        return voices[name]
    there = f"there are {', '.join(sorted(voices))}" if voices else "there is one, without a name"
    raise UnknownModel(f"there is no model {name!r} here; {there}")


def _place(block: Block) -> _Place:
    return block.digest, block.kind, block.layer, block.prefix
