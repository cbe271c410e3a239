"""A model's folder as it is published: its tensors, wherever they lie, and its other files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ...vmem.errors import BadCheckpoint, UnsupportedModel
from ..model.loading import writing_part
from ..model.reading import reading, resolve
from .tensor_file import Stored, read_header

_INDEX = "model.safetensors.index.json"
_OTHERS = (
    *("*.json", "*.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "additional_chat_templates/*.jinja"),
)
_OWN = ("config.json", "generation_config.json")  # small, and each model's own


class Checkpoint:
    """A folder with *.safetensors, in one file or in shards, dense or quantised.

    Attributes:
        folder: where it is.
        config: of what writes its text.
        tensors: by name.

    Raises BadCheckpoint if it cannot be read or a shard is missing, UnsupportedModel if its weights
    are of another kind.
    """

    def __init__(self, source: str | Path | None) -> None:
        home = resolve(source)
        if not isinstance(home, Path) or home.is_file() or home.suffix == ".gguf":
            raise UnsupportedModel(
                f"{home} is no folder with *.safetensors, and others are not cut into blocks; "
                "give a model's folder (hf download MODEL --local-dir FOLDER)"
            )
        self.folder = home
        self.config: PretrainedConfig = writing_part(
            reading(
                "config", home, lambda: AutoConfig.from_pretrained(home, trust_remote_code=False)
            )
        )
        self.tensors = _tensors(home)

    def own_files(self) -> Iterator[Path]:
        """Its configs."""
        yield from (self.folder / name for name in _OWN if (self.folder / name).is_file())

    def other_files(self) -> Iterator[tuple[str, Path]]:
        """What else belongs to the model, such as its tokenizer: names in the folder, and paths."""
        for pattern in _OTHERS:
            for path in sorted(self.folder.glob(pattern)):
                name = path.relative_to(self.folder).as_posix()
                if path.is_file() and name not in _OWN and not name.endswith(".index.json"):
                    yield name, path


def _tensors(folder: Path) -> dict[str, Stored]:
    """All tensors by name: those of the one file, or of the shards."""
    found: dict[str, Stored] = {}
    for file, names in _shards(folder).items():
        header = read_header(file)
        if missing := sorted((names or set()) - header.keys()):
            raise BadCheckpoint(
                f"{file} lacks {len(missing)} tensors that {_INDEX} says are there, among them "
                f"{missing[0]}; download it again"
            )
        found |= {name: one for name, one in header.items() if names is None or name in names}
    return found


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files, and which tensors of each count; None for all."""
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file():
        return {folder / "model.safetensors": None}
    if not index.is_file():
        kinds = sorted({path.suffix for path in folder.glob("*.[bp][it]*")})
        raise UnsupportedModel(
            f"{folder} has no model.safetensors and no {_INDEX}, and weights of other kinds "
            f"({', '.join(kinds) or 'none are there'}) are not cut into blocks; save the model "
            "with transformers' save_pretrained"
        )
    try:
        places: dict[str, Any] = json.loads(index.read_bytes())["weight_map"]
        shards: dict[Path, set[str] | None] = {}
        for name, file in places.items():
            names = shards.setdefault(folder / file, set())
            assert names is not None
            names.add(name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{index} cannot be read: {error}; download it again") from error
    if missing := [file for file in shards if not file.is_file()]:
        raise BadCheckpoint(
            f"{folder} lacks {len(missing)} of {len(shards)} shards, among them {missing[0].name}; "
            "download the rest"
        )
    return shards
