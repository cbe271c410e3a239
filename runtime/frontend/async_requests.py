"""Requests of asyncio programs, to an engine wherever it is."""

import asyncio
import itertools
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import msgspec

from ...vmem.errors import InvalidOperation, VkvError
from ..engine.messages import Abort, Message, SetPriority
from ..request.outputs import RequestOutput
from ..request.sampling_params import SamplingParams
from ..request.step_output import Failure, StepOutput
from .chat_template import ChatOptions
from .driving.places import Place, Places
from .driving.port import EnginePort
from .driving.sinks import give
from .front_end import FrontEnd
from .prompts import DEFAULT_STANDING, ITSELF, Maker, Prompt, Standing
from .prompts import Message as ChatMessage
from .text_stream import RequestText


class AsyncRequests:
    """Makes requests of prompts, has them run, and lets tasks of any event loop wait for them.

    Leaving an `async for`, or cancelling its task, drops the request. At most `max_unfinished` are
    with the engine; more wait here for their place.

    Args:
        most_arrivals: a second, of all streams together, beyond which tokens wait for the next to
            arrive with them: who makes texts of them competes with the engine for processors. None
            for no limit.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        port: EnginePort,
        *,
        max_unfinished: int,
        most_arrivals: float | None = None,
    ) -> None:
        self.front_end = front_end
        self._pace = _Pace(most_arrivals)
        self._port = port
        self._places = Places(max_unfinished)
        self._ids = itertools.count()
        # Streams by name, for as long as they live. A signal's handler may come back for the lock.
        self._named: weakref.WeakValueDictionary[str, weakref.WeakSet[_Stream]]
        self._named = weakref.WeakValueDictionary()
        self._naming = threading.RLock()

    def generate(
        self,
        prompt: Prompt | Sequence[ChatMessage],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        options: ChatOptions | None = None,
        standing: Standing = DEFAULT_STANDING,
        by: Maker = ITSELF,
    ) -> AsyncIterator[RequestOutput]:
        """As `AsyncLLM.generate`."""
        self._port.check_open()
        request = self.front_end.request(prompt, params, options, standing, by)
        return self._outputs(self._stream(request, request_id))

    def run(self, request: RequestText, request_id: str | None = None) -> AsyncGenerator[None]:
        """Have a request run. Comes back whenever it has more, the last time finished.

        Raises as `generate`.
        """
        self._port.check_open()
        return self._arrivals(self._stream(request, request_id))

    def abort(self, request_id: str, tenant: str | None = None) -> None:
        """As `AsyncLLM.abort`; with `tenant`, of what is that one's alone."""
        for stream in self._namesakes(request_id):
            if tenant in (None, stream.spec.tenant):
                stream.abort()

    def set_priority(self, request_id: str, priority: int) -> None:
        """As `AsyncLLM.set_priority`."""
        self.front_end.admission.check_priority(priority)
        for stream in self._namesakes(request_id):
            stream.set_priority(priority)

    def _namesakes(self, request_id: str) -> "list[_Stream]":
        self._port.check_process()
        with self._naming:
            return list(self._named.get(request_id, ()))

    def abort_all(self, tenant: str | None = None) -> None:
        """End all requests that there are now, or all of a tenant: each gets a last output, "abort"
        its reason."""
        self._port.check_process()
        with self._naming:
            streams = [stream for namesakes in self._named.values() for stream in namesakes]
        for stream in streams:
            if tenant in (None, stream.spec.tenant):
                stream.abort()

    def _stream(self, request: RequestText, request_id: str | None) -> "_Stream":
        name = f"async-{next(self._ids)}" if request_id is None else request_id
        with self._naming:
            namesakes = self._named.get(name)
            if namesakes is None:
                namesakes = self._named[name] = weakref.WeakSet()
            stream = _Stream(name, request, self._port, namesakes, self._pace)
            namesakes.add(stream)
        return stream

    async def _outputs(self, stream: "_Stream") -> AsyncIterator[RequestOutput]:
        async with aclosing(self._arrivals(stream)) as arrivals:
            async for _ in arrivals:
                yield stream.request.output(stream.name)

    async def _arrivals(self, stream: "_Stream") -> AsyncGenerator[None]:
        place = self._places.line_up()
        stream.begin(place)
        self._pace.num_streams += 1
        try:
            # Aborted before it stood in line, in the line, or while it was called.
            if stream.is_aborted or not await place.wait() or stream.is_aborted:
                stream.request.abort()
                yield
                return
            stream.submit()
            while True:
                await stream.next()
                finished = stream.request.is_finished
                yield
                if finished:
                    return
        finally:
            self._pace.num_streams -= 1
            stream.leave()
            place.release()


class _Pace:
    """How long after one arrival a stream may have the next.

    Attributes:
        num_streams: that there are now. Several event loops may count at once, and a number that
            is a little off does no harm.
    """

    def __init__(self, most_arrivals: float | None) -> None:
        self.num_streams = 0
        self._each_s = 0.0 if most_arrivals is None else 1 / most_arrivals

    @property
    def gap_s(self) -> float:
        """With few streams nothing to speak of."""
        return self.num_streams * self._each_s


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
        port: EnginePort,
        namesakes: "weakref.WeakSet[_Stream]",
        pace: "_Pace",
    ) -> None:
        self.name = name
        self._namesakes = namesakes  # so that they are known as long as one of them lives
        self.request = request
        self.spec = request.spec
        self.is_aborted = False
        self._port = port
        self._place: Place | None = None
        self._mail: deque[StepOutput] = deque()
        self._pace = pace
        self._opened_s = 0.0  # when the mail last was, on the event loop's clock
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
        spec = self.spec
        self._port.submit([self])
        if self.spec is not spec:  # in between, by another thread
            self.set_priority(self.spec.priority)
        if self.is_aborted:  # in between, by another thread
            self.abort()

    async def next(self) -> None:
        """Wait until there is more than at the last call. Raises what ended the request."""
        await self._arrived.wait()
        self._arrived.clear()
        if self.request.is_aborted and not self.is_aborted:
            raise self._port.error or InvalidOperation(
                "this AsyncLLM was closed while it generated"
            )
        if self.request.error is not None:
            raise self.request.error

    def leave(self) -> None:
        """Nobody waits any more: what is unfinished is dropped."""
        self._port.abandon([self])

    def _open_in_time(self) -> None:
        """Open the mail now, or as soon as it is this stream's turn again.

        Where text may end an output, each token counts, lest more are computed for nothing.
        """
        wait_s = self._opened_s + self._pace.gap_s - self._loop.time()
        if wait_s <= 0 or self.spec.params.stop_strings:
            self._open_mail()
        else:
            self._loop.call_later(wait_s, self._open_mail)

    def _open_mail(self) -> None:
        self._is_called = False
        self._opened_s = self._loop.time()
        while self._mail:
            for message in give(self.request, self._mail.popleft()):
                self._port.post(message)
        self._arrived.set()

    # -- from any thread -----------------------------------------------------------------------

    def abort(self) -> None:
        """End it with a last output."""
        self.is_aborted = True
        if self._place is not None:
            self._place.give_up()
        self._port.post(Abort(self.spec.request_id))

    def set_priority(self, priority: int) -> None:
        """Give it another priority, also if the engine does not have it yet."""
        self.spec = msgspec.structs.replace(self.spec, priority=priority)
        self._port.post(SetPriority(self.spec.request_id, priority))

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
                self._loop.call_soon_threadsafe(self._open_in_time)
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
