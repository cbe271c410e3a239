"""The `vkv` command."""

import os
import sys
from collections.abc import Callable

import typer

from ...bench.cli import bench, place, simulate, soak
from ...vmem.errors import VkvError
from .blocks.commands import blocks
from .cluster import cluster
from .lazy import LazyCommand

Command = Callable[..., None]

app = typer.Typer(
    name="vkv",
    help="A virtual-memory KV-cache runtime for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        import importlib.metadata

        typer.echo(f"vkv {importlib.metadata.version('vkv')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_show_version, help="Show it, and exit."
    ),
) -> None: ...


@app.command(cls=LazyCommand)
def chat() -> Command:
    """Chat with a model. Reads from a pipe too: a line is a turn."""
    from .commands import chat_command

    return chat_command()


@app.command(cls=LazyCommand)
def generate() -> Command:
    """Complete prompts, many at once. Reads from a pipe: a line is a prompt."""
    from .commands import generate_command

    return generate_command()


@app.command(cls=LazyCommand)
def serve() -> Command:
    """Serve a model to OpenAI's and Anthropic's clients."""
    from .serve import serve_command

    return serve_command()


@app.command(cls=LazyCommand)
def quantize() -> Command:
    """Make a 4-bit checkpoint that transformers, vLLM and vkv load."""
    from .commands import quantize_command

    return quantize_command()


@app.command(cls=LazyCommand)
def info() -> Command:
    """What this machine offers: drivers, attention backends, limits; or what a model gets."""
    from .commands import info_command

    return info_command()


app.add_typer(blocks, name="blocks")
app.add_typer(cluster, name="cluster")
app.command(cls=LazyCommand)(simulate)
app.command(cls=LazyCommand)(place)
app.command(cls=LazyCommand)(soak)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command; a user's mistake is a message, not a traceback."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would litter a log
    try:
        app()
    except VkvError as error:
        typer.echo(f"vkv: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)  # whoever read our output has gone, as `head` does


if __name__ == "__main__":
    main()
