"""Items of a response: those that come in, and those that are made of an answer."""

from typing import Any

import pytest
from vkv.runtime.serving.http.errors import ApiError
from vkv.runtime.serving.parsing import MessageDelta, ToolCallDelta
from vkv.runtime.serving.protocols.responses.input_items import conversation
from vkv.runtime.serving.protocols.responses.output_items import OutputItems

CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}


def _called(name: str, arguments: str) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "add", "arguments": arguments}}


def test_what_an_assistant_does_in_one_go_is_one_message() -> None:
    given = [
        {"role": "user", "content": "add"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I will"}]},
        CALL,
        {**CALL, "call_id": "c2", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "0"}],
        },
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]
    assert conversation("Be brief.", given) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "add"},
        {
            "role": "assistant",
            "content": "I will",
            "reasoning_content": "so",
            "tool_calls": [_called("c1", '{"a": 1}'), _called("c2", "{}")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "0"},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]


def test_a_summary_stands_for_thoughts_that_are_not_there() -> None:
    given = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}, CALL]
    (message,) = conversation(None, given)
    assert message["reasoning_content"] == "so"
    assert message["tool_calls"] == [_called("c1", '{"a": 1}')]


def test_arguments_nested_too_deeply_are_refused() -> None:
    with pytest.raises(ApiError, match="no JSON"):
        conversation(None, [{**CALL, "arguments": "[" * 100_000}])


def test_items_of_an_answer_one_after_the_other() -> None:
    items = OutputItems("x")
    events = []
    for part, logprobs in (
        (MessageDelta(reasoning="I "), [1]),
        (MessageDelta(reasoning="think"), [2]),
        (MessageDelta(), [3]),  # the mark behind it, held back
        (MessageDelta(content="So"), [4]),
        (MessageDelta(tool_calls=(ToolCallDelta(index=0, id="c1", name="add"),)), [5]),
        (MessageDelta(tool_calls=(ToolCallDelta(index=0, arguments='{"a"'),)), [6]),
        (MessageDelta(tool_calls=(ToolCallDelta(index=0, arguments=":1}"),)), [7]),
        (MessageDelta(tool_calls=(ToolCallDelta(index=1, id="c2", name="add"),)), [8]),
    ):
        events += items.take(part, [{"n": n} for n in logprobs])
    events += items.close()
    assert [(item["type"], item["status"]) for item in items.done] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "completed"),
    ]
    thought, said, first, second = items.done
    assert thought["content"] == [{"type": "reasoning_text", "text": "I think"}]
    assert said["content"][0]["text"] == "So"
    assert [entry["n"] for entry in said["content"][0]["logprobs"]] == [3, 4]
    assert (first["call_id"], first["name"], first["arguments"]) == ("c1", "add", '{"a":1}')
    assert (second["call_id"], second["arguments"]) == ("c2", "")
    assert len({item["id"] for item in items.done}) == 4
    _check_order(events)


def _check_order(events: list[dict[str, Any]]) -> None:
    """Each item begins once and ends once, and its pieces make what its end says."""
    open_index, pieces = None, ""
    for event in events:
        kind, index = event["type"], event["output_index"]
        if kind == "response.output_item.added":
            assert open_index is None
            open_index, pieces = index, ""
        elif kind.endswith(".delta"):
            pieces += event["delta"]
        elif kind.endswith(("text.done", "arguments.done")):
            assert pieces == event.get("text", event.get("arguments"))
        assert index == open_index
        if kind == "response.output_item.done":
            open_index = None
    assert open_index is None
