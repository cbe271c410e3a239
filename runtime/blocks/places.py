"""Which model is meant: a folder, a hub id, or one of a zoo."""

import logging
import os
from pathlib import Path

from transformers import PreTrainedModel

from ...vmem.errors import InvalidConfig
from ..model.loading import StoredTensors
from .chain import MANIFEST, Chain, read_manifest
from .zoo import BlockZoo

_log = logging.getLogger(__name__)

Source = str | Path | PreTrainedModel | BlockZoo | None


def pick(source: Source, model: Source = None) -> str | Path | PreTrainedModel | None:
    """One name for what `LLM(source, model=model)` is to load.

    Either alone is that itself. Both together are a zoo and the name of a model in it, and become
    the folder of that model, which any process can load. A zoo alone that has one model is that
    model.

    Raises BadZoo, UnknownModel, and InvalidConfig for what cannot go together.
    """
    if source is None:
        source, model = model, None
    if not isinstance(source, BlockZoo):
        is_path = isinstance(source, str | os.PathLike)
        if model is None and not (is_path and BlockZoo.is_zoo(source)):
            return source
        if not is_path:
            raise InvalidConfig(
                f"a {type(source).__name__} and model={model!r} were given; give one of them, or a "
                "zoo and the name of a model in it"
            )
        source = BlockZoo(source)
    if model is None:
        return _only(source)
    if not isinstance(model, str):
        raise InvalidConfig(f"model is {model!r}; with a zoo, give the name of a model in it")
    return source.chain(model).folder


def _only(zoo: BlockZoo) -> Path:
    """The folder of the one model in a zoo."""
    if len(zoo.models) != 1:
        raise InvalidConfig(
            f"{zoo.path} is a zoo of {len(zoo.models)} models, {', '.join(zoo.models)}; say which "
            "by model=NAME"
            if zoo.models
            else f"{zoo.path} is a zoo without models; `vkv blocks add` adds one"
        )
    return zoo.chain(zoo.models[0]).folder


def locate(
    source: Source, model: Source = None
) -> tuple[str | Path | PreTrainedModel | None, StoredTensors | None]:
    """What to load a model from, and its weights if they are not in that folder.

    Arguments and errors are those of `pick`.
    """
    found = pick(source, model)
    if isinstance(found, str | Path):
        folder = Path(found).expanduser()
        if (folder / MANIFEST).is_file():
            chain = read_manifest(folder.resolve())
            _warn_of_others(chain)
            return folder, chain
    return found, None


def _warn_of_others(chain: Chain) -> None:
    """Say that a model does not compute with its own blocks alone."""
    alike = [b.approximated.similarity for b in chain.blocks if b.approximated is not None]
    if alike:
        _log.warning(
            "%s is approximated: %d of its %d blocks are other models', with outputs that were "
            "%.4f alike or more; its answers differ from its own",
            chain.name,
            len(alike),
            len(chain.blocks),
            min(alike),
        )
