"""What the `vkv bench` commands share: the group, options, lists out of words, results shown."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

bench = typer.Typer(
    help="Measure: each run writes a record, a table and a plot.", no_args_is_help=True
)

_Number = TypeVar("_Number", int, float)

Shape = Annotated[
    str, typer.Option(help="llama-tiny, llama-455m, qwen2-0.5b or llama3-8b; random weights.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MaxSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
Seed = Annotated[int, typer.Option(help="Of lengths, prompts and weights.")]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        help="NAME=PYTHON: vllm (or, of whole systems, llama-cpp), and an interpreter that has it. "
        "Repeatable.",
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        help="gptq, awq or compressed-tensors: also run the same weights rounded to 4 bits, in a "
        "checkpoint of that format."
    ),
]
Model = Annotated[str | None, typer.Option(help="A checkpoint folder, in place of a shape.")]
Label = Annotated[str, typer.Option(help="A word to add to the record's name.")]
Out = Annotated[Path, typer.Option(help="Folder for record, table and plot.")]
OUT = Path("benchmarks")


def items(listed: str) -> list[str]:
    """What a list with commas names."""
    return [item.strip() for item in listed.split(",") if item.strip()]


def interpreters(given: list[str] | None) -> dict[str, str]:
    """Interpreters by the names of peers."""
    peers: dict[str, str] = {}
    for text in given or []:
        name, separator, interpreter = text.partition("=")
        if not separator:
            raise typer.BadParameter(
                f"{text!r}: write NAME=PYTHON, such as vllm=/opt/vllm/bin/python"
            )
        peers[name] = interpreter
    return peers


def numbers(name: str, listed: str, kind: Callable[[str], _Number]) -> list[_Number]:
    """The numbers in a list with commas, given as option `name`."""
    try:
        return [kind(item) for item in items(listed)]
    except ValueError as error:
        raise typer.BadParameter(f"--{name} {listed!r}: give numbers, with commas") from error


def show(path: Path, tables: list[Any]) -> None:
    """Print the tables of a benchmark, the machine's limits and where the record is."""
    from rich.console import Console
    from rich.table import Table as RichTable

    from .limits import Limits

    console = Console()
    for table in tables:
        shown = RichTable(title=table.title)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(note, markup=False, highlight=False)
    limits = Limits.from_record(json.loads(path.read_text())["limits"])
    console.print(str(limits), style="dim")
    console.print(f"record: {path}", style="dim", soft_wrap=True)


def command_line() -> str:
    """What the user typed, for the record."""
    return "vkv " + shlex.join(sys.argv[1:])
