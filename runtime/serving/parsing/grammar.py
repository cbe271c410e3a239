"""The JSON that holds an answer to calls of tools, where a request asks for one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ....vmem.errors import InvalidPrompt
from .tools import Tool, check_choice, read_tools

_SCHEMAS = frozenset(  # keywords of which the value is a schema
    [
        "items",
        "additionalProperties",
        "additionalItems",
        "not",
        "if",
        "then",
        "else",
        "contains",
        "propertyNames",
        "unevaluatedItems",
        "unevaluatedProperties",
        "contentSchema",
    ]
)
_LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems", "items"])
_TABLES = frozenset(
    ["properties", "patternProperties", "dependentSchemas", "$defs", "definitions", "dependencies"]
)
_MOST_DEPTH = 100
_BASES = ("$id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveRef")


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], tool_choice: str, parallel: bool
) -> dict[str, Any]:
    """A JSON schema for an answer that is nothing but calls.

    Args:
        tools: as OpenAI's API has them.
        tool_choice: `required`, for a list of calls, `{"name": …, "parameters": …}`, of which
            there is at least one; or a tool's name, for its arguments alone.
        parallel: whether there may be several.

    Raises InvalidPrompt for a definition that cannot be right, which names the tool.
    """
    known = read_tools(tools)
    if not check_choice(known, tool_choice):
        raise InvalidPrompt(
            f"tool_choice is {tool_choice!r}, which holds the answer to nothing; use required or "
            "a tool's name"
        )
    if tool_choice != "required":
        chosen = next(tool for tool in known if tool.name == tool_choice)
        return _check(chosen)
    definitions: dict[str, Any] = {}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call(i, tool, definitions) for i, tool in enumerate(known)]},
    }
    if not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def _call(index: int, tool: Tool, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call of one tool.

    A schema that refers to its own parts goes whole among the definitions, under a name of its
    own, so that equal names of two tools' parts stay apart.
    """
    schema = _check(tool)
    place = f"#/$defs/tool{index}"
    moved = _moved(schema, place)
    if moved != schema:
        definitions[f"tool{index}"] = moved
        moved = {"$ref": place}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": moved},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _check(tool: Tool) -> dict[str, Any]:
    """A tool's schema by itself. Raises InvalidPrompt for a reference that leads nowhere."""
    schema = {key: value for key, value in tool.parameters.items() if key not in ("$schema", "$id")}
    for part, depth in _parts(schema):
        if depth > _MOST_DEPTH:
            raise InvalidPrompt(
                f"the parameters of tool {tool.name!r} nest schemas more than {_MOST_DEPTH} deep; "
                "use references to '#/$defs/…'"
            )
        if base := next((key for key in _BASES if isinstance(part.get(key), str)), None):
            raise InvalidPrompt(
                f"the parameters of tool {tool.name!r} have {base!r}, and references here are by "
                "their place alone; use '$ref': '#/$defs/…'"
            )
        reference = part.get("$ref")
        if reference is not None and not _leads_somewhere(reference, schema):
            raise InvalidPrompt(
                f"the parameters of tool {tool.name!r} refer to {reference!r}, which is not in "
                "them; put it in their '$defs', as '#/$defs/…'"
            )
    return schema


def _leads_somewhere(reference: Any, schema: Mapping[str, Any]) -> bool:
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return False
    found: Any = schema
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        else:
            return False
    return isinstance(found, Mapping | bool)


def _children(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The keywords of a schema whose values hold schemas; others hold data."""
    return [(key, value) for key, value in schema.items() if key in _SCHEMAS | _LISTS | _TABLES]


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """A schema and all schemas within it, with how deep they are."""
    waiting: list[tuple[Any, int]] = [(schema, 0)]
    while waiting:
        part, depth = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        yield part, depth
        for key, value in _children(part):
            parts = [value]
            if key in _TABLES and isinstance(value, Mapping):
                parts = list(value.values())
            elif key in _LISTS and isinstance(value, list):
                parts = value
            waiting += [(inner, depth + 1) for inner in parts]


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references hold when it stands at a place of another document."""
    if not isinstance(schema, Mapping):
        return schema
    moved = dict(schema)
    if isinstance(schema.get("$ref"), str):
        moved["$ref"] = place + schema["$ref"].removeprefix("#")
    for key, value in _children(schema):
        if key in _TABLES and isinstance(value, Mapping):
            moved[key] = {name: _moved(part, place) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            moved[key] = [_moved(part, place) for part in value]
        elif key in _SCHEMAS:
            moved[key] = _moved(value, place)
    return moved
