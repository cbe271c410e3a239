"""What an output must be, as data: checked when it is made, and whole in another process."""

import dataclasses
from typing import Any

import msgspec
import pytest
from vkv import SamplingParams, StructuredOutputsParams
from vkv.runtime.request.structured_outputs import MAX_CHARACTERS
from vkv.vmem.errors import InvalidSamplingParams

_SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"const": "ä"}}, "required": ["a"]}


def _params(**fields: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"json": _SCHEMA}, "json"),
        ({"json": '{"type": "string"}', "whitespace_pattern": " ?"}, "json"),
        ({"regex": "[a-z]+"}, "regex"),
        ({"choice": ["yes", "no"]}, "choice"),
        ({"grammar": 'start: "a"'}, "grammar"),
        ({"json_object": True, "disable_any_whitespace": True}, "json_object"),
        ({"json": {}, "regex": None, "structural_tag": None, "json_object": False}, "json"),
    ],
)
def test_each_kind_survives_the_way_to_another_process(fields: dict[str, Any], kind: str) -> None:
    params = _params(**fields)
    assert params.structured_outputs is not None
    assert params.structured_outputs.kind == kind
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert arrived == params
    assert hash(arrived.structured_outputs) == hash(params.structured_outputs)


def test_a_schema_is_kept_as_text_with_its_properties_in_order() -> None:
    given = StructuredOutputsParams(json=_SCHEMA)
    assert given == StructuredOutputsParams(json=given.json)
    assert str(given.json).index('"b"') < str(given.json).index('"a"')
    assert dataclasses.replace(given, disable_any_whitespace=True).json == given.json


def test_an_object_is_taken_as_it_is() -> None:
    outputs = StructuredOutputsParams(choice=("a",))
    assert SamplingParams(structured_outputs=outputs).structured_outputs is outputs
    assert SamplingParams().structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "none of json, regex"),
        ({"json": {}, "regex": "a"}, "json and regex .* exactly one"),
        ({"json_object": False}, "none of"),
        ({"json": "{"}, "json is no JSON: .*pydantic"),
        ({"json": "[]"}, "an object"),
        ({"json": {"a": object()}}, "json is no JSON"),
        ({"json": {"minimum": float("nan")}}, "json is no JSON"),
        ({"json": "[" * 60_000}, "json is no JSON"),
        ({"json": True}, "JSON schema"),
        ({"json": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json": {"enum": ["v" * 40] * 4000}}, f"{MAX_CHARACTERS['json']} are allowed"),
        ({"json": {"pattern": "a" * 20_000}}, "allowed in one"),
        ({"regex": ""}, "not empty"),
        ({"regex": "a" * 40_000}, "allowed"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"choice": "yes"}, "a list of texts"),
        ({"choice": []}, "at least one"),
        ({"choice": ["a", ""]}, "non-empty"),
        ({"choice": ["a" * 70_000] * 2}, "allowed"),
        ({"grammar": '{"grammars": []}'}, "Lark or GBNF"),
        ({"regex": "a", "disable_any_whitespace": True}, "for json and json_object"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "contradicts"),
        ({"json_object": "yes"}, "True or False"),
        ({"structural_tag": "{}"}, "'structural_tag': .*one grammar"),
        ({"json": {}, "disable_additional_properties": True}, '"additionalProperties": false'),
        ({"json": {}, "backend": "xgrammar"}, "llguidance"),
        ({"jsn": {}}, "did you mean 'json'"),
        ({"pattern_of_mine": "a"}, "known: json"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSamplingParams, match=words):
        _params(**fields)


@pytest.mark.parametrize("value", ["json", 3, [("json", {})]])
def test_what_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(InvalidSamplingParams, match="StructuredOutputsParams, or a mapping"):
        SamplingParams(structured_outputs=value)


@pytest.mark.parametrize(
    "name", ["guided_decoding", "guided_json", "guided_regex", "guided_grammar", "response_format"]
)
def test_old_names_are_answered_with_the_right_one(name: str) -> None:
    with pytest.raises(InvalidSamplingParams, match=f"{name}.*use structured_outputs"):
        SamplingParams(**{name: {}})
