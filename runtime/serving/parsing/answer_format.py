"""How a model writes its answers: chosen once, and a parser of it for each answer."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ....vmem.errors import InvalidConfig
from .detection import HARMONY, added_tokens, find_formats, response_template, turn_marks
from .draft import Draft, plain_call_id, short_call_id
from .formats.base import CallFormat, ReasoningMarks, read_answer
from .formats.harmony import Harmony
from .formats.held import read_held
from .formats.hermes import Hermes
from .formats.llama3_json import Llama3Json
from .formats.mistral import Mistral
from .formats.qwen3_coder import Qwen3Coder
from .formats.response_template import TemplateReader, check_template
from .message_parser import MessageParser, Reader
from .tools import Tool, check_choice, read_tools

# By name: vLLM's further names for the same, and the markers that may be special tokens.
_CALLS = {
    "hermes": (("qwen3_json",), Hermes.openers),
    "qwen3_coder": (("qwen3_xml",), Qwen3Coder.openers),
    "llama3_json": (("llama4_json",), Llama3Json.openers),
    "mistral": ((), ("[TOOL_CALLS]", "[ARGS]")),
    "openai": ((), HARMONY),
    "hf": ((), ()),
    "none": ((), ()),
}
_THINK = ("deepseek_r1", "deepseek_v3", "glm45", "holo2", "mimo", "nemotron_v3", "qwen3")
_REASONING = {
    "think": (_THINK, ("<think>", "</think>")),
    "mistral": ((), ("[THINK]", "[/THINK]")),
    "openai": (("openai_gptoss",), HARMONY),
    "hf": ((), ()),
    "none": ((), ()),
}
_WHOLE = ("openai", "hf")  # they read calls, reasoning and content alike


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """How a model's answers are to be read. Any thread may use it.

    Attributes:
        tool_call_parser, reasoning_parser: the names of what reads them.
        skip_special_tokens: False where markers are special tokens: then the text must be made
            with them.
        turn_marks: tokens between a conversation's messages.
        response_template: for the parser `hf`.
    """

    tool_call_parser: str
    reasoning_parser: str
    skip_special_tokens: bool = True
    turn_marks: tuple[str, ...] = ()
    response_template: Mapping[str, Any] | None = field(default=None, repr=False)

    def parser(
        self, *, tools: Sequence[Mapping[str, Any]] | None, tool_choice: str, prompt: str
    ) -> MessageParser:
        """A parser for one answer.

        Args:
            tools: that may be called, as OpenAI's API has them. Without any, nothing is a call.
            tool_choice: `auto`; `none` to leave calls as text; `required` or a tool's name for an
                answer that `tool_grammar` holds.
            prompt: the text that the model goes on with, since it may have opened the reasoning.
                Empty for an answer that a grammar holds to something other than calls.

        Raises InvalidPrompt for tools that cannot be right.
        """
        known = read_tools(tools)
        is_held = check_choice(known, tool_choice)
        wanted = None if tool_choice == "none" or not known else tools
        read = self._reader(wanted, known, prompt)
        if is_held:
            name = None if tool_choice == "required" else tool_choice
            read = partial(read_held, name=name, otherwise=read)
        is_short = self.tool_call_parser == "mistral"
        return MessageParser(read, Draft(short_call_id if is_short else plain_call_id))

    def _reader(
        self, tools: Sequence[Mapping[str, Any]] | None, known: Sequence[Tool], prompt: str
    ) -> Reader:
        names = (self.tool_call_parser, self.reasoning_parser)
        has_calls = tools is not None and self.tool_call_parser != "none"
        has_reasoning = self.reasoning_parser != "none"
        if "openai" in names:
            return Harmony(has_calls=has_calls, has_reasoning=has_reasoning, prompt=prompt).read
        if "hf" in names:
            assert self.response_template is not None
            return TemplateReader(
                self.response_template,
                tools=tools if has_calls else None,
                has_reasoning=has_reasoning,
                prompt=prompt,
            ).read
        marks = _REASONING[self.reasoning_parser][1]
        pair = ReasoningMarks(opening=marks[0], closing=marks[1]) if marks else None
        return partial(
            read_answer,
            calls=_call_format(self.tool_call_parser, known) if has_calls else None,
            marks=pair,
            is_reasoning=pair is not None and self._is_opened(prompt, pair),
        )

    def _is_opened(self, prompt: str, marks: ReasoningMarks) -> bool:
        """Whether a prompt ends within reasoning that it has opened, and not a user's mention."""
        if prompt.rstrip().endswith(marks.opening):
            return True
        _, opening, rest = prompt.rpartition(marks.opening)
        ends = (marks.closing, *self.turn_marks)
        return bool(opening and self.turn_marks) and not any(end in rest for end in ends)


