"""`LLM` for asyncio: many callers, one engine thread."""

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch
from transformers import PreTrainedTokenizerBase

from ...vmem import janitor
from ...vmem.errors import InvalidConfig
from ..blocks.places import Source
from ..chains.family import gather
from ..engine.build import build_loop, load
from ..engine.config import EngineConfig
from ..engine.memory.memory_map import MemoryMap
from ..engine.stats import EngineStats
from ..request.outputs import RequestOutput
from ..request.sampling_params import SamplingParams
from .async_requests import AsyncRequests
from .chat_template import ChatOptions
from .driving.port import EnginePort
from .driving.thread import EngineThread
from .front_end import FrontEnd
from .prompts import Maker, Prompt, Standing
from .prompts import Message as ChatMessage
from .sessions.session import Session
from .sessions.sessions import Saved, Sessions
from .tokenizer import own

_log = logging.getLogger(__name__)


class AsyncLLM:
    """A causal language model for asyncio programs: requests of all tasks run together.

    One thread steps the engine while there is work, so the event loop never waits for the model.
    Cancelling a task, or leaving an `async for`, drops its request, and its pages go back before
    the next step. A consumer that falls behind gets the newest state when it comes back: nothing
    piles up. At most `max_unfinished` requests are with the engine; more wait in `generate`.
    Several event loops may use one object.

    Args:
        source, model: as of `LLM`.
        max_unfinished: requests in the engine at once, running or queued there.
        options: the other arguments of `LLM`.

    Example:
        >>> async with AsyncLLM() as llm:
        ...     async for output in llm.generate("hello", SamplingParams(max_tokens=8)):
        ...         print(output.outputs[0].text)
    """

    def __init__(
        self,
        source: Source = None,
        *,
        model: Source = None,
        max_unfinished: int = 256,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        if max_unfinished < 1:
            raise InvalidConfig(f"max_unfinished is {max_unfinished}; it must be at least 1")
        chosen, following = gather(source, model)
        self.config = EngineConfig(**following | options)
        self.loaded = loaded = load(
            chosen, tokenizer=own(tokenizer), device=device, dtype=dtype, config=self.config
        )
        loop = build_loop(loaded, self.config)
        self.engine = loop.engine
        engine = loop.engine
        front_end = FrontEnd(
            loaded,
            engine.admission,
            engine.grammars,
            lambda: engine.extras.adapters.names,
            engine.extras.voices,
        )
        # The thread knows the driver, not this object, which can so be dropped without `close`.
        self._thread = EngineThread(loop, idle_trim_s=self.config.idle_trim_s)
        self._requests = AsyncRequests(front_end, self._thread, max_unfinished=max_unfinished)
        self._sessions = Sessions(
            loaded,
            loop.engine,
            self._thread.driver,
            front_end,
            prefix_reuse=self.config.prefix_reuse,
        )
        weakref.finalize(self, janitor.later, self._thread.close).atexit = False

    def generate(
        self,
        prompt: Prompt | Sequence[ChatMessage],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        adapter: str | None = None,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncIterator[RequestOutput]:
        """Complete a prompt or a conversation; yields all that there is so far.

        Prompts, `priority`, `tenant`, `adapter` and `model` are as of `LLM.generate`, conversations
        and `options` as of `LLM.chat`. Those beyond `max_unfinished` wait in the order of their
        coming. Each output holds the whole of text and tokens up to then; the last has `finished`.
        The name is known to `abort` from now on, also while the request waits for its place.

        Raises a `UsageError` if the request is refused, InvalidOperation if this object is closed
        meanwhile, and the request's own error if it goes wrong.
        """
        standing = Standing(priority=priority, tenant=tenant)
        by = Maker(adapter, model)
        return self._requests.generate(prompt, params, request_id, options, standing, by)

    async def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """As `LLM.load_adapter`."""
        await asyncio.to_thread(self._thread.driver.load_adapter, name, os.fspath(path))

    async def unload_adapter(self, name: str) -> None:
        """As `LLM.unload_adapter`."""
        await asyncio.to_thread(self._thread.driver.unload_adapter, name)

    def abort(self, request_id: str) -> None:
        """End the requests that have this name now: each gets a last output, "abort" its reason.

        Without effect if there is none. A request that takes the name later is another.
        """
        self._requests.abort(request_id)

    def set_priority(self, request_id: str, priority: int) -> None:
        """Give the requests that have this name now another priority, whether they run or wait.

        Without effect if there is none. Raises a `UsageError` if requests are not scheduled by
        priority.
        """
        self._requests.set_priority(request_id, Standing(priority=priority).priority)

    @property
    def port(self) -> EnginePort:
        """The way to the engine, for a server."""
        return self._thread

    @property
    def is_asleep(self) -> bool:
        """True between `sleep` and `wake`."""
        return self._thread.driver.is_asleep

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """As of `LLM`."""
        return self._requests.front_end.callers_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """As of `LLM`."""
        return self._requests.front_end.default_params

    def stats(self) -> EngineStats:
        """What the engine holds and has done, as of the last step's end; waits for no step."""
        return self._thread.driver.stats()

    async def memory_map(self) -> MemoryMap:
        """What each slot holds, as of the end of the step under way; for a picture of memory."""
        return await asyncio.to_thread(self._thread.driver.memory_map)

    async def save_session(
        self,
        path: str | os.PathLike[str],
        what: Saved,
        *,
        extra: bytes = b"",
        adapter: str | None = None,
        model: str | None = None,
    ) -> Session:
        """As `LLM.save_session`."""
        return await asyncio.to_thread(
            self._sessions.save, path, what, extra, Maker(adapter, model)
        )

    async def open_session(self, path: str | os.PathLike[str]) -> Session:
        """As `LLM.open_session`."""
        return await asyncio.to_thread(self._sessions.open, path)

    async def sleep(self, *, weights: bool = False) -> int:
        """As `LLM.sleep`. Requests are refused with InvalidOperation until `wake`."""
        return await asyncio.to_thread(self._thread.driver.sleep, weights=weights)

    async def wake(self) -> None:
        """As `LLM.wake`."""
        await asyncio.to_thread(self._thread.driver.wake)

    async def trim(self) -> int:
        """As `LLM.trim`."""
        return await asyncio.to_thread(self._thread.driver.trim)

    async def weights_changed(self) -> None:
        """As `LLM.weights_changed`."""
        await asyncio.to_thread(self._thread.driver.weights_changed)

    async def close(self) -> None:
        """End all requests, with InvalidOperation for their consumers, and give all back."""
        await asyncio.to_thread(self._thread.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
