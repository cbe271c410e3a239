"""The `vkv bench` commands: options in, tables and the record's place out."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(
    help="Measure: each run writes a record, a table and a plot.", no_args_is_help=True
)

Shape = Annotated[
    str, typer.Option(help="llama-tiny, llama-455m, qwen2-0.5b or llama3-8b; random weights.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MaxSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
Seed = Annotated[int, typer.Option(help="Of lengths, prompts and weights.")]
Out = Annotated[Path, typer.Option(help="Folder for record, table and plot.")]
_OUT = Path("benchmarks")


@bench.command()
def memory(
    shape: Shape = "llama-tiny",
    dtype: Dtype = "float32",
    device: Device = "auto",
    num_requests: Annotated[int, typer.Option(help="Requests of the workload.")] = 64,
    prompt_lens: Annotated[
        tuple[int, int], typer.Option(help="Shortest and longest prompt, in tokens.")
    ] = (16, 2000),
    output_lens: Annotated[
        tuple[int, int], typer.Option(help="Shortest and longest output, in tokens.")
    ] = (16, 256),
    max_seqs: MaxSeqs = 16,
    look_ahead_tokens: Annotated[
        int, typer.Option(help="Tokens mapped ahead of each decoding request.")
    ] = 16,
    kinds: Annotated[
        str, typer.Option(help="Which caches to compare, separated by commas.")
    ] = "virtual,paged,static,dynamic",
    seed: Seed = 0,
    out: Out = _OUT,
) -> None:
    """Memory held against tokens held, over ragged requests.

    vkv's contiguous and paged caches, beside the static and dynamic caches of transformers as a
    padded batch fills them. Also reports the time that mapping took of the engine's steps.
    """
    from ..config import resolve_device
    from ..models import parse_dtype
    from .memory import KINDS, MemoryOptions, run

    chosen = tuple(kind.strip() for kind in kinds.split(","))
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: use some of {', '.join(KINDS)}")
    import torch

    options = MemoryOptions(
        shape=shape,
        dtype=parse_dtype(dtype) or torch.float32,
        device=resolve_device(device),
        num_requests=num_requests,
        prompt_lens=prompt_lens,
        output_lens=output_lens,
        max_seqs=max_seqs,
        look_ahead_tokens=look_ahead_tokens,
        kinds=chosen,
        seed=seed,
    )
    path, tables = run(options, out, _command_line())
    _show(path, tables)


@bench.command()
def throughput(
    shape: Shape = "llama-455m",
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder, in place of a shape.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads of every system. Default: the usable cores.")
    ] = None,
    systems: Annotated[
        str, typer.Option(help="Which systems to compare, separated by commas.")
    ] = "vkv,vkv-paged,transformers,transformers-static,transformers-continuous",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PYTHON: vllm or llama-cpp, and an interpreter that has it. Repeatable."
        ),
    ] = None,
    cells: Annotated[
        str, typer.Option(help="What to time, separated by commas.")
    ] = "prefill-1,prefill-8,decode-1,decode-8,decode-32,ragged",
    repeats: Annotated[int, typer.Option(help="Repeats, each in fresh processes.", min=1)] = 3,
    batch: Annotated[int, typer.Option(help="Padded batch of transformers in `ragged`.")] = 8,
    eager_peers: Annotated[
        bool, typer.Option(help="Run vLLM without torch.compile, which takes minutes to start.")
    ] = False,
    label: Annotated[str, typer.Option(help="A word to add to the record's name.")] = "",
    seed: Seed = 0,
    out: Out = _OUT,
) -> None:
    """Tokens a second, offline, against transformers, vLLM and llama.cpp.

    Each system runs in a process of its own on the same model, prompts, output lengths and
    threads, taking turns cell by cell; medians and ratios of interleaved repeats.
    """
    from ..config import resolve_device
    from ..models import parse_dtype
    from .throughput import CELLS, ThroughputOptions, run

    named = [name.strip() for name in cells.split(",")]
    if unknown := [name for name in named if name not in CELLS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: use some of {', '.join(CELLS)}")
    parse_dtype(dtype)
    peers: dict[str, str] = {}
    for text in peer or []:
        name, separator, interpreter = text.partition("=")
        if not separator:
            raise typer.BadParameter(
                f"{text!r}: write NAME=PYTHON, such as vllm=/opt/vllm/bin/python"
            )
        peers[name] = interpreter
    given: dict[str, Any] = {} if threads is None else {"threads": threads}
    options = ThroughputOptions(
        shape=shape,
        model=model,
        dtype=dtype,
        device=resolve_device(device),
        systems=tuple(name.strip() for name in systems.split(",") if name.strip()),
        peers=peers,
        cells=tuple(CELLS[name] for name in named),
        repeats=repeats,
        batch=batch,
        eager_peers=eager_peers,
        label=label,
        seed=seed,
        **given,
    )
    path, tables = run(options, out, _command_line())
    _show(path, tables)


def _show(path: Path, tables: list[Any]) -> None:
    """Print the tables of a benchmark and where its record is."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables:
        shown = RichTable(title=table.title)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(f"record: {path}", style="dim", soft_wrap=True)


def _command_line() -> str:
    return "vkv " + shlex.join(sys.argv[1:])
