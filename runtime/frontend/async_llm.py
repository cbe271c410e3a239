"""`LLM` for asyncio: many callers, one engine thread."""

import asyncio
import itertools
import logging
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...vmem import janitor
from ...vmem.at_exit import stop_at_exit
from ...vmem.errors import InvalidConfig, InvalidOperation, VkvError
from ..engine.build import build_loop, load
from ..engine.config import EngineConfig
from ..engine.loop import EngineLoop
from ..engine.messages import Abort, Message
from ..engine.stats import EngineStats
from ..request.outputs import RequestOutput
from ..request.sampling_params import SamplingParams
from ..request.step_output import Failure, StepOutput
from .chat_template import ChatOptions
from .driving.driver import LoopDriver
from .driving.places import Place, Places
from .driving.sinks import give
from .front_end import FrontEnd
from .prompts import Message as ChatMessage
from .prompts import Prompt
from .text_stream import RequestText
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
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        if max_unfinished < 1:
            raise InvalidConfig(f"max_unfinished is {max_unfinished}; it must be at least 1")
        self.config = EngineConfig(**options)
        loaded = load(
            model, tokenizer=own(tokenizer), device=device, dtype=dtype, config=self.config
        )
        loop = build_loop(loaded, self.config)
        self.engine = loop.engine
        self._front_end = FrontEnd(loaded, loop.engine.admission)
        self._places = Places(max_unfinished)
        self._ids = itertools.count()
        # Streams by name, for as long as they live. A signal's handler may come back for the lock.
        self._named: weakref.WeakValueDictionary[str, weakref.WeakSet[_Stream]]
        self._named = weakref.WeakValueDictionary()
        self._naming = threading.RLock()
        # The thread knows the driver, not this object, which can so be dropped without `close`.
        self._thread = EngineThread(loop, idle_trim_s=self.config.idle_trim_s)
        weakref.finalize(self, janitor.later, self._thread.close).atexit = False

    def generate(
        self,
        prompt: Prompt | Sequence[ChatMessage],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncIterator[RequestOutput]:
        """Complete a prompt or a conversation; yields all that there is so far.

        Prompts are as of `LLM.generate`, conversations and `options` as of `LLM.chat`.
        Each output holds the whole of text and tokens up to then; the last has `finished`. The
        name is known to `abort` from now on, also while the request waits for its place.

        Raises a `UsageError` if the request is refused, InvalidOperation if this object is closed
        meanwhile, and the request's own error if it goes wrong.
        """
        self._thread.check_open()
        name = f"async-{next(self._ids)}" if request_id is None else request_id
        request = self._front_end.request(prompt, params, options)
        with self._naming:
            namesakes = self._named.get(name)
            if namesakes is None:
                namesakes = self._named[name] = weakref.WeakSet()
            stream = _Stream(name, request, self._thread, namesakes)
            namesakes.add(stream)
        return self._outputs(stream)

    async def _outputs(self, stream: "_Stream") -> AsyncIterator[RequestOutput]:
        place = self._places.line_up()
        stream.begin(place)
        try:
            # Aborted before it stood in line, in the line, or while it was called.
            if stream.is_aborted or not await place.wait() or stream.is_aborted:
                yield stream.end_unasked()
                return
            stream.submit()
            finished = False
            while not finished:
                output = await stream.next()
                finished = output.finished
                yield output
        finally:
            stream.leave()
            place.release()

    def abort(self, request_id: str) -> None:
        """End the requests that have this name now: each gets a last output, "abort" its reason.

        Without effect if there is none. A request that takes the name later is another.
        """
        self._thread.driver.check_process()
        with self._naming:
            namesakes = list(self._named.get(request_id, ()))
        for stream in namesakes:
            stream.abort()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """As of `LLM`."""
        return self._front_end.callers_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """As of `LLM`."""
        return self._front_end.default_params

    def stats(self) -> EngineStats:
        """What the engine holds and has done, as of the last step's end; waits for no step."""
        return self._thread.driver.stats()

    async def sleep(self, *, weights: bool = False) -> int:
        """As `LLM.sleep`. Requests are refused with InvalidOperation until `wake`."""
        return await asyncio.to_thread(self._thread.driver.sleep, weights=weights)

    async def wake(self) -> None:
        """As `LLM.wake`."""
        await asyncio.to_thread(self._thread.driver.wake)

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


class _Stream:
    """A request between its consumer on an event loop and the engine's thread.

    The thread leaves tokens, and calls the loop once however many there are. Text is made on the
    loop, so that a stop string ends the request even if its consumer is slow.

    Attributes:
        name: the caller's for the request.
        is_aborted: the caller has asked for its end.
    """

    def __init__(
        self,
        name: str,
        request: RequestText,
        thread: "EngineThread",
        namesakes: "weakref.WeakSet[_Stream]",
    ) -> None:
        self.name = name
        self._namesakes = namesakes  # so that they are known as long as one of them lives
        self.request = request
        self.spec = request.spec
        self.is_aborted = False
        self._thread = thread
        self._place: Place | None = None
        self._mail: deque[StepOutput] = deque()
        self._is_called = False  # the loop, to open the mail
        self._ended: set[int] = set()  # sequences that the engine gives nothing more of

    # -- on the event loop -------------------------------------------------------------------

    def begin(self, place: Place) -> None:
        """Belong to the running event loop from now on, in which `place` is waited for."""
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._place = place

    def submit(self) -> None:
        """Ask the engine."""
        self._thread.driver.submit([self])
        if self.is_aborted:  # in between, by another thread
            self.abort()

    async def next(self) -> RequestOutput:
        """All there is, once there is more than at the last call. Raises what ended the request."""
        await self._arrived.wait()
        self._arrived.clear()
        if self.request.is_aborted and not self.is_aborted:
            raise self._thread.error or InvalidOperation(
                "this AsyncLLM was closed while it generated"
            )
        if self.request.error is not None:
            raise self.request.error
        return self.request.output(self.name)

    def end_unasked(self) -> RequestOutput:
        """The last output of a request that the engine never had."""
        self.request.abort()
        return self.request.output(self.name)

    def leave(self) -> None:
        """Nobody waits any more: what is unfinished is dropped."""
        self._thread.driver.abandon([self])

    def _open_mail(self) -> None:
        self._is_called = False
        while self._mail:
            for message in give(self.request, self._mail.popleft()):
                self._thread.driver.post(message)
        self._arrived.set()

    # -- from any thread -----------------------------------------------------------------------

    def abort(self) -> None:
        """End it with a last output."""
        self.is_aborted = True
        if self._place is not None:
            self._place.give_up()
        self._thread.driver.post(Abort(self.spec.request_id))

    # -- on the engine's thread ----------------------------------------------------------------

    @property
    def is_finished(self) -> bool:
        """True if the engine gives nothing more."""
        return len(self._ended) == self.spec.params.n or self.request.is_finished

    def accept(self, output: StepOutput) -> Sequence[Message]:
        """Leave what came for the event loop."""
        if output.finish_reason is not None:
            self._ended.add(output.index)
        self._mail.append(output)
        if self._loop.is_closed() or not self._call():
            self._ended.update(range(self.spec.params.n))  # nobody waits any more
            if self._place is not None:
                self._place.release()
            return (Abort(self.spec.request_id),)
        return ()

    def _call(self) -> bool:
        """Have the event loop open the mail; False if it was closed in this moment."""
        if not self._is_called:
            self._is_called = True
            try:
                self._loop.call_soon_threadsafe(self._open_mail)
            except RuntimeError:
                return False
        return True

    def fail(self, error: VkvError) -> None:
        """Leave an error that the thread met."""
        for index in range(self.spec.params.n):
            self.accept(
                StepOutput(
                    request_id=self.spec.request_id,
                    index=index,
                    finish_reason="error",
                    failure=Failure.of(error),
                )
            )


class EngineThread:
    """Turns a loop on a thread of its own, while there is something to do.

    Attributes:
        driver: for requests, and for what else there is to ask of the loop.
        error: what ended the thread before its time, or None.
    """

    def __init__(self, loop: EngineLoop, *, idle_trim_s: float | None) -> None:
        self._calls: SimpleQueue[bool] = SimpleQueue()  # False: stop. A finaliser may `put`.
        calls = self._calls
        self.driver = LoopDriver(loop, idle_trim_s=idle_trim_s, on_post=lambda: calls.put(True))
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="vkv-engine", daemon=True)
        self.thread.start()
        stop_at_exit(self)

    def check_open(self) -> None:
        """Raises InvalidOperation once stopped, ForkedProcess in a child of a fork."""
        self.driver.check_open()

    def close(self) -> None:
        """End the thread after the step under way, and all requests, and give all back."""
        if self.driver.is_mine:
            self.stop()
            self.driver.close()

    def stop(self) -> None:
        """End the thread after the step under way. Nobody is told: the interpreter exits."""
        if self.driver.is_mine:
            self._calls.put(False)
            self.thread.join()

    def _run(self) -> None:
        try:
            while self._is_called():
                self.driver.turn()
        except Exception as error:  # noqa: BLE001 - told to every consumer, and logged
            _log.exception("the engine's thread ends")
            self.error = error
            try:
                self.driver.close()
            except VkvError:
                _log.exception("memory could not be given back; close() tries again")

    def _is_called(self) -> bool:
        """Wait until there is something to do: True; or until stopped: False."""
        while True:
            while not self._calls.empty():
                if not self._calls.get():
                    return False
            if self.driver.has_work:
                return True
            self._calls.put(self._calls.get())
