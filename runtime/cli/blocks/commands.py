"""`vkv blocks`: adds models to a zoo, shows them, compares them and takes them away."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ...blocks.zoo import BlockZoo

blocks = typer.Typer(
    help="Models in a zoo: a folder in which what they have in common is stored once.",
    no_args_is_help=True,
)

Zoo = Annotated[Path, typer.Argument(help="The folder of the zoo.")]
Name = Annotated[str, typer.Argument(help="A model of the zoo.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="A text file, a prompt a line. Default: a few of our own."),
]


@blocks.command()
def add(
    zoo: Annotated[Path, typer.Argument(help="The folder of the zoo; made if there is none.")],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL[=NAME]...",
            help="Folders with *.safetensors, dense or in 4 bits, and names for them.",
        ),
    ],
    similar: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Use blocks of other models in place of those that compute the same but for so "
            "much, such as 0.99. The model's answers are then not quite its own.",
        ),
    ] = None,
    prompts: PromptFile = None,
    as_json: AsJson = False,
) -> None:
    """Cut models into blocks and keep those that the zoo does not have yet.

    Blocks are equal if their bytes are; nothing else is taken for equal unless --similar is given.
    What is interrupted leaves nothing that is half there, and can be begun again.
    """
    from ...blocks.zoo import BlockZoo
    from .adding import add_models

    add_models(BlockZoo.create(zoo), models, similar, prompts, as_json=as_json)


@blocks.command("list")
def list_models(zoo: Zoo, as_json: AsJson = False) -> None:
    """The models of a zoo, their bytes, and what is saved."""
    from .showing import show_models

    show_models(_opened(zoo), as_json=as_json)


@blocks.command()
def show(zoo: Zoo, name: Name, as_json: AsJson = False) -> None:
    """The blocks of a model, and which other models have them."""
    from .showing import show_chain

    show_chain(_opened(zoo), name, as_json=as_json)


@blocks.command()
def diff(zoo: Zoo, one: Name, other: Name, as_json: AsJson = False) -> None:
    """Which blocks of two models differ, and whether the two could run in one batch."""
    from .showing import show_difference

    show_difference(_opened(zoo), one, other, as_json=as_json)


@blocks.command()
def compare(
    zoo: Zoo,
    one: Name,
    other: Name,
    prompts: PromptFile = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The mean cosine that counts as similar.")
    ] = 0.98,
    as_json: AsJson = False,
) -> None:
    """How alike blocks of two models are, by what they compute of the same inputs.

    Each block of OTHER gets what reaches that of ONE while it runs on the prompts. Compared are,
    token by token, what a layer adds to its input, and of the heads and the whole models the
    probabilities of the next token.
    """
    from .showing import show_comparison

    show_comparison(_opened(zoo), one, other, prompts, threshold, as_json=as_json)


@blocks.command()
def remove(
    zoo: Zoo, names: Annotated[list[str], typer.Argument(help="Models of the zoo.")]
) -> None:
    """Take models away, and the blocks that no other one uses.

    A process that runs such a model keeps what it has mapped.
    """
    num_bytes = _opened(zoo).remove(*names)
    typer.echo(f"removed {', '.join(names)}: {num_bytes / 2**20:.1f} MiB are free")


@blocks.command()
def verify(zoo: Zoo, as_json: AsJson = False) -> None:
    """Read every block again, and say which do not hold what was written. Exit status 1 if any."""
    from .showing import show_damage

    if show_damage(_opened(zoo), as_json=as_json):
        raise typer.Exit(1)


def _opened(path: Path) -> "BlockZoo":
    from ...blocks.zoo import BlockZoo

    return BlockZoo(path)
