"""Values that stand in an answer as plain text, as the JSON that a tool's schema asks for."""

import json
from collections.abc import Mapping
from typing import Any

_STRING = frozenset({"string"})
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
_NAMES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}


def types_of(name: str, schema: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema allows one of an object's members; a string if it says nothing."""
    members = schema.get("properties")
    waiting = [members.get(name)] if isinstance(members, Mapping) else []
    found: set[str] = set()
    seen: set[int] = set()  # a definition may be of itself
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        found |= _own_types(part)
        waiting += [*_list(part.get("anyOf")), *_list(part.get("oneOf"))]
        if isinstance(part.get("$ref"), str):
            waiting.append(_resolved(part["$ref"], schema))
    return frozenset(found) or _STRING


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    """Those that a schema names, or that its values have."""
    kind = schema.get("type")
    kinds = [kind] if isinstance(kind, str) else _list(kind)
    found = {kind for kind in kinds if isinstance(kind, str)}
    if not found:
        values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
        found = {_NAMES[type(value)] for value in values if type(value) in _NAMES}
    return found | ({"null"} if schema.get("nullable") is True else set())


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What a pointer such as `#/$defs/Colour` is to; None if that is nothing."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def json_value(text: str, types: frozenset[str]) -> str:
    """A value as JSON of one of the types; as a string if it is of none of them."""
    plain = text.strip()
    word = _WORDS.get(plain.lower())  # Python's spelling is common
    if word and ("null" if word == "null" else "boolean") in types:
        return word
    kind = _kind(plain)
    if kind != "string" and (kind in types or (kind == "integer" and "number" in types)):
        return plain
    return json.dumps(text, ensure_ascii=False)


def _kind(text: str) -> str:
    """The type of a piece of JSON; empty if it is none."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return ""
    is_whole = isinstance(value, float) and value.is_integer()
    return "integer" if is_whole else _NAMES[type(value)]


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
