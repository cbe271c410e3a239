"""Conversations to token ids, by a tokenizer's own template or by another."""

import difflib
import inspect
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidPrompt
from .prompts import Message, PlainPrompt
from .tokenizer import encode


class ChatOptions(TypedDict, total=False):
    """How a conversation is written out, under vLLM's names."""

    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None
    """What the model may call: JSON schemas, or functions with types and a docstring."""
    chat_template: str | None
    """A template in place of the tokenizer's, or the name of one of several that it has."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Further variables of the template, such as `enable_thinking`."""
    add_generation_prompt: bool | None
    """End with the beginning of the assistant's answer; None: unless a message is continued."""
    continue_final_message: bool
    """Leave the last message open, for the model to go on with."""


_OPTIONS = tuple(ChatOptions.__annotations__)
_NOT_HERE = {  # arguments of vLLM's `chat`
    "sampling_params": "it is params here",
    "use_tqdm": "it is progress here",
    "chat_template_content_format": "what a template takes is found by trying; leave it out",
    "lora_request": "load the adapter by load_adapter, and name it: adapter=…",
    "mm_processor_kwargs": "models take text alone here; leave it out",
    "tokenization_kwargs": "use SamplingParams(truncate_prompt_tokens=…), or leave it out",
}
_MOST_KNOWN = 64  # templates
_PROBE = "vkv 7391"  # that no template says by itself


class ChatTemplate:
    """Writes conversations out as a model was taught to read them. Any thread may use it.

    Args:
        tokenizer: whose template it is; None for a model without one.
        model: its name, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, model: str) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._takes_parts: dict[str, bool] = {}  # by template: contents as lists of parts alone

    def render(self, messages: Sequence[Message], options: ChatOptions) -> PlainPrompt:
        """A conversation's text and tokens, up to where the assistant's next message begins.

        Raises InvalidPrompt, which names the model, if there is no template or it refuses.
        """
        check_names(options)
        _check_types(options)
        template = self._choose(options)
        assert self._tokenizer is not None
        _check_conversation(messages)
        tidy = [_tidy(message) for message in messages]
        text = self._write(template, tidy, self._arguments(template, options))
        tokens = encode(self._tokenizer, text, what="the conversation", add_special_tokens=False)
        return PlainPrompt(text=text, token_ids=tokens)

    def takes(self, variable: str, options: ChatOptions) -> bool:
        """Whether the template makes use of a variable. Raises InvalidPrompt if there is none."""
        return _names(self._choose(options), variable)

    def _choose(self, options: ChatOptions) -> str:
        """The template's text."""
        given = options.get("chat_template")
        own = self._tokenizer.chat_template if self._tokenizer is not None else None
        if self._tokenizer is None or not (given or own):
            raise InvalidPrompt(
                f"{self._model} has no chat template; pass a plain prompt to generate(), or "
                "chat_template="
                + ("" if self._tokenizer is not None else " and, to LLM, tokenizer=")
            )
        try:
            template = self._tokenizer.get_chat_template(given, options.get("tools") or None)  # type: ignore[arg-type]
        except ValueError as error:
            raise InvalidPrompt(f"{self._model}: {error}; pass chat_template=") from error
        if "{{" not in template and "{%" not in template:
            names = sorted(own) if isinstance(own, dict) else []
            raise InvalidPrompt(
                f"chat_template is {template!r}, which writes no message; give a template's text"
                + (f", or one of {', '.join(names)}" if names else "")
            )
        return template

    def _arguments(self, template: str, options: ChatOptions) -> dict[str, Any]:
        """What is told to the template beside the messages, of which it must make use."""
        tools, more = options.get("tools"), options.get("chat_template_kwargs") or {}
        if asked := [*more, *(["tools"] if tools else [])]:
            self._check_variables(template, more, asked)
        is_open = bool(options.get("continue_final_message"))
        begins = options.get("add_generation_prompt")
        begins = not is_open if begins is None else begins
        if begins and is_open:
            raise InvalidPrompt(
                "add_generation_prompt and continue_final_message are both True, and an answer "
                "cannot begin in an open message; leave one of them out"
            )
        return {
            **more,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": begins,
            "continue_final_message": is_open,
        }

    def _check_variables(self, template: str, more: Mapping[str, Any], asked: list[str]) -> None:
        """Refuse what the template would not see, or what `transformers` would take for itself."""
        assert self._tokenizer is not None
        taken = inspect.signature(self._tokenizer.apply_chat_template).parameters
        for name in asked:
            if name in more and name in _OPTIONS:
                raise InvalidPrompt(f"chat_template_kwargs has {name!r}; pass it as an argument")
            reserved = name in taken and name not in ("tools", "documents")
            if reserved or not _names(template, str(name)):
                raise InvalidPrompt(
                    f"the chat template of {self._model} has no variable {name!r}; leave it out, "
                    "or pass a chat_template= that has"
                )

    def _write(
        self, template: str, messages: list[dict[str, Any]], arguments: dict[str, Any]
    ) -> str:
        """The text, whichever form of contents and of calls' arguments the template takes."""
        if self._wants_parts(template):
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        if not calls:
            return self._apply(template, messages, arguments)
        try:
            text = self._apply(template, messages, arguments)
            if not any(_shows_repr(call, text) for call in calls):
                return text
        except InvalidPrompt:
            pass  # it may be one that takes them as JSON; if it is not, the error comes again
        return self._apply(template, [_with_json(message) for message in messages], arguments)

    def _wants_parts(self, template: str) -> bool:
        """Whether a template shows contents only if they are lists of parts. Found by trying."""
        if template not in self._takes_parts:
            if len(self._takes_parts) >= _MOST_KNOWN:  # callers may give others for ever
                self._takes_parts.clear()
            parts = [{"type": "text", "text": _PROBE}]
            self._takes_parts[template] = not self._shows(template, _PROBE) and self._shows(
                template, parts
            )
        return self._takes_parts[template]

    def _shows(self, template: str, content: Any) -> bool:
        try:
            return _PROBE in self._apply(template, [{"role": "user", "content": content}], {})
        except InvalidPrompt:
            return False

    def _apply(
        self, template: str, messages: list[dict[str, Any]], arguments: dict[str, Any]
    ) -> str:
        assert self._tokenizer is not None
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, **arguments
            )
        except TemplateError as error:
            raise InvalidPrompt(
                f"the chat template refuses the conversation: {_printable(error)}"
            ) from error
        except Exception as error:
            raise InvalidPrompt(
                f"the chat template fails on the conversation: {type(error).__name__}: "
                f"{_printable(error)}"
            ) from error
        assert isinstance(text, str), "one conversation was rendered, not a batch"
        return text