def check_names(tool_call_parser: str, reasoning_parser: str) -> None:
    """Raises InvalidConfig for a parser that there is not, before a model is loaded for it."""
    _resolve("tool_call_parser", tool_call_parser, _CALLS)
    _resolve("reasoning_parser", reasoning_parser, _REASONING)


def answer_format(
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> AnswerFormat:
    """How a model writes its answers, by names, or by what its tokenizer tells.

    Raises InvalidConfig for a name that there is not, for two that do not go together, and for a
    response template that is missing or not understood.
    """
    calls = _resolve("tool_call_parser", tool_call_parser, _CALLS)
    reasoning = _resolve("reasoning_parser", reasoning_parser, _REASONING)
    found = find_formats(tokenizer) if "auto" in (calls, reasoning) else ("none", "none")
    if calls == "auto":
        calls = reasoning if reasoning in _WHOLE else found[0]
    if reasoning == "auto":
        reasoning = calls if calls in _WHOLE else found[1]
    _check_pair(calls, reasoning)
    template = response_template(tokenizer)
    if "hf" in (calls, reasoning):
        if template is None:
            raise InvalidConfig(
                "the parser 'hf' needs a response_template in the tokenizer, which has none; "
                "choose another parser, or auto"
            )
        check_template(template)
    markers = {*_CALLS[calls][1], *_REASONING[reasoning][1]}
    tokens = added_tokens(tokenizer)
    hides = any(tokens.get(marker, False) for marker in markers)
    return AnswerFormat(
        tool_call_parser=calls,
        reasoning_parser=reasoning,
        skip_special_tokens=not (hides or calls in _WHOLE or reasoning in _WHOLE),
        turn_marks=tuple(mark for mark in turn_marks(tokenizer) if mark not in markers),
        response_template=template if "hf" in (calls, reasoning) else None,
    )


def _call_format(name: str, tools: Sequence[Tool]) -> CallFormat:
    if name == "qwen3_coder":
        return Qwen3Coder(tools)
    return {"hermes": Hermes, "llama3_json": Llama3Json, "mistral": Mistral}[name]()


def _resolve(option: str, name: str, known: Mapping[str, tuple[tuple[str, ...], Any]]) -> str:
    """A name of ours for one of anybody's."""
    ours = {"auto": "auto"}
    for own, (others, _) in known.items():
        ours |= dict.fromkeys((own, *others), own)
    if name not in ours:
        close = difflib.get_close_matches(str(name), ours, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidConfig(f"{option} is {name!r}; {hint}Known are {', '.join(ours)}")
    return ours[name]


def _check_pair(calls: str, reasoning: str) -> None:
    names = {calls, reasoning} - {"none"}
    if len(names) > 1 and names & set(_WHOLE):
        whole = next(name for name in _WHOLE if name in names)
        raise InvalidConfig(
            f"tool_call_parser is {calls!r} and reasoning_parser {reasoning!r}, and {whole!r} "
            f"reads the whole of an answer; use it for both, or none for the other"
        )
