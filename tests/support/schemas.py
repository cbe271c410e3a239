"""JSON schemas of mixed features, random but the same for a seed."""

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = ["name", "Age", "ta gs", "note", "x-y", "größe", 'a"b', "value", "kind"]
_PATTERNS = ["^[a-f]{2,5}$", "^(ab|cd)+$", "x", "^[A-Z][a-z]*-[0-9]+$", "^\\S{1,8}$"]
_FORMATS = ["date", "uuid", "ipv4", "email", "date-time"]
_CONSTANTS: list[Any] = ["a", "", 'Ä\n"\\', 0, -3, 1.5, True, None, [], {}, [1, "x"], {"k": [None]}]


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A schema that allows something; the deeper, the more is nested."""
    schema = _object(rng, depth, closed=rng.random() < 0.8) if depth == 3 else _any(rng, depth)
    if depth == 3 and rng.random() < 0.3:
        schema["$defs"] = {"node": _node(rng)}
        schema["properties"] = {**schema["properties"], "tree": {"$ref": "#/$defs/node"}}
        schema["required"] = [*schema["required"], "tree"]
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    makers = [_string, _integer, _number, _constant, _simple]
    if depth > 0:
        makers += [_object, _array, _tuple, _any_of, _all_of, _types]
    return rng.choice(makers)(rng, depth)


def _string(rng: random.Random, depth: int) -> Schema:
    kind = rng.randrange(5)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    least = rng.randrange(4)
    bounds = {"minLength": least, "maxLength": least + rng.randrange(8)}
    return {"type": "string", **dict(rng.sample(sorted(bounds.items()), rng.randrange(3)))}


def _integer(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "integer"}
    low = rng.randrange(-200, 200)
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randrange(20, 5000)
    if rng.random() < 0.2:
        schema["multipleOf"] = rng.choice([2, 5, 7])
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "number"}
    low = rng.choice([-10, -0.5, 0, 0.25, 3])
    if rng.random() < 0.6:
        schema["minimum"] = low
    if rng.random() < 0.6:
        schema["maximum"] = low + rng.choice([0.5, 1, 12.75, 1000])
    return schema


def _constant(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        return {"const": rng.choice(_CONSTANTS)}
    return {"enum": rng.sample(_CONSTANTS, rng.randrange(1, 5))}


def _simple(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null"]), "description": "whatever", "title": "T"}


def _types(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.sample(["string", "integer", "null", "boolean"], 2), "maxLength": 6}


def _object(rng: random.Random, depth: int, *, closed: bool = True) -> Schema:
    names = rng.sample(_NAMES, rng.randrange(1, 5))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if closed:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = {"type": "integer", "minimum": 0}
    if rng.random() < 0.15:
        schema["patternProperties"] = {"^p[0-9]$": {"type": "boolean"}}
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(3)
    schema = {"type": "array", "items": _any(rng, depth - 1), "maxItems": least + rng.randrange(4)}
    return schema | ({"minItems": least} if rng.random() < 0.7 else {})


def _tuple(rng: random.Random, depth: int) -> Schema:
    parts = [_any(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}


def _all_of(rng: random.Random, depth: int) -> Schema:
    return {
        "allOf": [
            {"type": "object", "properties": {"a": _any(rng, 0)}, "required": ["a"]},
            {"type": "object", "properties": {"b": _any(rng, 0)}, "required": ["b"]},
        ]
    }


def _node(rng: random.Random) -> Schema:
    """A tree, which refers to itself."""
    return {
        "type": "object",
        "properties": {
            "value": _any(rng, 0),
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
