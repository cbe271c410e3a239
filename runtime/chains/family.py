"""Which models of a zoo run together: one that is loaded as any model is, and its relatives."""

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ...vmem.errors import ChainMismatch, InvalidConfig, UnknownModel
from ..blocks.chain import MANIFEST, Chain, read_manifest
from ..blocks.places import Source, pick
from ..blocks.zoo import BlockZoo
from ..model.reading import reading
from ..model.recurrent_state import keeps_state

Place = str | Path | PreTrainedModel | None  # of a model, without a name beside it

_log = logging.getLogger(__name__)


def gather(source: Source, model: Source) -> tuple[Place, dict[str, Any]]:
    """What `LLM(source, model=model)` loads, and options of `EngineConfig` that follow from it.

    These name the models of a zoo that run beside it. Of a zoo without a name for `model` the one
    is loaded that shares most with the others. Those that cannot run beside it are left out, and a
    warning says why. Raises as `pick`.
    """
    if source is None:
        source, model = model, None
    if isinstance(source, str | os.PathLike) and BlockZoo.is_zoo(source):
        source = BlockZoo(source)
    if not isinstance(source, BlockZoo) or not source.models:
        return pick(source, model), {}
    if model is None:
        model = foundation(list(source.chains())).name
    folder = pick(source, model)
    base = source.chain(str(model))
    others = [one for one in source.chains() if one.name != base.name]
    beside = tuple(_able(base, others))
    return folder, {"models": beside} if beside else {}


def _able(base: Chain, others: Iterable[Chain]) -> Iterator[str]:
    """Those that can run beside a model."""
    config = reading("config", base.folder, lambda: AutoConfig.from_pretrained(base.folder))
    if keeps_state(config):
        return
    for other in others:
        try:
            base.check_fits(other)
            yield other.name
        except ChainMismatch as mismatch:
            _log.warning("%s is not served here: %s", other.name, mismatch)


def neighbours(folder: str, names: Iterable[str]) -> tuple[Chain, list[Chain]]:
    """The model of a zoo in this folder, and others of that zoo.

    Raises InvalidConfig for a folder that is in no zoo, UnknownModel.
    """
    home = Path(folder)
    if not (home / MANIFEST).is_file():
        raise InvalidConfig(
            f"models is {list(names)!r}, and {folder} is no model of a zoo; `vkv blocks add` makes "
            "one, and LLM(zoo) runs its models together"
        )
    chain = read_manifest(home.resolve())
    zoo = BlockZoo(chain.folder.parent.parent)
    wanted = list(dict.fromkeys(names))
    if chain.name in wanted:
        raise UnknownModel(f"models has {chain.name!r}, which is the engine's own; leave it out")
    return chain, [zoo.chain(name) for name in wanted]


def foundation(chains: Collection[Chain]) -> Chain:
    """The one that shares most bytes with the others; of several the first."""

    def shared_bytes(one: Chain) -> int:
        return sum(
            block.num_bytes
            for other in chains
            if other is not one
            for block, is_same in zip(other.blocks, other.same_as(one), strict=True)
            if is_same
        )

    return max(chains, key=shared_bytes)
