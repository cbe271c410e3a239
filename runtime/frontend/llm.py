"""The library's front door: a model that generates, chats and streams."""

import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...vmem.errors import InvalidOperation, InvalidPrompt, InvalidSamplingParams
from ..engine.build import build_engine
from ..engine.config import EngineConfig, resolve_device
from ..engine.engine import Engine, EngineStats
from ..engine.idle import IdleTrim
from ..engine.interrupts import deferred_interrupt
from ..engine.sleep import Sleep
from ..model.loading import load_model
from ..request.outputs import FinishReason, RequestOutput
from ..request.request import Request, request_output
from ..request.sampling_params import SamplingParams
from .progress import BatchProgress
from .prompts import Message, Prompt, as_batch, as_token_ids, params_for_each


@dataclass(frozen=True, kw_only=True)
class StreamDelta:
    """What a step added to a streamed output; `str(delta)` is its text.

    Attributes:
        text: text that became final, often empty.
        token_ids: tokens since the last delta.
        finish_reason: why it ended; None before the end.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None

    def __str__(self) -> str:
        return self.text


class LLM:
    """A causal language model over virtual-memory KV.

    Args:
        model: a checkpoint folder, a hub id, a `transformers` model built elsewhere, or None for
            the built-in tiny chat model.
        tokenizer: a tokenizer or its folder, if it is not with the model.
        device: "auto", "cpu" or "cuda".
        dtype: of weights and KV: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        options: the fields of `EngineConfig`, among them `kv_memory`, `max_seqs`, `max_len`,
            `attention` and `kv`.

    Raises a `UsageError` that names the value and the remedy.

    Example:
        >>> with LLM() as llm:
        ...     out = llm.generate("hello", SamplingParams(temperature=0, max_tokens=8))
        ...     print(out[0].outputs[0].text)
    """

    _closed = True  # until all of it stands, for __del__

    def __init__(
        self,
        model: str | Path | PreTrainedModel | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        self.config = EngineConfig(**options)
        self._loaded = load_model(
            model,
            tokenizer=tokenizer,
            device=resolve_device(device),
            dtype=dtype,
            pack_weights=self.config.pack_weights,
            lm_head_bits=self.config.lm_head_bits,
        )
        self._built = build_engine(self._loaded, self.config)
        self._engine = self._built.engine
        self._lock = threading.RLock()
        self._sleep = Sleep(self._engine)
        self._idle: IdleTrim | None = None
        if self.config.idle_trim_s is not None:
            self._idle = IdleTrim(self._engine, self._lock, self.config.idle_trim_s)
        self._ids = itertools.count()
        self._pid = os.getpid()
        self._closed = False

    # -- generating --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts together; outputs come in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one for each.
            progress: show a bar; None shows one on a terminal if it takes a while.

        Raises a `UsageError` before anything runs if a prompt or parameter is refused. On any
        error, Ctrl-C included, the requests' pages are given back.
        """
        batch = as_batch(prompts)
        each = params_for_each(params, len(batch))
        return self._run(batch, each, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; a message has a `role` and a `content`.

        Without `params` an answer is as long as the model makes it. Raises InvalidPrompt if the
        tokenizer has no chat template.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = messages if several else [messages]
        prompts = [self.render_chat(conversation) for conversation in conversations]  # type: ignore[arg-type]
        each = params_for_each(params or SamplingParams(max_tokens=None), len(prompts))
        return self._run(prompts, each, progress)

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[StreamDelta]:
        """Generate for one prompt or conversation, and yield what each step adds.

        Leaving the loop early ends the request and gives its pages back.
        """
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt = self.render_chat(prompt)  # type: ignore[arg-type]
            params = params or SamplingParams(max_tokens=None)
        params = params or SamplingParams()
        if params.n != 1:
            raise InvalidSamplingParams(f"n = {params.n}: a stream has one output; use generate")
        tokens = self._tokenise(prompt)  # type: ignore[arg-type]
        with self._lock:
            self._check_awake()
            self._engine.check(tokens, params)  # now, not when the loop begins
        return self._stream(tokens, params)

    def _stream(self, tokens: list[int], params: SamplingParams) -> Iterator[StreamDelta]:
        groups: list[list[Request]] = []
        shown_text = shown_tokens = 0
        try:
            self._add([tokens], [params], groups)  # here: a stream never begun has none to end
            ((request,),) = groups
            while not request.is_finished:
                self._step()
                text = request.detokenizer.text if request.detokenizer else ""
                token_ids = request.output_token_ids
                if len(token_ids) > shown_tokens:
                    yield StreamDelta(
                        text=text[shown_text:],
                        token_ids=tuple(token_ids[shown_tokens:]),
                        finish_reason=request.finish_reason,
                    )
                    shown_text, shown_tokens = len(text), len(token_ids)
            _check_not_aborted(groups)
        finally:
            self._abort(groups)

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins."""
        tokenizer = self._loaded.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise InvalidPrompt(
                f"{self._loaded.name} has no chat template; pass a plain prompt to generate(), or "
                "set tokenizer.chat_template"
            )
        if not messages:
            raise InvalidPrompt("the conversation has no messages; give it at least one")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise InvalidPrompt(f"{message!r} is no message; give it a 'role' and a 'content'")
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidPrompt(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str), "one conversation was rendered, not a batch"
        return tokenizer(text, add_special_tokens=False).input_ids

    # -- the machine under it ----------------------------------------------------------------

    @property
    def name(self) -> str:
        """What was loaded: a folder, a hub id, or a class."""
        return self._loaded.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, if it has one."""
        return self._loaded.tokenizer

    @property
    def engine(self) -> Engine:
        """The step loop underneath, for programs that drive it themselves."""
        return self._engine

    @property
    def attention_backend(self) -> str:
        """The name of the attention backend in use."""
        return self._engine.runner.backend.name

    @property
    def device(self) -> torch.device:
        """Where the model and its KV are."""
        return self._loaded.device

    @property
    def weight_bytes(self) -> int:
        """What the weights occupy as they are kept, tied ones counted once."""
        return self._loaded.weight_bytes

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        with self._lock:
            self._check_open()
            return self._engine.stats()

    def trim(self) -> int:
        """Give the memory of finished requests back to the system; returns the bytes."""
        with self._lock:
            self._check_open()
            return self._engine.cache.trim()

    def sleep(self, *, weights: bool = False) -> int:
        """Give all memory of keys and values back until `wake`; returns the bytes.

        Address space, slots and recorded decode steps stay. With `weights`, those on a GPU move to
        host memory, too, and recordings are made anew afterwards; on a CPU they stay. Nothing can
        be generated meanwhile. Prefixes of finished requests are forgotten.

        Raises InvalidOperation, with nothing changed, while a request is unfinished.
        """
        with self._lock, deferred_interrupt():
            self._check_open()
            return self._sleep.begin(weights=weights)

    def wake(self) -> None:
        """End a `sleep`. Keys and values take memory when requests do; harmless when awake."""
        with self._lock, deferred_interrupt():
            self._check_open()
            self._sleep.end()

    @property
    def is_asleep(self) -> bool:
        """True between `sleep` and `wake`."""
        return self._sleep.is_asleep

    def close(self) -> None:
        """Give everything back. The object is of no use afterwards; closing twice is harmless."""
        if not self._is_mine:
            return
        with self._lock, deferred_interrupt():
            if not self._closed:
                self._engine.abort(self._engine.requests)
                if self._idle is not None:
                    self._idle.stop()
                self._built.close()
                self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    # -- running requests --------------------------------------------------------------------

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        progress: bool | None,
    ) -> list[RequestOutput]:
        tokens = [self._tokenise(prompt) for prompt in prompts]
        groups: list[list[Request]] = []
        try:
            self._add(tokens, params, groups)
            self._run_to_end([request for group in groups for request in group], progress)
            _check_not_aborted(groups)
        finally:
            self._abort(groups)
        return [
            request_output(group, prompt if isinstance(prompt, str) else None)
            for group, prompt in zip(groups, prompts, strict=True)
        ]

    def _run_to_end(self, requests: Sequence[Request], progress: bool | None) -> None:
        with BatchProgress(requests, progress) as bar:
            while any(not request.is_finished for request in requests):
                self._step()
                bar.update()

    def _add(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        groups: list[list[Request]],
    ) -> None:
        """Queue prompts and put their requests into `groups`, where no interrupt loses them."""
        with self._lock, deferred_interrupt():
            self._check_awake()
            if self._idle is not None:
                self._idle.work()
            for prompt, one in zip(prompts, params, strict=True):
                groups.append(self._engine.add_request(self._next_id(), prompt, one))

    def _step(self) -> None:
        with self._lock, deferred_interrupt():
            self._check_open()
            self._engine.step()

    def _abort(self, groups: Sequence[Sequence[Request]]) -> None:
        if not self._is_mine:
            return
        with self._lock, deferred_interrupt():
            if not self._closed:
                self._engine.abort([request for group in groups for request in group])
                if self._idle is not None:
                    self._idle.rest()

    def _tokenise(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return as_token_ids(prompt)
        if self._loaded.tokenizer is None:
            raise InvalidPrompt(
                f"{self._loaded.name} has no tokenizer; give prompts as lists of token ids, or "
                "pass tokenizer="
            )
        return self._loaded.tokenizer(prompt).input_ids

    @property
    def _is_mine(self) -> bool:
        """True if there is something to give back: a forked child's memory is its parent's."""
        return not self._closed and self._pid == os.getpid()

    def _next_id(self) -> str:
        return str(next(self._ids))

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidOperation("this LLM has been closed; create another")

    def _check_awake(self) -> None:
        self._check_open()
        self._sleep.check_awake()


def _check_not_aborted(groups: Sequence[Sequence[Request]]) -> None:
    """What another thread cut short by `close` must not pass for a result."""
    if any(request.finish_reason == "abort" for group in groups for request in group):
        raise InvalidOperation("this LLM was closed while it generated; create another")
