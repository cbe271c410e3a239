"""Requests that a thread waits for, while another thread hears what comes for them."""

import threading
from collections.abc import Sequence

from ...vmem.errors import VkvError
from ..engine.messages import Message
from ..frontend.driving.sinks import Sink
from ..frontend.text_stream import RequestText, StreamDelta
from ..request.step_output import StepOutput

_A_LITTLE_S = 0.1  # a signal's handler waits no longer


class Waiting:
    """Some requests and who waits for them.

    Args:
        each_token: whether the one who waits wants to be woken for each token (`next_delta`), and
            not for the end of a request alone.

    Attributes:
        sinks: where their outputs go; dropped with this object.
    """

    def __init__(self, requests: Sequence[RequestText], *, each_token: bool = False) -> None:
        self._arrived = threading.Condition()
        self.sinks: list[Sink] = [
            _Waited(request, self._arrived, each_token) for request in requests
        ]
        self._requests = requests

    def wait_a_little(self) -> bool:
        """Wait for more, or for a tenth of a second; True once all have ended."""
        with self._arrived:
            if not self._are_finished():
                self._arrived.wait(_A_LITTLE_S)
            return self._are_finished()

    def next_delta(self) -> StreamDelta | None:
        """Wait for what comes next of a single request; None at its end."""
        (request,) = self._requests
        while True:
            with self._arrived:
                if delta := request.take_delta():
                    return delta
                if request.is_finished:
                    return None
                self._arrived.wait(_A_LITTLE_S)

    def _are_finished(self) -> bool:
        return all(request.is_finished for request in self._requests)


class _Waited:
    """A request's sink, as of `Sink`."""

    def __init__(
        self, request: RequestText, arrived: threading.Condition, each_token: bool
    ) -> None:
        self.spec = request.spec
        self._request = request
        self._arrived = arrived
        self._each_token = each_token

    @property
    def is_finished(self) -> bool:
        return self._request.is_finished

    def accept(self, output: StepOutput) -> Sequence[Message]:
        with self._arrived:
            messages = self._request.accept(output)
            if self._each_token or self._request.is_finished:
                self._arrived.notify_all()
            return messages

    def fail(self, error: VkvError) -> None:
        with self._arrived:
            self._request.fail(error)
            self._arrived.notify_all()
