"""Callers of a server who ask what has a known answer, and compare."""

import json
import random
from dataclasses import dataclass, field
from typing import Any

import httpx
from vkv import LLM, SamplingParams

_PROMPTS = ("hello", "What is 3 + 4?", "The cat", "Tell me of the sea.", "a b c d", "Who are you?")


class Wrong(Exception):
    """The server did what it must not."""


@dataclass(frozen=True)
class Case:
    """A request whose answer is known.

    Attributes:
        path, body: of the request, without `stream`.
        texts: of each output; None for the routes that have none.
        tokens: of `/tokenize`.
    """

    path: str
    body: dict[str, Any]
    texts: tuple[str, ...] | None = None
    tokens: tuple[int, ...] | None = None


def known_cases(llm: LLM, seed: int, count: int) -> list[Case]:
    """Requests of all routes, and what the library answers to them."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        prompt = rng.choice(_PROMPTS)
        chosen: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.choice((1, 4, 16, 60))}
        if number % 2:
            chosen |= {"temperature": 1.0, "seed": rng.randrange(1 << 30), "top_p": 0.9}
        makers = (_completion, _several, _chat, _message, _tokens)
        cases.append(makers[number % len(makers)](llm, prompt, chosen))
    return cases


def _params(chosen: dict[str, Any], **more: Any) -> SamplingParams:
    return SamplingParams(**{**chosen, **more})


def _texts(llm: LLM, prompt: str, params: SamplingParams) -> tuple[str, ...]:
    (out,) = llm.generate([prompt], params)
    return tuple(output.text for output in out.outputs)


def _completion(llm: LLM, prompt: str, chosen: dict[str, Any]) -> Case:
    texts = _texts(llm, prompt, _params(chosen, stop=["e"]))
    return Case("/v1/completions", {"prompt": prompt, "stop": "e", **chosen}, texts)


def _several(llm: LLM, prompt: str, chosen: dict[str, Any]) -> Case:
    """Two prompts at once, with two outputs each where they are drawn."""
    n = 2 if chosen["temperature"] else 1
    prompts = [prompt, prompt[::-1]]
    texts = [text for one in prompts for text in _texts(llm, one, _params(chosen, n=n))]
    return Case("/v1/completions", {"prompt": prompts, "n": n, **chosen}, tuple(texts))


def _answer(llm: LLM, prompt: str, params: SamplingParams) -> tuple[str, ...]:
    (out,) = llm.chat([{"role": "user", "content": prompt}], params)
    return (out.outputs[0].text,)


def _chat(llm: LLM, prompt: str, chosen: dict[str, Any]) -> Case:
    body = {"messages": [{"role": "user", "content": prompt}], **chosen}
    return Case("/v1/chat/completions", body, _answer(llm, prompt, _params(chosen)))


def _message(llm: LLM, prompt: str, chosen: dict[str, Any]) -> Case:
    body = {"messages": [{"role": "user", "content": prompt}]}
    body |= {"max_tokens": chosen["max_tokens"], "temperature": 0.0}
    params = SamplingParams(temperature=0.0, max_tokens=chosen["max_tokens"])
    return Case("/v1/messages", body, _answer(llm, prompt, params))


def _tokens(llm: LLM, prompt: str, chosen: dict[str, Any]) -> Case:
    assert llm.tokenizer is not None
    return Case("/tokenize", {"prompt": prompt}, tokens=tuple(llm.tokenizer.encode(prompt)))


# -- what is read ----------------------------------------------------------------------------------


@dataclass
class Streamed:
    """A stream as far as it came.

    Attributes:
        texts: of each output.
        end: "done" for a proper end, "error" for one by an error event, else None.
    """

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    end: str | None = None

    def take(self, line: str) -> None:
        """Read a line."""
        if self.end is not None and line:
            if line == "data: [DONE]" and self.end == "error":
                return
            raise Wrong(f"{line!r} behind the end of a stream")
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self.end = "done"
            return
        told = json.loads(line[6:])
        if "error" in told:
            self.end = "error"
        elif "choices" in told:
            for choice in told["choices"]:
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                self._add(choice["index"], piece, choice["finish_reason"])
        elif told["type"] == "message_stop":
            self.end = "done"
        else:
            delta = told.get("delta", {})
            self._add(0, delta.get("text", ""), delta.get("stop_reason"))

    def _add(self, index: int, piece: str, reason: str | None) -> None:
        self.texts[index] = self.texts.get(index, "") + piece
        if reason is not None:
            self.reasons[index] = reason

    def whole(self) -> tuple[str, ...]:
        """The texts of an answer that came to its end."""
        return tuple(self.texts[index] for index in sorted(self.texts))


def whole_texts(told: dict[str, Any]) -> tuple[str, ...]:
    """The texts of an answer that came at once."""
    if "choices" not in told:
        return ("".join(block.get("text", "") for block in told["content"]),)
    return tuple(
        choice["text"] if "text" in choice else choice["message"]["content"]
        for choice in told["choices"]
    )


async def ask(client: httpx.AsyncClient, case: Case, *, streams: bool) -> None:
    """Send a request, and compare. Raises Wrong."""
    streams = streams and case.texts is not None
    if streams:
        read = Streamed()
        body = {**case.body, "stream": True}
        async with client.stream("POST", case.path, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise Wrong(f"{answer.status_code} {answer.text[:200]} for {case}")
            async for line in answer.aiter_lines():
                read.take(line)
        if read.end != "done" or not read.reasons:
            raise Wrong(f"a stream ended with {read} for {case}")
        texts: tuple[str, ...] | None = read.whole()
    else:
        answer = await client.post(case.path, json=case.body)
        if answer.status_code != 200:
            raise Wrong(f"{answer.status_code} {answer.text[:200]} for {case}")
        told = answer.json()
        if case.tokens is not None and tuple(told["tokens"]) != case.tokens:
            raise Wrong(f"{told} for {case}")
        texts = None if case.texts is None else whole_texts(told)
    if texts != case.texts:
        raise Wrong(f"{texts} for {case}")
