"""Who gets what a step brought."""

import logging
import weakref
from collections.abc import Sequence
from typing import Protocol

from ....vmem.errors import StepFailed, VkvError
from ...engine.loop import EngineLoop
from ...engine.messages import Abort, Message
from ...request.spec import RequestSpec
from ...request.step_output import StepOutput

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where a request's outputs go. Called by whoever turns the loop, one call at a time."""

    spec: RequestSpec

    @property
    def is_finished(self) -> bool:
        """True once no more outputs will come."""
        ...

    def accept(self, output: StepOutput) -> Sequence[Message]:
        """Take an output; returns what the engine is to be told."""
        ...

    def fail(self, error: VkvError) -> None:
        """End all that is unfinished by an error."""
        ...


def give(sink: Sink, output: StepOutput) -> Sequence[Message]:
    """Have a sink take an output; returns what the engine is to be told.

    What goes wrong with its text ends the request by an error, and no other.
    """
    try:
        return sink.accept(output)
    except Exception as error:  # noqa: BLE001 - told to the one whose text it is, and logged
        _log.exception("the text of request %s failed", output.request_id)
        sink.fail(StepFailed(f"its text could not be made: {error!r}"))
        return (Abort(output.request_id),)


class Sinks:
    """The sinks of a loop's requests, held weakly: a request whose sink is gone is dropped.

    However it came to that (a signal between two lines, an event loop that was closed), no
    request runs on for nobody. `add` may be called from any thread, the others by the loop's
    driver.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._sinks: weakref.WeakValueDictionary[str, Sink] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._sinks)

    def add(self, sink: Sink) -> None:
        """Expect outputs of a request that the loop is about to be told of."""
        self._sinks[sink.spec.request_id] = sink

    def route(self, outputs: Sequence[StepOutput]) -> None:
        """Give each its own."""
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                if output.finish_reason is None:
                    self._loop.post(Abort(output.request_id))
                continue
            for message in give(sink, output):
                self._loop.post(message)
            if sink.is_finished:
                self._sinks.pop(output.request_id, None)

    def drop_orphans(self) -> None:
        """Post the end of requests whose sinks are gone."""
        for request in self._loop.engine.requests:
            if request.key[0] not in self._sinks:
                self._loop.post(Abort(request.key[0]))

    def abort_all(self) -> None:
        """End requests that an engine, torn by a failure, may know nothing of."""
        for reference in self._sinks.valuerefs():
            sink = reference()
            if sink is not None:
                self.route(_aborted(sink.spec))


def _aborted(spec: RequestSpec) -> list[StepOutput]:
    return [
        StepOutput(request_id=spec.request_id, index=index, finish_reason="abort")
        for index in range(spec.params.n)
    ]
