"""The library's front door: a model that generates, chats and streams."""

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import torch
from transformers import PreTrainedTokenizerBase

from ...vmem import janitor
from ...vmem.errors import InvalidConfig, InvalidOperation
from ..blocks.places import Source
from ..chains.family import gather
from ..engine.build import build_loop, load
from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.interrupts import Shield
from ..engine.stats import EngineStats
from ..request.outputs import RequestOutput
from ..request.sampling_params import SamplingParams
from .chat_template import ChatOptions
from .driving.driver import LoopDriver
from .front_end import FrontEnd
from .progress import BatchProgress
from .prompts import Maker, Message, Prompt
from .sessions.session import Session
from .sessions.sessions import Saved, Sessions
from .text_stream import RequestText, StreamDelta
from .tokenizer import own

OnError = Literal["return", "raise"]

_log = logging.getLogger(__name__)


class LLM:
    """A causal language model over virtual-memory KV. Several threads may use it at once.

    Args:
        source: a checkpoint folder, a GGUF file, a hub id, a `transformers` model built elsewhere,
            or None for the built-in tiny chat model; may also be given as `model`. Or a zoo.
        model: with a zoo, the name of a model in it; by default the one that shares most with the
            others. Those of the zoo that can run beside it do, and prompts name them (`generate`).
        tokenizer: a tokenizer, which is copied, or its folder, if it is not with the model.
        device: "auto", "cpu" or "cuda".
        dtype: of weights and KV: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        options: the fields of `EngineConfig`, among them `kv_memory`, `max_seqs`, `max_len`,
            `attention` and `kv`.

    Attributes:
        config: the options, all of them.
        loaded: the model, and what the engine knows of it.
        loop: what drives the engine. While nobody generates, a benchmark may turn it by hand.

    One class, since it is the library's front door: every method is a verb or a fact for its users.

    Raises a `UsageError` that names the value and the remedy.

    Example:
        >>> with LLM() as llm:
        ...     out = llm.generate("hello", SamplingParams(temperature=0, max_tokens=8))
        ...     print(out[0].outputs[0].text)
    """

    def __init__(
        self,
        source: Source = None,
        *,
        model: Source = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        chosen, following = gather(source, model)
        self.config = EngineConfig(**following | options)
        self.loaded = load(
            chosen, tokenizer=own(tokenizer), device=device, dtype=dtype, config=self.config
        )
        self.loop = build_loop(self.loaded, self.config)
        self._driver = LoopDriver(self.loop, idle_trim_s=self.config.idle_trim_s)
        engine = self.loop.engine
        self._front_end = FrontEnd(
            self.loaded,
            engine.admission,
            engine.grammars,
            lambda: engine.extras.adapters.names,
            engine.extras.voices,
        )
        self._sessions = Sessions(
            self.loaded,
            self.engine,
            self._driver,
            self._front_end,
            prefix_reuse=self.config.prefix_reuse,
        )
        # A finaliser may run with any lock held, so the janitor closes it.
        weakref.finalize(self, janitor.later, self._driver.close).atexit = False

    # -- generating --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        on_error: OnError = "return",
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        adapter: str | Sequence[str | None] | None = None,
        model: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts together; outputs come in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, `{"prompt": …}`, `{"prompt_token_ids": …}`, or a
                list of these.
            params: for all prompts, or one for each; None for `get_default_sampling_params()`.
            progress: show a bar; None shows one on a terminal if it takes a while.
            on_error: what becomes of a request that goes wrong while it runs, whose logits are not
                finite, for one; an exception of the model's hits all requests of that step.
                "return": its output has an `error`, the finish reason "error" and the tokens it
                had, the first error is logged, and the other outputs are whole. "raise": the
                first error is raised when all requests have ended.
            priority: for all prompts, or one for each: with `scheduling_policy="priority"`, the
                lower, the earlier.
            tenant: for all prompts, or one for each: whose service it counts as, in `stats`, and
                with `scheduling_policy="fair"` in whose turn it is. Prefixes are shared among
                tenants all the same; a `cache_salt` keeps them apart.
            adapter: a name of `load_adapter`, or None for the model alone; for all prompts, or one
                for each. Any mix runs in one batch.
            model: of a zoo, which model completes it, by name; None for the one that was opened;
                for all prompts, or one for each. Any mix runs in one batch.

        Raises a `UsageError` before anything runs if a prompt or parameter is refused. On an
        exception, Ctrl-C included, the requests' pages are given back.
        """
        self._driver.check_ready()
        requests = self._front_end.batch(
            prompts, params, priority=priority, tenant=tenant, adapter=adapter, model=model
        )
        return self._run(requests, progress, on_error)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        on_error: OnError = "return",
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        adapter: str | Sequence[str | None] | None = None,
        model: str | Sequence[str | None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer one conversation or several.

        A message has a `role` and a `content`, a text or a list of text parts; one with
        `tool_calls` may do without. `options` are those of `ChatOptions`: `tools`, `chat_template`,
        `chat_template_kwargs`, `add_generation_prompt` and `continue_final_message`. Without
        `params` an answer is as long as the model or its generation config makes it. `on_error`,
        `priority`, `tenant`, `adapter` and `model` are as of `generate`.

        Raises InvalidPrompt if there is no chat template, or if it does not know what it is told.
        """
        self._driver.check_ready()
        requests = self._front_end.chats(
            messages,
            params,
            options,
            priority=priority,
            tenant=tenant,
            adapter=adapter,
            model=model,
        )
        return self._run(requests, progress, on_error)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        adapter: str | None = None,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[StreamDelta]:
        """Generate for one prompt or conversation, and yield what comes; `options` as of `chat`.

        No token is lost if another stream or thread steps the engine meanwhile. Nothing is queued
        before the first delta is asked for. Closing or dropping the iterator, as leaving a `for`
        loop does, ends the request and gives its pages back. An error of the request is raised.
        A `UsageError` is raised at the call.
        """
        self._driver.check_ready()
        request = self._front_end.stream(
            prompt, params, options, priority=priority, tenant=tenant, adapter=adapter, model=model
        )
        return self._stream(request)

    def _stream(self, request: RequestText) -> Iterator[StreamDelta]:
        def take() -> StreamDelta | bool | None:
            """The next delta; True at the end; None if there is nothing yet."""
            if request.is_aborted:  # which is no end of a text
                return True
            return request.take_delta() or (request.is_finished or None)

        try:
            self._driver.submit([request])  # here: a stream never begun has none to end
            while not isinstance(found := self._driver.wait_for(take), bool):
                yield found
            _check_not_aborted([request])
            if request.error is not None:
                raise request.error
        finally:
            try:
                self._driver.abandon([request])
            finally:  # a signal's handler may have raised in between
                self._driver.abandon([request])

    def render_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins.

        Raises InvalidPrompt.
        """
        return self._front_end.render_chat(messages, options)

    def get_default_sampling_params(self) -> SamplingParams:
        """How prompts are completed that come without parameters (`generation_config`)."""
        return self._front_end.default_params

    def check(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Refuse what could never run; returns the most tokens that could be generated.

        Raises RequestTooLong, RequestTooLarge or another `UsageError`.
        """
        return self._front_end.check(tokens, params)

    # -- adapters ----------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Have prompts use the LoRA adapter in the folder `path`, as PEFT writes it, by `name`.

        Its weights are read when a prompt first needs them. They count under `kv_memory`, and go
        again where memory is short and no request uses them. To load the same again is harmless.

        Raises BadAdapter, which says why, for an adapter that cannot be read, does not fit the
        model or is of a kind that is not computed here; a `UsageError` if another has the name.
        """
        self._driver.load_adapter(name, os.fspath(path))

    def unload_adapter(self, name: str) -> None:
        """Take no more prompts for an adapter. Those under way keep it until they have ended.

        Raises UnknownAdapter.
        """
        self._driver.unload_adapter(name)

    # -- sessions ----------------------------------------------------------------------------

    def save_session(
        self,
        path: str | os.PathLike[str],
        what: Saved,
        *,
        extra: bytes = b"",
        adapter: str | None = None,
        model: str | None = None,
    ) -> Session:
        """Save the keys and values of `what` in a file, from which any process goes on at once.

        Args:
            path: the file. What is there is replaced when all is written; only its owner may read
                it.
            what: a prompt or a conversation, as of `stream`; or a `RequestOutput`: its prompt and
                its first output. What is not held of it any more is computed first. With a
                `cache_salt`, prompts of that salt alone will find it.
            extra: bytes of your own to keep with it.
            adapter, model: which `what` is computed with, as of `generate`; prompts of that one
                alone will find it, and of models whose keys and values are the same.

        Other requests wait while it is written, but not for the disk. Raises a `UsageError` if the
        prompt is refused or the model keeps recurrent state, KVFileError if the system refuses the
        file.
        """
        return self._sessions.save(path, what, extra, Maker(adapter, model))

    def open_session(self, path: str | os.PathLike[str]) -> Session:
        """Let prompts that begin with the tokens of a file find their keys and values.

        Opening reads nothing but the file's header. On a CPU the file is mapped where a request
        begins with it, and all processes that do so share one copy in memory. What a request is to
        begin with is compared with its checksums first, once; what is damaged is computed, with a
        warning. So is all of a file that another model, or one with other options, has saved.

        Raises KVFileError if there is no such file or its header cannot be read.
        """
        return self._sessions.open(path)

    # -- the machine under it ----------------------------------------------------------------

    @property
    def name(self) -> str:
        """What was loaded: a folder, a hub id, or a class."""
        return self.loaded.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A copy of the model's tokenizer, if it has one: what is done to it touches no prompt."""
        return self._front_end.callers_tokenizer

    @property
    def engine(self) -> Engine:
        """The step loop's inside."""
        return self.loop.engine

    @property
    def attention_backend(self) -> str:
        """The name of the attention backend in use."""
        return self.engine.runner.backend.name

    @property
    def device(self) -> torch.device:
        """Where the model and its KV are."""
        return self.loaded.device

    @property
    def max_len(self) -> int:
        """The most tokens of a request, prompt and output."""
        return self.engine.cache.max_len

    @property
    def weight_bytes(self) -> int:
        """What the weights occupy as they are kept, tied ones counted once."""
        return self.loaded.weight_bytes

    def stats(self) -> EngineStats:
        """What the engine holds and has done, a moment ago while it works; waits for no step."""
        return self._driver.stats()

    def trim(self) -> int:
        """Give the memory of finished requests back to the system; returns the bytes."""
        return self._driver.trim()

    def sleep(self, *, weights: bool = False) -> int:
        """Give all memory of keys and values back until `wake`; returns the bytes.

        Address space, slots and recorded decode steps stay. With `weights`, those on a GPU move to
        host memory, too, and recordings are made anew afterwards; on a CPU they stay. Nothing can
        be generated meanwhile. Prefixes of finished requests are forgotten.

        Raises InvalidOperation, with nothing changed, while a request is unfinished.
        """
        return self._driver.sleep(weights=weights)

    def wake(self) -> None:
        """End a `sleep`. Keys and values take memory when requests do; harmless when awake."""
        self._driver.wake()

    def weights_changed(self) -> None:
        """Say that somebody changed the model that was handed over: all is computed anew.

        Most changes are noticed within a few steps, and before the next prompt: weights loaded,
        assigned or written to in place, hooks, adapters switched, modules exchanged. What PyTorch
        does not count is not: writing into `p.data`, or a plain attribute of a module. Then call
        this, after the change. Recorded steps and kept prefixes are dropped. Unfinished requests
        go on: their tokens stay, and their keys and values are computed again.

        Raises InvalidOperation while asleep, or if the model has another vocabulary, dtype, device
        or other layers than when it was handed over. UnsupportedModel if it cannot run any more.
        """
        self._driver.weights_changed()

    @property
    def is_asleep(self) -> bool:
        """True between `sleep` and `wake`."""
        return self._driver.is_asleep

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._driver.is_closed

    def close(self) -> None:
        """Give everything back. The object is of no use afterwards; closing twice is harmless."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- running requests --------------------------------------------------------------------

    def _run(
        self, requests: Sequence[RequestText], progress: bool | None, on_error: OnError
    ) -> list[RequestOutput]:
        if on_error not in ("return", "raise"):
            raise InvalidConfig(f"on_error is {on_error!r}; use 'return' or 'raise'")
        with Shield() as shield:
            try:
                self._driver.submit(requests)
                with BatchProgress(requests, progress) as bar:
                    for request in requests:
                        while not request.is_finished:
                            self._driver.turn(unless=lambda one=request: one.is_finished)
                            shield.deliver()
                            bar.update()
            finally:
                self._driver.abandon(requests)
                if self._driver.has_mail:  # pages are back when this returns, not soon after
                    self._driver.tidy()
        _check_not_aborted(requests)
        self._report_errors(requests, on_error)
        return [request.output() for request in requests]

    @staticmethod
    def _report_errors(requests: Sequence[RequestText], on_error: OnError) -> None:
        errors = [request.error for request in requests if request.error is not None]
        if errors and on_error == "raise":
            raise errors[0]
        if errors:
            _log.warning("%d of %d requests failed: %s", len(errors), len(requests), errors[0])


def _check_not_aborted(requests: Sequence[RequestText]) -> None:
    """What another thread cut short by `close` must not pass for a result."""
    if any(request.is_aborted for request in requests):
        raise InvalidOperation("this LLM was closed while it generated; create another")
