"""What a request says of the tools that may be called."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....vmem.errors import InvalidPrompt


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool that may be called.

    Attributes:
        name: of which a request has one.
        parameters: a JSON schema of an object.
    """

    name: str
    parameters: Mapping[str, Any]


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Tools as OpenAI's API has them, `{"type": "function", "function": {…}}`.

    Raises InvalidPrompt, which names the tool and what to do.
    """
    if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
        raise InvalidPrompt(f"tools is {reprlib.repr(tools)}; give a list of tools")
    read = tuple(_tool(index, tool) for index, tool in enumerate(tools or ()))
    names = [tool.name for tool in read]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidPrompt(f"there are several tools {twice[0]!r}; give each a name of its own")
    return read


def check_choice(tools: Sequence[Tool], tool_choice: str) -> bool:
    """Whether a grammar holds the answer. Raises InvalidPrompt for a choice that there is not."""
    if tool_choice in ("none", "auto"):
        return False
    names = [tool.name for tool in tools]
    if not names:
        raise InvalidPrompt(f"tool_choice is {tool_choice!r} without tools; give tools")
    if tool_choice != "required" and tool_choice not in names:
        raise InvalidPrompt(
            f"tool_choice is {tool_choice!r}, and the tools are {', '.join(map(repr, names))}; "
            "name one of them, or use none, auto or required"
        )
    return True


def _tool(index: int, tool: Any) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise InvalidPrompt(
            f"tool {index} is {reprlib.repr(tool)}; give {{'type': 'function', 'function': "
            "{'name': …, 'parameters': …}}"
        )
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InvalidPrompt(f"the name of tool {index} is {reprlib.repr(name)}; give it a text")
    return Tool(name=name, parameters=_parameters(name, function.get("parameters")))


def _parameters(name: str, parameters: Any) -> Mapping[str, Any]:
    """A schema of an object, as which no schema and an empty one mean one without members."""
    if parameters is None or parameters == {}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise InvalidPrompt(
            f"the parameters of tool {name!r} are {reprlib.repr(parameters)}; give a JSON schema "
            "of an object, or leave them out"
        )
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidPrompt(
            f"the parameters of tool {name!r} are of type {kind!r}, and arguments are an object; "
            "use 'object', with 'properties'"
        )
    return {**parameters, "type": "object"}
