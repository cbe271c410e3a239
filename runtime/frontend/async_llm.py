"""`LLM` for asyncio: many callers, one engine thread."""

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedModel

from ...vmem.errors import InvalidConfig, InvalidOperation, UsageError
from ..engine.engine import EngineStats
from ..request.outputs import RequestOutput
from ..request.request import Request, request_output
from ..request.sampling_params import SamplingParams
from .llm import LLM
from .prompts import Message, Prompt


class AsyncLLM:
    """A causal language model for asyncio programs: requests of all tasks run together.

    One thread steps the engine while there is work, so the event loop never waits for the model.
    Cancelling a task, or leaving an `async for`, drops its request, and its pages go back before
    the next step. A consumer that falls behind gets the newest state when it comes back: nothing
    piles up. At most `max_unfinished` requests are with the engine; more wait in `generate`.

    Args:
        model: as of `LLM`.
        max_unfinished: requests in the engine at once, running or queued there.
        options: the other arguments of `LLM`.

    Example:
        >>> async with AsyncLLM() as llm:
        ...     async for output in llm.generate("hello", SamplingParams(max_tokens=8)):
        ...         print(output.outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | None = None,
        *,
        max_unfinished: int = 256,
        **options: Any,
    ) -> None:
        if max_unfinished < 1:
            raise InvalidConfig(f"max_unfinished is {max_unfinished}; it must be at least 1")
        self._work = _Work(LLM(model, **options))
        self._room = asyncio.Semaphore(max_unfinished)
        self._ids = itertools.count()
        # The thread knows the work, not this object, which can so be dropped without `close`.
        self._thread = threading.Thread(target=self._work.run, name="vkv-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Complete a text, token ids or a conversation; yields all that there is so far.

        Each output holds the whole of text and tokens up to then; the last has `finished`.

        Raises a `UsageError` if the request is refused, InvalidOperation if this object is closed
        meanwhile, and whatever stopped the engine.
        """
        llm = self._work.llm
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            text, tokens = None, llm.render_chat(prompt)  # type: ignore[arg-type]
            params = params or SamplingParams(max_tokens=None)
        else:
            text = prompt if isinstance(prompt, str) else None
            tokens = llm._tokenise(prompt)  # type: ignore[arg-type]
        name = request_id if request_id is not None else f"async-{next(self._ids)}"
        async with self._room:
            stream = _Stream(name, text, tokens, params or SamplingParams())
            self._work.submit(stream)
            try:
                finished = False
                while not finished:
                    output = await stream.next()
                    finished = output.finished
                    yield output
            finally:
                self._work.drop(stream)

    def abort(self, request_id: str) -> None:
        """End a request: its consumer gets a last output, with the finish reason "abort".

        Without effect if there is none of that name.
        """
        self._work.abort(request_id)

    def stats(self) -> EngineStats:
        """What the engine holds and has done; waits for a step under way."""
        return self._work.llm.stats()

    async def sleep(self, *, weights: bool = False) -> int:
        """As `LLM.sleep`. Requests are refused with InvalidOperation until `wake`."""
        return await asyncio.to_thread(self._work.llm.sleep, weights=weights)

    async def wake(self) -> None:
        """As `LLM.wake`."""
        await asyncio.to_thread(self._work.llm.wake)

    async def close(self) -> None:
        """End all requests, with InvalidOperation for their consumers, and give all back."""
        self._work.stop()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if "_work" in self.__dict__:
            self._work.stop()


class _Stream:
    """A request between its consumer on the event loop and the engine's thread.

    It holds one undelivered state, the newest: an output, or the error that ended it.
    """

    def __init__(
        self, request_id: str, text: str | None, tokens: list[int], params: SamplingParams
    ) -> None:
        self.request_id = request_id
        self.text = text
        self.tokens = tokens
        self.params = params
        self.requests: list[Request] = []
        self.num_shown = 0  # tokens that the newest state has
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._newest: RequestOutput | BaseException | None = None

    async def next(self) -> RequestOutput:
        """The newest state, once there is one that was not delivered."""
        await self._arrived.wait()
        self._arrived.clear()
        newest, self._newest = self._newest, None
        if isinstance(newest, BaseException):
            raise newest
        assert newest is not None, "woken for nothing"
        return newest

    @property
    def waits(self) -> bool:
        """True if the consumer has had all that was there."""
        return self._newest is None

    def put(self, state: RequestOutput | BaseException) -> None:
        """From the engine's thread: replace what was not delivered."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, state)

    def _set(self, state: RequestOutput | BaseException) -> None:
        self._newest = state
        self._arrived.set()


class _Work:
    """What the engine's thread does; the event loop only leaves notes for it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._new: deque[_Stream] = deque()
        self._dropped: deque[_Stream] = deque()
        self._aborted: deque[str] = deque()
        self._stopped = False
        self._live: list[_Stream] = []  # the thread's own

    def submit(self, stream: _Stream) -> None:
        with self._changed:
            if self._stopped:
                raise InvalidOperation("this AsyncLLM has been closed; create another")
            self._new.append(stream)
            self._changed.notify()

    def drop(self, stream: _Stream) -> None:
        with self._changed:
            self._dropped.append(stream)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._aborted.append(request_id)
            self._changed.notify()

    def stop(self) -> None:
        if self._pid == os.getpid():  # a forked child has no thread that would hold the lock
            with self._changed:
                self._stopped = True
                self._changed.notify()

    def run(self) -> None:
        """Until stopped: take notes, step, tell the consumers."""
        try:
            while self._take_notes():
                if self._live:
                    self.llm._step()
                    self._publish()
        except Exception as error:  # noqa: BLE001 - handed to every consumer, none of which may hang
            self._end(error)
        else:
            self._end(InvalidOperation("this AsyncLLM was closed while it generated"))
        finally:
            self.llm.close()

    def _take_notes(self) -> bool:
        """Carry out what was asked since; wait if there is nothing to do. False: stop."""
        with self._changed:
            while not (self._live or self._new or self._aborted or self._stopped):
                self._dropped.clear()
                self._changed.wait()
            if self._stopped:
                return False
            new, dropped, aborted = list(self._new), list(self._dropped), set(self._aborted)
            self._new.clear()
            self._dropped.clear()
            self._aborted.clear()
        for stream in new:
            if stream not in dropped:
                self._add(stream)
        ended = [stream for stream in self._live if stream in dropped]
        ended += [stream for stream in self._live if stream.request_id in aborted]
        self.llm._abort([stream.requests for stream in ended])
        self._publish()
        self._live = [stream for stream in self._live if stream not in dropped]
        return True

    def _add(self, stream: _Stream) -> None:
        groups: list[list[Request]] = []
        try:
            self.llm._add([stream.tokens], [stream.params], groups)
        except (UsageError, InvalidOperation) as error:  # refused: this caller's alone
            stream.put(error)
            return
        stream.requests = groups[0]
        self._live.append(stream)

    def _publish(self) -> None:
        """Tell consumers of new tokens; those that have not taken the last are told later."""
        for stream in list(self._live):
            finished = all(request.is_finished for request in stream.requests)
            shown = sum(request.num_output_tokens for request in stream.requests)
            if finished or (shown > stream.num_shown and stream.waits):
                stream.num_shown = shown
                output = request_output(stream.requests, stream.text)
                stream.put(replace(output, request_id=stream.request_id))
            if finished:
                self._live.remove(stream)

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._stopped = True
            waiting = [*self._live, *self._new]
            self._new.clear()
        for stream in waiting:
            stream.put(error)