def _printable(error: Exception) -> str:
    """What it says, which may have a lone surrogate of the conversation's in it."""
    return str(error).encode(errors="backslashreplace").decode()


def _names(template: str, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", template) is not None


def check_names(options: Mapping[str, Any]) -> None:
    """Raises InvalidPrompt for an option that there is not."""
    for name in options:
        if name in _NOT_HERE:
            raise InvalidPrompt(f"there is no chat option {name!r}: {_NOT_HERE[name]}")
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_OPTIONS)}"
            raise InvalidPrompt(f"unknown chat option {name!r}: {hint}")


def _check_types(options: ChatOptions) -> None:
    for name, kinds, remedy in (
        ("tools", list | tuple, "give a list of schemas or functions"),
        ("chat_template", str, "give a template's text"),
        ("chat_template_kwargs", Mapping, "give a dictionary"),
        ("add_generation_prompt", bool, "use True or False"),
        ("continue_final_message", bool, "use True or False"),
    ):
        value = options.get(name)
        if value is not None and not isinstance(value, kinds):
            raise InvalidPrompt(f"{name} is {reprlib.repr(value)}; {remedy}")


def _check_conversation(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidPrompt(
            f"a conversation is a list of messages, and {reprlib.repr(messages)} is none; use "
            "[{'role': 'user', 'content': …}]"
        )
    if not messages:
        raise InvalidPrompt("the conversation has no messages; give it at least one")


def _tidy(message: Any) -> dict[str, Any]:
    """A message of which a template can make text: its content is text, its calls are plain."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidPrompt(
            f"{reprlib.repr(message)} is no message; give it a 'role' and a 'content'"
        )
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise InvalidPrompt(
            f"a message's tool_calls is {reprlib.repr(calls)}; give a list of calls"
        )
    content = message.get("content")
    if content is None and not calls:
        raise InvalidPrompt(
            f"{reprlib.repr(dict(message))} says nothing; give it a 'content', or 'tool_calls'"
        )
    tidy = {**message, "content": "" if content is None else _as_text(content)}
    if calls:
        tidy["tool_calls"] = [_tidy_call(call) for call in calls]
    return tidy


def _as_text(content: Any) -> str:
    """A content's text; parts are joined by line breaks, as vLLM joins them."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, list | tuple):
        raise InvalidPrompt(
            f"a message's content is {reprlib.repr(content)}; give a text, or a list of text parts"
        )
    return "\n".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise InvalidPrompt(
            f"{reprlib.repr(part)} is no part that a model of text reads; use "
            "{'type': 'text', 'text': …}"
        )
    return text


def _tidy_call(call: Any) -> dict[str, Any]:
    """A call whose arguments are a dictionary; OpenAI's clients have them as JSON."""
    function = _function(call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidPrompt(
            f"{reprlib.repr(call)} is no tool call; use "
            "{'type': 'function', 'function': {'name': …, 'arguments': …}}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise InvalidPrompt(
                f"a tool call's arguments {reprlib.repr(arguments)} are no JSON ({error}); give a "
                "dictionary, or JSON"
            ) from error
    return _with_arguments(call, {} if arguments is None else arguments)


def _function(call: Any) -> Any:
    """What a call calls: it may stand in the call or under "function"."""
    return call.get("function", call) if isinstance(call, Mapping) else None


def _with_arguments(call: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": arguments}}
    return {**call, "arguments": arguments}


def _shows_repr(call: Mapping[str, Any], text: str) -> bool:
    """Whether a call's arguments stand in the text as Python writes them."""
    arguments = _function(call)["arguments"]
    return bool(arguments) and repr(arguments) in text


def _with_json(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON."""
    calls = [
        _with_arguments(call, json.dumps(_function(call)["arguments"], ensure_ascii=False))
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message
