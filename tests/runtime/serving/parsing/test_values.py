"""Plain texts as the JSON that a tool's schema asks for."""

import json
from typing import Any

import pytest
from vkv.runtime.serving.parsing.values import json_value, types_of


@pytest.mark.parametrize(
    ("member", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["number", "null"]}, {"number", "null"}),
        ({"type": "string", "nullable": True}, {"string", "null"}),
        ({"anyOf": [{"type": "array"}, {"type": "null"}]}, {"array", "null"}),
        ({"enum": [1, "a", None, True, 1.5]}, {"integer", "string", "null", "boolean", "number"}),
        ({"const": {}}, {"object"}),
        ({"$ref": "#/$defs/A"}, {"object"}),
        ({"$ref": "#/$defs/Self"}, {"boolean"}),
        ({"$ref": "#/$defs/Nowhere"}, {"string"}),
        ({"description": "anything"}, {"string"}),
        (True, {"string"}),
        (None, {"string"}),
        ({"type": 3, "anyOf": 3, "enum": 3}, {"string"}),
    ],
)
def test_what_a_schema_allows(member: Any, types: set[str]) -> None:
    schema = {
        "properties": {"x": member},
        "$defs": {
            "A": {"type": "object"},
            "Self": {"anyOf": [{"$ref": "#/$defs/Self"}] * 20 + [{"type": "boolean"}]},
        },
    }
    assert types_of("x", schema) == types
    assert types_of("y", schema) == {"string"}


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("3", {"integer"}, "3"),
        (" 3\n", {"number"}, "3"),
        ("3.0", {"integer"}, "3.0"),
        ("3.5", {"integer"}, '"3.5"'),
        ("1e400", {"string", "null"}, '"1e400"'),
        ("NaN", {"number"}, '"NaN"'),
        ("TRUE", {"boolean"}, "true"),
        ("None", {"string", "null"}, "null"),
        ("null", {"integer"}, '"null"'),
        ("3", {"string", "null"}, '"3"'),
        ('"a"', {"string", "null"}, '"\\"a\\""'),
        ('{"a": [1]}', {"object"}, '{"a": [1]}'),
        ("[1", {"array"}, '"[1"'),
        ("[" * 100_000, {"array"}, json.dumps("[" * 100_000)),
        ("", {"array"}, '""'),
    ],
)
def test_what_a_text_says(text: str, types: set[str], value: str) -> None:
    assert json_value(text, frozenset(types)) == value
