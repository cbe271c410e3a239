"""Anything at all, handed in anywhere: it is taken, or refused by a typed error and no other."""

import collections
import dataclasses
import decimal
import enum
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zoo
from vkv import LLM, SamplingParams
from vkv.runtime.request.plain_values import half_of_a_pair
from vkv.vmem.errors import UsageError


class _Text(str):
    __slots__ = ()


class _Number(enum.IntEnum):
    THREE = 3


_MESSAGE = {"role": "user", "content": "x"}
_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, -2, 5, 10**30, 10**400, 0.5, -0.5, float("nan"), float("inf")),
    *("", "x", "\ud800", b"x", bytearray(b"x"), memoryview(b"xy")),
    *(
        [],
        [1],
        ["x"],
        [None],
        [[1]],
        [b"x"],
        [[]],
        [["x"]],
        {},
        {1: 2},
        {"a": 1},
        set(),
        {1},
        {"x"},
    ),
    *({1, "x"}, (1, 2), range(3), {1: 2}.keys(), {"x": 1}.values(), collections.deque([1, 2])),
    *(np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("x"), np.array(3)),
    *(np.array([1, 2]), np.array([[1, 2]]), np.array(["x", "y"]), np.array([])),
    *(np.datetime64("2020-01-01"), torch.tensor(3), torch.tensor(0.5), torch.tensor([1, 2])),
    *(torch.tensor([True]), 1 + 2j, decimal.Decimal(1), _Text("x"), _Number.THREE, object(), int),
    {"role": "user"},
    _MESSAGE,
    [_MESSAGE],
    [[_MESSAGE], 5],
    [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}],
    [{"role": "user", "content": [{"type": "text"}, 5]}],
    *([{"role": "assistant", "tool_calls": calls}] for calls in (5, {"a": 1}, ["x"], [{}])),
    [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": [1]}}]}],
    {"prompt": "x"},
    {"prompt": None},
    {"prompt_token_ids": "x"},
    {"prompt_token_ids": [5]},
]


def _foreign(attempts: dict[str, Callable[[Any], object]]) -> list[str]:
    """What is raised that vkv does not raise on purpose."""
    found = []
    for what, attempt in attempts.items():
        for value in _VALUES:
            try:
                attempt(value)
            except UsageError as error:
                if half_of_a_pair(str(error)) is not None:
                    found.append(f"{what} {value!r}: {str(error)!r} cannot be printed")
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                found.append(f"{what} {value!r}: {type(error).__name__} {error}")
    return found


def _parameter(name: str) -> Callable[[Any], object]:
    def attempt(value: Any) -> None:
        params = SamplingParams(**{name: value})
        arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
        assert arrived == params

    return attempt


def test_no_value_of_a_parameter_raises_what_is_not_ours() -> None:
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    assert not _foreign({name: _parameter(name) for name in names})


@pytest.mark.filterwarnings("ignore")  # what others warn of, of such values
def test_no_prompt_or_conversation_raises_what_is_not_ours() -> None:
    tokenizer = zoo.letter_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template += "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ thinks }}"
    model, options = zoo.tiny_model("llama"), zoo.with_defaults({"max_seqs": 4})
    greedy = zoo.greedy(1)
    with LLM(model, tokenizer=tokenizer, device="cpu", **options) as llm:
        attempts: dict[str, Callable[[Any], object]] = {
            "prompt": lambda value: llm.generate(value, greedy),
            "prompts": lambda value: llm.generate(["x", value], greedy),
            "token ids": lambda value: llm.generate({"prompt_token_ids": value}, greedy),
            "parameters": lambda value: llm.generate(["x"], value),
            "conversation": lambda value: llm.chat(value, greedy),
            "message": lambda value: llm.chat([value], greedy),
            "role": lambda value: llm.chat([{"role": value, "content": "x"}], greedy),
            "content": lambda value: llm.chat([{"role": "user", "content": value}], greedy),
            "stream": lambda value: list(llm.stream(value, greedy)),
            "a tool": lambda value: llm.chat([_MESSAGE], greedy, tools=[value]),
            "a variable": lambda value: llm.chat(
                [_MESSAGE], greedy, chat_template_kwargs={"thinks": value}
            ),
        }
        for name in ("tools", "chat_template", "chat_template_kwargs"):
            attempts[name] = lambda value, name=name: llm.chat([_MESSAGE], greedy, **{name: value})
        for name in ("add_generation_prompt", "continue_final_message"):
            attempts[name] = lambda value, name=name: llm.render_chat([_MESSAGE], **{name: value})
        assert not _foreign(attempts)
        zoo.assert_idle(llm)
