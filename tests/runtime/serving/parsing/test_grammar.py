"""The schema that holds an answer to calls."""

import json
import re
from typing import Any

import pytest
from answers import TOOLS
from vkv.runtime.serving.parsing import tool_grammar
from vkv.vmem.errors import InvalidPrompt

COLOUR = {"enum": ["red", "blue"]}
SIZE = {"enum": [1, 2]}


def _tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": {"x": schema}}
    return schema


def _pointed(schema: dict[str, Any], reference: str) -> Any:
    """What a reference within a schema is to."""
    assert reference.startswith("#/")
    found: Any = schema
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def test_any_of_the_tools_at_least_once() -> None:
    schema = tool_grammar(TOOLS, "required", True)
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    assert "maxItems" not in schema
    assert "$defs" not in schema
    weather, now = schema["items"]["anyOf"]
    assert weather["properties"]["name"] == {"const": "weather"}
    assert weather["properties"]["parameters"] == TOOLS[0]["function"]["parameters"]
    assert weather["required"] == ["name", "parameters"]
    assert weather["additionalProperties"] is False
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert now["properties"]["parameters"] == nothing


def test_only_one_call() -> None:
    assert tool_grammar(TOOLS, "required", False)["maxItems"] == 1


def test_a_named_tool_is_its_arguments_alone() -> None:
    assert tool_grammar(TOOLS, "weather", True) == TOOLS[0]["function"]["parameters"]
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": COLOUR}}
    assert tool_grammar([_tool("f", schema)], "f", True) == schema


def test_definitions_of_tools_are_kept_apart() -> None:
    tools = [
        _tool("a", {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": COLOUR}}),
        _tool("b", {"properties": {"x": {"items": {"$ref": "#/$defs/X"}}}, "$defs": {"X": SIZE}}),
        _tool("c", {"properties": {"tail": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}),
        _tool("d", {"properties": {"p": SIZE, "q": {"$ref": "#/properties/p"}}}),
    ]
    schema = tool_grammar(tools, "required", True)
    parameters = [
        _pointed(schema, call["properties"]["parameters"]["$ref"])
        for call in schema["items"]["anyOf"]
    ]
    a, b, c, d = parameters
    assert _pointed(schema, a["properties"]["x"]["$ref"]) == COLOUR
    assert _pointed(schema, b["properties"]["x"]["items"]["$ref"]) == SIZE
    assert _pointed(schema, c["properties"]["tail"]["anyOf"][0]["$ref"]) == c
    assert _pointed(schema, d["properties"]["q"]["$ref"]) == SIZE


def test_data_that_looks_like_a_reference_stays_as_it_is() -> None:
    properties = {
        "$ref": {"type": "string"},
        "items": {"const": {"$ref": "#/nowhere"}},
        "x": {"enum": [{"$ref": "#/nowhere"}], "default": {"$ref": "#/nowhere"}},
    }
    tools = [_tool("f", {"type": "object", "properties": properties})]
    schema = tool_grammar(tools, "required", True)
    (call,) = schema["items"]["anyOf"]
    assert call["properties"]["parameters"]["properties"] == properties


def test_nothing_of_the_request_is_changed() -> None:
    tools = [_tool("a", {"$defs": {"X": COLOUR}, "properties": {"x": {"$ref": "#/$defs/X"}}})]
    before = json.dumps(tools)
    tool_grammar(tools, "required", True)
    assert json.dumps(tools) == before


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_tool_without_parameters_has_empty_arguments(parameters: Any) -> None:
    schema = tool_grammar([_tool("f", parameters)], "f", True)
    assert schema == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ([], "the parameters of tool 'f' are []; give a JSON schema"),
        ({"type": "string"}, "tool 'f' are of type 'string', and arguments are an object"),
        ({"properties": {"x": {"$ref": "#/$defs/X"}}}, "tool 'f' refer to '#/$defs/X'"),
        ({"properties": {"x": {"$ref": "#X"}}}, "tool 'f' refer to '#X'"),
        ({"properties": {"x": {"$ref": "https://a.b/c"}}}, "refer to 'https://a.b/c'"),
        ({"properties": {"x": {"$ref": 3}}}, "refer to 3"),
        ({"properties": {"x": {"$anchor": "X"}}}, "tool 'f' have '$anchor'"),
        (_nested(200), "tool 'f' nest schemas more than 100 deep"),
    ],
)
def test_schemas_that_cannot_be_right_are_refused(parameters: Any, words: str) -> None:
    for choice in ("required", "f"):
        with pytest.raises(InvalidPrompt, match=re.escape(words)):
            tool_grammar([_tool("f", parameters)], choice, True)


def test_a_choice_that_holds_nothing_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match="tool_choice is 'auto', which holds the answer to"):
        tool_grammar(TOOLS, "auto", True)
