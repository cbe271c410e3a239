"""What three servers answer to the same requests: rows that are tested, and a page made of them.

Write the page anew: `python tests/support/conformance.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "runtime" / "serving" / "CONFORMANCE.md"
ANY = object()
"""In `Row.finds`: it is there, whatever it is."""

_NOT_READ = "not read"
_IGNORED = "200; unknown fields are ignored, with a line in its log"
_CHAT = "/v1/chat/completions"
_TEXT = "/v1/completions"
_RESPONSES = "/v1/responses"
_CLAUDE = "/v1/messages"
_ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 3 + 4?"}],
    "temperature": 0,
    "max_tokens": 16,
}
_GO_ON: dict[str, Any] = {"prompt": "3 + 4 =", "temperature": 0, "max_tokens": 4}
_NUMBER = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "additionalProperties": False}
_TOOL = {"type": "function", "function": {"name": "add", "parameters": _NUMBER}}
_DONE = {"-1": "[DONE]"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request, and what each server answers.

    Attributes:
        route: the path, and the method where it is not POST.
        asks: what is asked, for readers.
        vllm, llama_cpp: what they answer, by their sources.
        ours: what we answer, for readers; and why, where the three differ.
        body: what is sent.
        status: of our answer.
        finds: dotted places in our answer, or in the list of its events, and what stands there.
        lacks: dotted places that are not there.
        words: of our error's message.
    """

    route: str
    asks: str
    vllm: str
    llama_cpp: str
    ours: str
    body: Mapping[str, Any] | None = None
    status: int = 200
    finds: Mapping[str, Any] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    words: str = ""

    @property
    def method(self) -> str:
        """Of HTTP."""
        return self.route.split()[0] if " " in self.route else "POST"

    @property
    def path(self) -> str:
        """Of the route."""
        return self.route.split()[-1]


def _refused(route: str, asks: str, body: Mapping[str, Any], words: str, **more: str) -> Row:
    """A request that is wrong, of which we say so with 400."""
    status = 400
    return Row(route=route, asks=asks, body=body, status=status, words=words, **more)  # type: ignore[arg-type]


