"""What `vkv blocks` shows of a zoo: tables for people, JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ....vmem.errors import ChainMismatch
from ...blocks.chain import Block, Chain
from ...blocks.similarity import Comparison, compare
from ...blocks.zoo import BlockZoo
from ...frontend.progress import counted
from .adding import byte_bar, read_prompts

_SHOWN_DIGITS = 12  # of a digest


def show_models(zoo: BlockZoo, *, as_json: bool) -> None:
    """`vkv blocks list`."""
    chains, size = list(zoo.chains()), zoo.size()
    if as_json:
        return _print_json(
            {
                "models": [_said_of(chain, _own_bytes(chain, chains)) for chain in chains],
                **vars(size),
                "saved_bytes": size.saved_bytes,
            }
        )
    table = _table("model", "type", "blocks", "MiB", "of its own, MiB", "approximated")
    for chain in chains:
        table.add_row(
            chain.name,
            str(chain.config.get("model_type")),
            str(len(chain.blocks)),
            _mib(chain.num_bytes),
            _mib(_own_bytes(chain, chains)),
            str(_num_approximated(chain) or ""),
        )
    console = Console()
    console.print(table)
    console.print(
        f"{size.num_models} models would take {_mib(size.model_bytes)} MiB as files; "
        f"{size.num_blocks} blocks take {_mib(size.kept_bytes)} MiB: {_mib(size.saved_bytes)} MiB "
        "are saved"
    )
    return None


def show_chain(zoo: BlockZoo, name: str, *, as_json: bool) -> None:
    """`vkv blocks show`."""
    chain = zoo.chain(name)
    users = _users(zoo)
    if as_json:
        said = _said_of(chain, _own_bytes(chain, list(zoo.chains())))
        blocks = [{**_block(b), "models": users[b.digest]} for b in chain.blocks]
        return _print_json({**said, "blocks": blocks, "files": dict(chain.files)})
    table = _table("block", "digest", "tensors", "MiB", "also in")
    for block in chain.blocks:
        others = [user for user in users[block.digest] if user != name]
        behind = block.approximated
        note = f" ({behind.similarity:.4f} like its own)" if behind else ""
        table.add_row(
            block.place,
            block.digest[:_SHOWN_DIGITS],
            str(len(block.tensors)),
            _mib(block.num_bytes),
            ", ".join(others) + note,
        )
    console = Console()
    console.print(table)
    console.print(
        f"{chain.name}: {_mib(chain.num_bytes)} MiB, chain {chain.digest[:_SHOWN_DIGITS]}"
    )
    return None


def show_difference(zoo: BlockZoo, one: str, other: str, *, as_json: bool) -> None:
    """`vkv blocks diff`."""
    mine, theirs = zoo.chain(one), zoo.chain(other)
    same = mine.same_as(theirs)
    different = [block for block, is_same in zip(mine.blocks, same, strict=True) if not is_same]
    try:
        mine.check_fits(theirs)
        obstacle = None
    except ChainMismatch as error:
        obstacle = str(error)
    if as_json:
        return _print_json(
            {
                "equal": sum(same),
                "different": [_block(block) for block in different],
                "fits": obstacle is None,
                "obstacle": obstacle,
            }
        )
    there = dict(zip(theirs.places, theirs.blocks, strict=True))
    table = _table("block", f"in {one}", f"in {other}", "MiB")
    for place, block, is_same in zip(mine.places, mine.blocks, same, strict=True):
        if not is_same:
            digest = there[place].digest[:_SHOWN_DIGITS] if place in there else "none"
            table.add_row(block.place, block.digest[:_SHOWN_DIGITS], digest, _mib(block.num_bytes))
    console = Console()
    if different:
        console.print(table)
    console.print(f"{sum(same)} of {len(same)} blocks are equal")
    console.print(obstacle or "they can run in one batch")
    return None


def show_comparison(
    zoo: BlockZoo, one: str, other: str, path: Path | None, threshold: float, *, as_json: bool
) -> None:
    """`vkv blocks compare`."""
    mine, theirs = zoo.chain(one), zoo.chain(other)
    prompts = read_prompts(mine, path)
    with counted("comparing", len(prompts)) as count:
        found = compare(mine, theirs, prompts, progress=count)
    if as_json:
        return _print_json(_said_of_comparison(found, threshold))
    table = _table("block", "mean", "lowest", f"at least {threshold}")
    for block, is_same, alike in _rows(found):
        if alike is None:
            table.add_row(block.place, "", "", "not measured")
        elif not is_same:
            verdict = "similar" if alike.mean >= threshold else "different"
            table.add_row(block.place, f"{alike.mean:.4f}", f"{alike.lowest:.4f}", verdict)
    console = Console()
    if table.row_count:
        console.print(table)
    num_same = sum(mine.same_as(theirs))
    console.print(f"{num_same} of {len(mine.blocks)} blocks are equal, to the bit")
    console.print(
        f"probabilities of tokens are {found.vocabulary.mean:.4f} alike, "
        f"{found.vocabulary.lowest:.4f} at the least, over {sum(map(len, prompts))} tokens"
    )
    return None


def show_damage(zoo: BlockZoo, *, as_json: bool) -> bool:
    """`vkv blocks verify`; returns whether anything is wrong."""
    with byte_bar("reading", zoo.size().kept_bytes) as progress:
        damage = zoo.verify(progress=progress)
    if as_json:
        _print_json({"damage": damage})
    else:
        console = Console()
        for what in damage:
            console.print(what)
        if not damage:
            console.print(f"all {zoo.size().num_blocks} blocks hold what was written")
    return bool(damage)


def _rows(found: Comparison) -> Sequence[tuple[Block, bool, Any]]:
    same = found.one.same_as(found.other)
    return list(zip(found.one.blocks, same, found.blocks, strict=True))


def _said_of_comparison(found: Comparison, threshold: float) -> dict[str, Any]:
    return {
        "threshold": threshold,
        "vocabulary": vars(found.vocabulary),
        "blocks": [
            {
                **_block(block),
                "equal": is_same,
                "similarity": alike and vars(alike),
                "similar": alike is not None and alike.mean >= threshold,
            }
            for block, is_same, alike in _rows(found)
        ],
    }


def _said_of(chain: Chain, own_bytes: int) -> dict[str, Any]:
    return {
        "name": chain.name,
        "digest": chain.digest,
        "model_type": chain.config.get("model_type"),
        "num_blocks": len(chain.blocks),
        "num_bytes": chain.num_bytes,
        "own_bytes": own_bytes,
        "num_approximated": _num_approximated(chain),
    }


def _block(block: Block) -> dict[str, Any]:
    return {
        "kind": block.kind,
        "layer": block.layer,
        "digest": block.digest,
        "num_bytes": block.num_bytes,
        "tensors": block.tensors,
        "approximated": block.approximated and vars(block.approximated),
    }


def _own_bytes(chain: Chain, chains: Sequence[Chain]) -> int:
    """Of blocks that no other model has."""
    others = {b.digest for one in chains if one.name != chain.name for b in one.blocks}
    own = {b.digest: b.num_bytes for b in chain.blocks if b.digest not in others}
    return sum(own.values())


def _users(zoo: BlockZoo) -> dict[str, list[str]]:
    """The models that each block is in."""
    found: dict[str, list[str]] = {}
    for chain in zoo.chains():
        for name in {block.digest for block in chain.blocks}:
            found.setdefault(name, []).append(chain.name)
    return found


def _num_approximated(chain: Chain) -> int:
    return sum(block.approximated is not None for block in chain.blocks)


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        is_number = "MiB" in column or column in ("blocks", "tensors", "mean", "lowest")
        table.add_column(column, justify="right" if is_number else "left")
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"


def _print_json(said: Any) -> None:
    typer.echo(json.dumps(said))
