"""Commands whose options are made when they are named, so that `vkv --help` is quick."""

from functools import cached_property
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command


class LazyCommand(TyperCommand):
    """A command that is registered by a function which imports, and returns, the real one.

        @app.command(cls=LazyCommand)
        def chat():
            '''Chat with a model.'''
            from .chat import command
            return command

    A list of commands shows its name and its docstring, and calls nothing.
    """

    @cached_property
    def made(self) -> TyperCommand:
        """The command itself."""
        assert self.callback is not None
        app = typer.Typer(add_completion=False)
        app.command(self.name, help=self.help)(self.callback())
        command = get_command(app)
        assert isinstance(command, TyperCommand)
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        return self.made.make_context(info_name, args, parent, **extra)