CHAT = (
    Row(
        route=_CHAT,
        asks="a question",
        body=_ASK,
        vllm="`chat.completion`, id `chatcmpl-…`",
        llama_cpp="the same; id `chatcmpl-…`, and `timings` beside",
        ours="the same",
        finds={
            "object": "chat.completion",
            "choices.0.message.role": "assistant",
            "choices.0.finish_reason": "stop",
            "usage.total_tokens": ANY,
        },
    ),
    Row(
        route=_CHAT,
        asks="`stream`: the first chunk",
        body={**_ASK, "stream": True},
        vllm='`delta: {role: "assistant", content: ""}`',
        llama_cpp='`delta: {role: "assistant", content: null}`',
        ours="as vLLM, whose empty text every client can add to",
        finds={"0.choices.0.delta": {"role": "assistant", "content": ""}, **_DONE},
    ),
    Row(
        route=_CHAT,
        asks="`stream`: usage that nobody asked for",
        body={**_ASK, "stream": True},
        vllm="none, unless the server is told to force it",
        llama_cpp=_NOT_READ,
        ours="none: a chunk without choices breaks strict clients",
        finds={"-2.choices.0.finish_reason": "stop"},
        lacks=("-2.usage",),
    ),
    Row(
        route=_CHAT,
        asks="`stream_options.include_usage`",
        body={**_ASK, "stream": True, "stream_options": {"include_usage": True}},
        vllm="a last chunk with `choices: []` and `usage`",
        llama_cpp="a last chunk with `choices: []` and `usage`",
        ours="the same",
        finds={"-2.choices": [], "-2.usage.total_tokens": ANY, **_DONE},
    ),
    Row(
        route=_CHAT,
        asks="`stream_options` without `stream`",
        body={**_ASK, "stream_options": {"include_usage": True}},
        vllm="400",
        llama_cpp="200; taken, of no effect",
        ours="200: it changes no answer, and some clients always send it",
        finds={"choices.0.finish_reason": "stop"},
    ),
    _refused(
        _CHAT,
        "a field that there is not",
        {**_ASK, "temprature": 1},
        "did you mean 'temperature'",
        vllm=_IGNORED,
        llama_cpp="200; ignored",
        ours="400: a misspelled field would silently change nothing",
    ),
    _refused(
        _CHAT,
        "`messages: []`",
        {**_ASK, "messages": []},
        "messages",
        vllm=_NOT_READ,
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    _refused(
        _CHAT,
        "no `messages`",
        {"temperature": 0},
        "messages: Field required",
        vllm="400",
        llama_cpp="400",
        ours="400",
    ),
    _refused(
        _CHAT,
        "a message without `content`",
        {"messages": [{"role": "user"}]},
        "says nothing",
        vllm=_NOT_READ,
        llama_cpp="400",
        ours="400",
    ),
    _refused(
        _CHAT,
        "a picture for a model of text",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
                }
            ]
        },
        "no part that a model of text reads",
        vllm=_NOT_READ,
        llama_cpp="500, with the advice to load a projector",
        ours="400: the request is at fault",
    ),
    Row(
        route=_CHAT,
        asks="contents as parts of text",
        body={**_ASK, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        vllm="200",
        llama_cpp="200",
        ours="200",
        finds={"choices.0.message.content": ANY},
    ),
    Row(
        route=_CHAT,
        asks="`logprobs` with `top_logprobs: 2`",
        body={**_ASK, "logprobs": True, "top_logprobs": 2},
        vllm="`logprobs.content[]`: token, logprob, bytes, top_logprobs",
        llama_cpp="the same, with token ids beside",
        ours="as vLLM",
        finds={
            "choices.0.logprobs.content.0.token": ANY,
            "choices.0.logprobs.content.0.bytes": ANY,
            "choices.0.logprobs.content.0.top_logprobs.1.logprob": ANY,
        },
    ),
    _refused(
        _CHAT,
        "`top_logprobs` without `logprobs`",
        {**_ASK, "top_logprobs": 2},
        "set logprobs to true",
        vllm="400",
        llama_cpp="400",
        ours="400",
    ),
    _refused(
        _CHAT,
        "`top_logprobs: 21`",
        {**_ASK, "logprobs": True, "top_logprobs": 21},
        "--max-logprobs",
        vllm="400: no more than `--max-logprobs`, which is 20",
        llama_cpp=_NOT_READ,
        ours="as vLLM",
    ),
    _refused(
        _CHAT,
        "`stream` with `prompt_logprobs`",
        {**_ASK, "stream": True, "prompt_logprobs": 1},
        "in a stream",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    _refused(
        _CHAT,
        "`tool_choice` without `tools`",
        {**_ASK, "tool_choice": "required"},
        "without tools",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    Row(
        route=_CHAT,
        asks="`tools: []`",
        body={**_ASK, "tools": []},
        vllm="400, as OpenAI's API",
        llama_cpp="200; as none",
        ours="200: no tools are no tools",
        finds={"choices.0.finish_reason": "stop"},
    ),
    _refused(
        _CHAT,
        "a named tool that is not among `tools`",
        {
            **_ASK,
            "tools": [_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "x"}},
        },
        "'x'",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    Row(
        route=_CHAT,
        asks="`tool_choice` that names a tool: why the answer ended",
        body={
            **_ASK,
            "max_tokens": 200,
            "tools": [_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "add"}},
            "chat_template": "{{ tools | tojson }}",
        },
        vllm="`stop`, as OpenAI's API; `tool_calls` for `required` and `auto`",
        llama_cpp=_NOT_READ,
        ours="`tool_calls` whenever there are calls: agents go on by it",
        finds={
            "choices.0.finish_reason": "tool_calls",
            "choices.0.message.tool_calls.0.function.name": "add",
        },
    ),
    _refused(
        _CHAT,
        "`tools` where the template shows none",
        {**_ASK, "tools": [_TOOL]},
        "tools",
        vllm=_NOT_READ,
        llama_cpp=_NOT_READ,
        ours="400: a model that is told of no tools can call none",
    ),
    _refused(
        _CHAT,
        "`response_format: json_schema` without a schema",
        {**_ASK, "response_format": {"type": "json_schema"}},
        "without a schema",
        vllm="400",
        llama_cpp="200; as any JSON",
        ours="400",
    ),
    _refused(
        _CHAT,
        "`response_format` of a type that there is not",
        {**_ASK, "response_format": {"type": "sound"}},
        "response_format",
        vllm="400",
        llama_cpp="400",
        ours="400",
    ),
    _refused(
        _CHAT,
        "`functions`, from before there were tools",
        {**_ASK, "functions": []},
        "use tools",
        vllm=_IGNORED,
        llama_cpp="200; ignored",
        ours="400, names `tools`",
    ),
    _refused(
        _CHAT,
        "`priority: 1` where requests run in their order",
        {**_ASK, "priority": 1},
        "priority is 1",
        vllm="an error, unless it schedules by priority",
        llama_cpp="200; ignored",
        ours="400, unless `--scheduling-policy priority`",
    ),
    Row(
        route=_CHAT,
        asks="a model that is not there",
        body={**_ASK, "model": "gpt-4"},
        status=404,
        words="no model 'gpt-4'",
        vllm="404",
        llama_cpp="200; one model answers to any name",
        ours="404: an answer of another model than the one that was asked would mislead",
        finds={"error.code": "model_not_found"},
    ),
    Row(
        route=_CHAT,
        asks="`cache_salt`",
        body={**_ASK, "cache_salt": "mine"},
        vllm="200; prefixes are shared within it alone",
        llama_cpp="200; ignored",
        ours="as vLLM",
        finds={"choices.0.finish_reason": "stop"},
    ),
    _refused(
        _CHAT,
        "`continue_final_message` with `add_generation_prompt`",
        {**_ASK, "continue_final_message": True, "add_generation_prompt": True},
        "both True",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    Row(
        route=_CHAT,
        asks="`return_token_ids`",
        body={**_ASK, "return_token_ids": True},
        vllm="`prompt_token_ids`, and `token_ids` of each choice",
        llama_cpp="200; ignored (`return_tokens` is its own)",
        ours="as vLLM",
        finds={"prompt_token_ids.0": ANY, "choices.0.token_ids.0": ANY},
    ),
)

COMPLETIONS = (
    Row(
        route=_TEXT,
        asks="a prompt",
        body=_GO_ON,
        vllm="`text_completion`, id `cmpl-…`",
        llama_cpp="`text_completion`, id `chatcmpl-…`",
        ours="as vLLM",
        finds={"object": "text_completion", "choices.0.text": ANY},
    ),
    Row(
        route=_TEXT,
        asks="no `max_tokens`",
        body={"prompt": "3 + 4 =", "temperature": 0, "ignore_eos": True},
        vllm="16 tokens, as OpenAI's API",
        llama_cpp="tokens without end",
        ours="as the model's authors say, 64 here; 16 where they say nothing",
        finds={"usage.completion_tokens": 64},
    ),
    Row(
        route=_TEXT,
        asks="several prompts",
        body={**_GO_ON, "prompt": ["3 + 4 =", "hello"]},
        vllm="a choice for each",
        llama_cpp=_NOT_READ,
        ours="as vLLM",
        finds={"choices.1.index": 1},
    ),
    Row(
        route=_TEXT,
        asks="a prompt as token ids",
        body={**_GO_ON, "prompt": [5, 6, 7]},
        vllm="200",
        llama_cpp="200",
        ours="200",
        finds={"usage.prompt_tokens": 3},
    ),
    Row(
        route=_TEXT,
        asks="`echo` with `logprobs`",
        body={**_GO_ON, "prompt": [5, 6, 7], "echo": True, "logprobs": 1},
        vllm="the prompt's log probabilities too; none for its first token",
        llama_cpp="500: no echo",
        ours="as vLLM",
        finds={"choices.0.logprobs.token_logprobs.0": None, "choices.0.logprobs.tokens.6": ANY},
    ),
    Row(
        route=_TEXT,
        asks="`echo` with `max_tokens: 0`",
        body={**_GO_ON, "prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 0},
        vllm="the prompt alone",
        llama_cpp="500: no echo",
        ours="as vLLM",
        finds={"choices.0.logprobs.tokens.2": ANY, "usage.completion_tokens": 0},
        lacks=("choices.0.logprobs.tokens.3",),
    ),
    _refused(
        _TEXT,
        "`max_tokens: 0` without `echo`",
        {**_GO_ON, "max_tokens": 0},
        "asks for nothing",
        vllm=_NOT_READ,
        llama_cpp="200; the prompt is only computed",
        ours="400",
    ),
    _refused(
        _TEXT,
        "`prompt: []`",
        {**_GO_ON, "prompt": []},
        "empty list",
        vllm=_NOT_READ,
        llama_cpp="an error",
        ours="400",
    ),
    _refused(
        _TEXT,
        "a token id that there is not",
        {**_GO_ON, "prompt": [5, 1 << 40]},
        str(1 << 40),
        vllm=_NOT_READ,
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    _refused(
        _TEXT,
        "`suffix`",
        {**_GO_ON, "suffix": "x"},
        "fill no gap",
        vllm="no model of it takes one; what it answers was not read",
        llama_cpp="500: unsupported",
        ours="400",
    ),
    Row(
        route=_TEXT,
        asks="`priority: 0`",
        body={**_GO_ON, "priority": 0},
        vllm="200",
        llama_cpp="200; ignored",
        ours="200",
        finds={"choices.0.text": ANY},
    ),
    _refused(
        _TEXT,
        "`best_of: 2`",
        {**_GO_ON, "best_of": 2},
        "use n",
        vllm=_IGNORED,
        llama_cpp="500: unsupported",
        ours="400",
    ),
    _refused(
        _TEXT,
        "`n: 1000`",
        {**_GO_ON, "n": 1000},
        "n is 1000",
        vllm=_NOT_READ,
        llama_cpp="an error: no more than its slots",
        ours="400: no more than `--max-n`",
    ),
    _refused(
        _TEXT,
        "`temperature: -1`",
        {**_GO_ON, "temperature": -1},
        "temperature",
        vllm=_NOT_READ,
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    Row(
        route=_TEXT,
        asks="`stop` as one text",
        body={**_GO_ON, "stop": "7", "max_tokens": 8},
        vllm="ends there; `stop_reason` names it",
        llama_cpp="ends there",
        ours="as vLLM",
        finds={"choices.0.finish_reason": "stop", "choices.0.stop_reason": "7"},
    ),
    Row(
        route=_TEXT,
        asks="`stream`",
        body={**_GO_ON, "stream": True},
        vllm="chunks of `text_completion`, then `[DONE]`",
        llama_cpp="chunks of `text_completion`, then `[DONE]`",
        ours="the same",
        finds={"0.object": "text_completion", **_DONE},
    ),
)

RESPONSES = (
    Row(
        route=_RESPONSES,
        asks="a text",
        body={"input": "What is 3 + 4?", "temperature": 0},
        vllm="a `response` with items; it may be stored",
        llama_cpp="a `response`; nothing is stored",
        ours="a `response` with items; nothing is stored",
        finds={"object": "response", "status": "completed", "output.0.type": "message"},
    ),
    Row(
        route=_RESPONSES,
        asks="`stream`",
        body={"input": "What is 3 + 4?", "stream": True},
        vllm="`response.created` … `response.completed`, numbered",
        llama_cpp=_NOT_READ,
        ours="as vLLM",
        finds={
            "0.type": "response.created",
            "1.sequence_number": 1,
            "-1.type": "response.completed",
        },
    ),
    _refused(
        _RESPONSES,
        "`priority: 1`",
        {"input": "What is 3 + 4?", "priority": 1},
        "priority is 1",
        vllm="an error",
        llama_cpp=_NOT_READ,
        ours="400, unless `--scheduling-policy priority`",
    ),
    _refused(
        _RESPONSES,
        "`previous_response_id`",
        {"input": "x", "previous_response_id": "resp_1"},
        "nothing is kept",
        vllm="answered, if the response was stored",
        llama_cpp="400",
        ours="400",
    ),
    _refused(
        _RESPONSES,
        "a hosted tool",
        {"input": "x", "tools": [{"type": "web_search"}]},
        "'web_search'",
        vllm="it may have some, for some models",
        llama_cpp="200; left out, with a line in its log",
        ours="400: an answer without the search that was asked for would mislead",
    ),
    _refused(
        _RESPONSES,
        "`prompt`, by its id",
        {"input": "x", "prompt": {"id": "p"}},
        "no prompts kept here",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    _refused(
        _RESPONSES,
        "`text.format: json_schema` without a schema",
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}},
        "give both",
        vllm=_NOT_READ,
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    Row(
        route="GET /v1/responses/resp_1",
        asks="a response that is not there",
        status=404,
        words="keeps none",
        vllm="404",
        llama_cpp="404; it has no such route",
        ours="404",
    ),
)

ANTHROPIC = (
    Row(
        route=_CLAUDE,
        asks="a question",
        body=_ASK,
        vllm="a `message` with blocks",
        llama_cpp="a `message` with blocks",
        ours="the same",
        finds={"type": "message", "content.0.type": "text", "stop_reason": "end_turn"},
    ),
    Row(
        route=_CLAUDE,
        asks="no `model`",
        body=_ASK,
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="200: there is one model",
        finds={"model": ANY},
    ),
    _refused(
        _CLAUDE,
        "`max_tokens: 0`",
        {**_ASK, "max_tokens": 0},
        "max_tokens",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400, in Anthropic's form",
    ),
    Row(
        route=_CLAUDE,
        asks="a message of the role `system`",
        body={
            **_ASK,
            "messages": [{"role": "system", "content": "Be brief."}, *_ASK["messages"]],
        },
        vllm="200; it is put before the conversation",
        llama_cpp=_NOT_READ,
        ours="200; it stays where it is",
        finds={"type": "message"},
    ),
    _refused(
        _CLAUDE,
        "`tool_choice` of a type that there is not",
        {**_ASK, "tool_choice": {"type": "some"}},
        "tool_choice",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    Row(
        route=f"{_CLAUDE}/count_tokens",
        asks="how many tokens a conversation has",
        body={"messages": _ASK["messages"]},
        vllm="`input_tokens`",
        llama_cpp="`input_tokens`",
        ours="the same",
        finds={"input_tokens": ANY},
    ),
)

OTHERS = (
    Row(
        route="GET /v1/models",
        asks="what there is",
        vllm="cards with `max_model_len` and `permission`",
        llama_cpp="a list, public even where keys are wanted",
        ours="cards with `max_model_len`",
        finds={"object": "list", "data.0.object": "model", "data.0.max_model_len": ANY},
    ),
    Row(
        route="GET /v1/models/tiny-chat",
        asks="one of them",
        vllm="it has no such route",
        llama_cpp="404; it has no such route",
        ours="the card",
        finds={"id": "tiny-chat"},
    ),
    Row(
        route="/tokenize",
        asks="a text's tokens",
        body={"prompt": "hello"},
        vllm="`count`, `max_model_len`, `tokens`, `token_strs`",
        llama_cpp="`tokens`, of the field `content`",
        ours="as vLLM",
        finds={"count": ANY, "max_model_len": ANY, "tokens.0": ANY, "token_strs": None},
    ),
    _refused(
        "/tokenize",
        "`content`, as llama.cpp has it",
        {"content": "hello"},
        "no field 'content'",
        vllm="400: `prompt` is missing",
        llama_cpp="200",
        ours="400",
    ),
    Row(
        route="/detokenize",
        asks="tokens' text",
        body={"tokens": [5, 6]},
        vllm="`prompt`",
        llama_cpp="`content`",
        ours="as vLLM",
        finds={"prompt": ANY},
    ),
    _refused(
        "/detokenize",
        "a token below 0",
        {"tokens": [-1]},
        "token id -1",
        vllm="400",
        llama_cpp=_NOT_READ,
        ours="400",
    ),
    Row(
        route="GET /health",
        asks="is it well?",
        vllm="200 without a body; 503 when the engine is dead",
        llama_cpp='200 `{"status":"ok"}`; 503 while the model loads',
        ours='200 `{"status":"ok"}`; 503 when the engine is dead or stuck',
        finds={"status": "ok"},
    ),
    Row(
        route="/v1/embeddings",
        asks="a vector, of a model that generates",
        body={"input": "x"},
        status=400,
        words="makes no embeddings",
        vllm=_NOT_READ,
        llama_cpp="501, unless it is started for embeddings",
        ours="400",
    ),
    Row(
        route="GET /nowhere",
        asks="a route that there is not",
        status=404,
        words="/nowhere",
        vllm="404",
        llama_cpp="404, with an error in OpenAI's form",
        ours="404, with an error in OpenAI's form",
        finds={"error.type": "invalid_request_error"},
    ),
)

ROWS = (*CHAT, *COMPLETIONS, *RESPONSES, *ANTHROPIC, *OTHERS)

_HEAD = """\
# What three servers answer

Made of `tests/support/conformance.py` by `python tests/support/conformance.py`; the tests hold our
server to each row, and this page to the rows. What vLLM and llama.cpp answer was read in their
sources (`vllm/entrypoints`, `tools/server`, versions of 2026), not asked of them while they ran;
"not read" stands where the source did not say it in a place that was read. Where we differ, the
last column says why.
"""


def page() -> str:
    """The page."""
    lines = [_HEAD, "| route | asked | vLLM | llama.cpp | vkv |", "|---|---|---|---|---|"]
    for row in ROWS:
        cells = (f"`{row.route}`", row.asks, row.vllm, row.llama_cpp, row.ours)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
