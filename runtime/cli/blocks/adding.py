"""`vkv blocks add`, with its bar, and what it says of models that are not quite their own."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ....vmem.errors import BadCheckpoint, InvalidConfig
from ...blocks.chain import Chain
from ...blocks.checkpoint import Checkpoint
from ...blocks.similarity import Similar, stand_ins
from ...blocks.zoo import Added, BlockZoo
from ...frontend.progress import counted
from ...model.loading import load_tokenizer

_MOST_TOKENS = 256  # of a prompt
_PROMPTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Dear Ms Lindqvist,\nthank you for your order of 3 March. It was shipped this morning.",
    "Q: A train leaves at 9:40 and takes two and a half hours. When does it arrive?\nA: At 12:10.",
    "In the beginning there was only the sea, and the wind that went over it at night.",
    "SELECT name, COUNT(*) FROM orders WHERE paid = 1 GROUP BY name ORDER BY 2 DESC LIMIT 10;",
    "El perro duerme junto a la puerta mientras los niños juegan en el jardín.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
)


def add_models(
    zoo: BlockZoo,
    models: Sequence[str],
    similar: float | None,
    prompts: Path | None,
    *,
    as_json: bool,
) -> None:
    """Add each of `models`, written as FOLDER or FOLDER=NAME, and print what came of it."""
    pairs = [_split(model) for model in models]
    console = Console(stderr=True)
    said = []
    for folder, name in pairs:
        found = Similar(instead={}, vocabulary=None)
        if similar is not None:
            draft = zoo.draft(folder, name)
            found = _measured(zoo, draft, similar, prompts)
        with byte_bar(f"adding {name or folder}", _num_bytes(folder)) as progress:
            added = zoo.add(folder, name, instead=found.instead, progress=progress)
        said.append(_said_of(added, found))
        if not as_json:
            _show(console, added, found)
    if as_json:
        typer.echo(json.dumps(said))


def _split(model: str) -> tuple[str, str | None]:
    """A folder, and a name if one is given. A folder may have = in its name."""
    folder, is_pair, name = model.rpartition("=")
    if not is_pair or Path(model).is_dir():
        return model, None
    return folder, name


def _num_bytes(folder: str) -> int:
    return sum(stored.num_bytes for stored in Checkpoint(folder).tensors.values())


def _measured(zoo: BlockZoo, draft: Chain, threshold: float, prompts: Path | None) -> Similar:
    tokens = read_prompts(draft, prompts)
    with counted(f"comparing {draft.name}", len(tokens) * max(1, len(zoo.models))) as count:
        return stand_ins(zoo, draft, tokens, threshold, progress=count)


def read_prompts(chain: Chain, path: Path | None) -> list[list[int]]:
    """Token ids of prompts, by the model's tokenizer: of a file's lines, or our own.

    Raises InvalidConfig for a file that cannot be read, BadCheckpoint if there is no tokenizer.
    """
    texts: Sequence[str] = _PROMPTS
    if path is not None:
        try:
            texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"cannot read {path} as UTF-8 text: {error}") from error
    tokenizer = load_tokenizer(chain.folder)
    if tokenizer is None:
        raise BadCheckpoint(
            f"{chain.folder} has no tokenizer, which prompts need to compare models; add its files"
        )
    found: list[list[int]] = [tokenizer(text, verbose=False)["input_ids"] for text in texts]  # type: ignore[misc]
    return [tokens[:_MOST_TOKENS] for tokens in found if len(tokens) > 1]


@contextmanager
def byte_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error; the function that it yields counts bytes."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(label),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _show(console: Console, added: Added, found: Similar) -> None:
    chain = added.chain
    console.print(
        f"{chain.name}: {len(chain.blocks)} blocks of {chain.num_bytes / 2**20:.1f} MiB, of which "
        f"{added.num_new} were new, {added.new_bytes / 2**20:.1f} MiB"
    )
    others = [block for block in chain.blocks if block.approximated is not None]
    for block in others:
        behind = block.approximated
        assert behind is not None
        console.print(f"  {block.place}: that of {behind.of}, {behind.similarity:.4f} alike")
    if others and found.vocabulary is not None:
        console.print(
            f"[bold yellow]{chain.name} is approximated:[/] {len(others)} of its blocks are other "
            f"models', and its answers are not quite its own. Probabilities of tokens are "
            f"{found.vocabulary.mean:.4f} alike, {found.vocabulary.lowest:.4f} at the least. To "
            "have it exactly, remove it and add it without --similar."
        )


def _said_of(added: Added, found: Similar) -> dict[str, Any]:
    chain = added.chain
    return {
        "name": chain.name,
        "digest": chain.digest,
        "num_blocks": len(chain.blocks),
        "num_bytes": chain.num_bytes,
        "num_new": added.num_new,
        "new_bytes": added.new_bytes,
        "approximated": [
            {"block": block.place, "of": one.of, "similarity": one.similarity}
            for block in chain.blocks
            if (one := block.approximated) is not None
        ],
        "vocabulary": None if found.vocabulary is None else vars(found.vocabulary),
    }
