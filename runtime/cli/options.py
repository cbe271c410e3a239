"""Options declared once: the fields of a dataclass are the options of a command.

    @dataclass(frozen=True, kw_only=True)
    class Memory:
        kinds: tuple[str, ...] = option("virtual,paged", parse=words, help="Which caches.")

    app.command("memory")(function(run, Options(Memory)))  # calls run(Memory(kinds=...))

A field without `option` is on the command line only where `Options` names it; its help is then what
its class says of it.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How a field is given on the command line.

    Attributes:
        default: as it would be typed; `...` for the field's own, or none.
        kind: the type that typer reads; None for the field's own.
        parse: makes the field's value of it; raises ValueError, with the remedy.
        least: the smallest number.
        names: such as ("--model", "-m"); none for the field's name.
        is_argument: told by its place, and not by a name.
    """

    help: str = ""
    default: Any = ...
    kind: Any = None
    parse: Callable[[Any], Any] | None = None
    least: float | None = None
    names: tuple[str, ...] = ()
    is_argument: bool = False


def option(default: Any = ..., *, help: str, **how: Any) -> Any:
    """A field that is an option, with a `default` as it would be typed; `how`: as of `Flag`."""
    flag = Flag(help=help, default=default, **how)
    metadata = {"flag": flag}
    if default is ...:
        return field(metadata=metadata)
    if flag.parse is None or default is None:
        return field(default=default, metadata=metadata)
    parse = flag.parse  # on demand: what it imports may be slow
    return field(default_factory=lambda: parse(default), metadata=metadata)


def computed(make: Callable[[], Any], *, help: str, kind: Any, **how: Any) -> Any:
    """A field that is an option of type `kind`, and `make()` where it is not given; `how`: as of
    `Flag`."""
    flag = Flag(help=help, default=None, kind=kind | None, **how)
    return field(default_factory=make, metadata={"flag": flag})


def group(kind: type) -> Any:
    """A field that holds a dataclass, whose own fields are options."""
    return field(default_factory=kind, metadata={"group": kind})


class Options:
    """The options that a command takes from one dataclass."""

    def __init__(self, kind: type, *names: str, **changed: Flag) -> None:
        """
        Args:
            names: fields to take; of a dataclass made with `option`, none for all of these.
            changed: more fields, and what is other about them; what is left empty stays.
        """
        self._kind = kind
        self._groups = {f.name: Options(f.metadata["group"]) for f in _marked(kind, "group")}
        wanted = [*names, *changed] or [f.name for f in _marked(kind, "flag")]
        of_name = {f.name: f for f in fields(kind)}
        said = field_docs(kind) if any("flag" not in of_name[n].metadata for n in wanted) else {}
        self._own = {
            name: _settled(kind, of_name[name], changed.get(name, Flag()), said.get(name, ""))
            for name in wanted
        }

    @property
    def flags(self) -> dict[str, Flag]:
        """Those of its groups included, by field; all of what a `Flag` says is settled."""
        found = dict(self._own)
        for part in self._groups.values():
            found |= part.flags
        return found

    def build(self, given: dict[str, Any]) -> Any:
        """The dataclass of what was typed; what was not is left to its own defaults.

        Raises typer.BadParameter, with the option, the value and the remedy.
        """
        return self._kind(**self.values(given))

    def values(self, given: dict[str, Any]) -> dict[str, Any]:
        """The dataclass's arguments that were typed."""
        values = {name: part.build(given) for name, part in self._groups.items()}
        for name, flag in self._own.items():
            if given[name] is not None:
                values[name] = _parsed(name, flag, given[name])
        return values


class TypedOptions(Options):
    """The same, but as a dictionary of what was typed, for a command that knows better defaults."""

    def build(self, given: dict[str, Any]) -> dict[str, Any]:
        """What was typed, once the dataclass has accepted it."""
        super().build(given)
        return self.values(given)


def function(call: Callable[..., None], *parts: Options) -> Callable[..., None]:
    """A function for `typer.Typer.command`: it builds each of `parts`, and calls `call` on them."""

    def command(**given: Any) -> None:
        call(*(part.build(given) for part in parts))

    flags: dict[str, Flag] = {}
    for part in parts:
        assert not flags.keys() & part.flags.keys(), "two options of one name"
        flags |= part.flags
    signature = inspect.Signature(list(_parameters(flags)))
    command.__signature__ = signature  # type: ignore[attr-defined]
    return command


def field_docs(kind: type) -> dict[str, str]:
    """What a class says of its fields: under `Attributes:`, or in a string below each."""
    _, _, section = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    for one, below in pairwise(tree.body):
        if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr):
            entries.append((ast.unparse(one.target), ast.literal_eval(below.value)))
    texts = {name: " ".join(text.split()) for name, text in entries}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def _marked(kind: type, key: str) -> list[Field[Any]]:
    return [f for f in fields(kind) if key in f.metadata]


def _settled(kind: type, of: Field[Any], changed: Flag, said: str) -> Flag:
    """All that is to be known of a field's flag."""
    own = ... if of.default is MISSING else of.default
    base: Flag = of.metadata.get("flag") or Flag(help=said, default=own)
    other = {n: v for n, v in vars(changed).items() if v != getattr(Flag, n)}
    flag = replace(base, **other)
    if flag.kind is None:
        flag = replace(flag, kind=str if flag.parse else _typed(kind, of))
    return flag


def _typed(kind: type, of: Field[Any]) -> Any:
    """A field's type as typer reads it: text, where a text is one of several things it may be."""
    hint = get_type_hints(kind)[of.name] if isinstance(of.type, str) else of.type
    kinds = get_args(hint) if get_origin(hint) is not tuple else ()
    return str if str in kinds or get_origin(hint) is Literal else hint


def _parameters(flags: dict[str, Flag]) -> Iterator[inspect.Parameter]:
    for name, flag in flags.items():
        about: Any = (
            typer.Argument(help=flag.help)
            if flag.is_argument
            else typer.Option(*flag.names, help=flag.help, min=flag.least)
        )
        kind = flag.kind | None if flag.default is None else flag.kind
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[kind, about],
            default=inspect.Parameter.empty if flag.default is ... else flag.default,
        )


def _parsed(name: str, flag: Flag, value: Any) -> Any:
    if flag.parse is None:
        return value
    try:
        return flag.parse(value)
    except ValueError as error:
        shown = flag.names[0] if flag.names else "--" + name.replace("_", "-")
        raise typer.BadParameter(f"{shown} {value!r}: {error}") from error
