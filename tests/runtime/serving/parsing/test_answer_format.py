"""Which parser is chosen, by name or by what a tokenizer tells."""

import re

import pytest
from answers import TOOLS, Answer, by_names, read, tokenizer
from transformers import PreTrainedTokenizerFast
from vkv.runtime.serving.parsing import answer_format
from vkv.vmem.errors import InvalidConfig, InvalidPrompt

QWEN = (
    '{% if tools %}<tools>{{ tools }}</tools> <tool_call>\n{"name": …, "arguments": …}\n'
    "</tool_call>{% endif %}<|im_start|>assistant\n"
)
CODER = "{% if tools %}<tool_call><function=f><parameter=p></parameter>{% endif %}"
LLAMA = (
    '{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}'
    "<|start_header_id|>assistant<|end_header_id|>"
)
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]"
GLM = "{{ tools }}<tool_call>{name}\n<arg_key>{key}</arg_key> arguments </think>"


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|end|>")


@pytest.mark.parametrize(
    ("known", "calls", "reasoning", "skips"),
    [
        (None, "none", "none", True),
        (tokenizer(), "none", "none", True),
        (tokenizer("{{ messages }}"), "none", "none", True),
        (tokenizer(QWEN), "hermes", "none", True),
        (tokenizer(QWEN, plain=["<tool_call>", "<think>", "</think>"]), "hermes", "think", True),
        (tokenizer(QWEN, special=["<tool_call>"]), "hermes", "none", False),
        (tokenizer(QWEN + "</think>", special=["</think>"]), "hermes", "think", False),
        (tokenizer(CODER), "qwen3_coder", "none", True),
        (tokenizer(LLAMA), "llama3_json", "none", True),
        (tokenizer(LLAMA, special=["<|python_tag|>"]), "llama3_json", "none", False),
        (tokenizer(MISTRAL, special=["[TOOL_CALLS]"]), "mistral", "none", False),
        (tokenizer(MISTRAL + "[THINK][/THINK]"), "mistral", "mistral", True),
        (tokenizer(None, special=HARMONY), "openai", "openai", False),
        (tokenizer(GLM), "none", "think", True),
        (tokenizer({"default": "{{ messages }}", "tool_use": QWEN}), "hermes", "none", True),
        # A template that shows no tools, as many rewritten ones.
        (tokenizer("<tool_call> arguments"), "none", "none", True),
    ],
)
def test_what_is_found_of_atokenizer(
    known: PreTrainedTokenizerFast | None, calls: str, reasoning: str, skips: bool
) -> None:
    answers = answer_format(known)
    found = (answers.tool_call_parser, answers.reasoning_parser, answers.skip_special_tokens)
    assert found == (calls, reasoning, skips)


@pytest.mark.parametrize(
    ("calls", "reasoning", "expected"),
    [
        ("qwen3_json", "qwen3", ("hermes", "think")),
        ("qwen3_xml", "deepseek_r1", ("qwen3_coder", "think")),
        ("llama4_json", "none", ("llama3_json", "none")),
        ("openai", "openai_gptoss", ("openai", "openai")),
        ("openai", "auto", ("openai", "openai")),
        ("auto", "openai", ("openai", "openai")),
        ("none", "auto", ("none", "none")),
    ],
)
def test_other_names_of_the_same(calls: str, reasoning: str, expected: tuple[str, str]) -> None:
    answers = by_names(calls, reasoning)
    assert (answers.tool_call_parser, answers.reasoning_parser) == expected


@pytest.mark.parametrize(
    ("calls", "reasoning", "words"),
    [
        ("hermse", "none", "tool_call_parser is 'hermse'; did you mean 'hermes'? Known are auto,"),
        ("none", "thinking", "reasoning_parser is 'thinking'; did you mean"),
        ("pythonic", "none", "Known are auto, hermes, qwen3_json, qwen3_coder,"),
        ("openai", "think", "'openai' reads the whole of an answer"),
        ("hermes", "openai", "'openai' reads the whole of an answer"),
        ("hf", "auto", "needs a response_template in the tokenizer"),
    ],
)
def test_names_that_there_are_not(calls: str, reasoning: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(words)):
        by_names(calls, reasoning)


TURN = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        (f"Why <think>?{TURN}", False),
        (f"Why?{TURN}<think>\n", True),
        (f"Why?{TURN}<think>\nLet me go on", True),  # a message that is continued
        (f"Why?{TURN}<think>\n\n</think>\n\n", False),
        (f"Why?{TURN}<think>\nHm</think>A{TURN}", False),
        ("", False),
    ],
)
def test_a_mention_in_the_prompt_opens_no_reasoning(prompt: str, is_open: bool) -> None:
    known = tokenizer(QWEN, special=["<|im_start|>", "<|im_end|>"], plain=["<think>", "</think>"])
    answers = answer_format(known)
    expected = Answer("", "so") if is_open else Answer("so")
    assert read(answers, "so", prompt=prompt) == expected


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        (TOOLS, "fly", "tool_choice is 'fly', and the tools are 'weather', 'now'"),
        (None, "required", "tool_choice is 'required' without tools"),
        ([], "now", "tool_choice is 'now' without tools"),
        ([3], "auto", "tool 0 is 3"),
        ([{"type": "web_search"}], "auto", "tool 0 is {'type': 'web_search'}"),
        ([{"type": "function", "function": {}}], "auto", "the name of tool 0 is None"),
        ([TOOLS[1], TOOLS[1]], "auto", "several tools 'now'"),
        ({"name": "now"}, "auto", "give a list of tools"),
    ],
)
def test_tools_that_cannot_be_right_are_refused(tools: object, choice: str, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=re.escape(words)):
        by_names("hermes").parser(tools=tools, tool_choice=choice, prompt="")  # type: ignore[arg-type]
