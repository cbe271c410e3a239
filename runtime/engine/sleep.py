"""An engine asleep: its memory is the system's, its addresses stay its own."""

from ...vmem.errors import InvalidOperation
from ..model.weights import OffloadedWeights
from .devices import device_profile
from .engine import Engine


class Sleep:
    """Puts an engine to sleep and wakes it up.

    Slots keep their addresses, so that whatever holds one (kernels' views, recorded steps) is
    right when their memory is back. Weights come back at other addresses, so with them the
    recordings of decode steps go; they are made again when needed.

    Args:
        engine: not stepped meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._profile = device_profile(engine.runner.device)
        self._weights: list[OffloadedWeights] = []
        self.is_asleep = False

    def begin(self, *, weights: bool) -> int:
        """Give back the memory of keys, values and state, and of `weights`; returns the bytes.

        Raises InvalidOperation if a request is unfinished, and torch's own error if the host has no
        room for the weights, which are where they were then. While it sleeps already, it gives back
        what else is asked for.
        """
        engine = self._engine
        if engine.has_work:
            raise InvalidOperation(
                f"{len(engine.requests)} requests are unfinished, and their keys and values would "
                "be lost; let them finish, or abort them, before sleep()"
            )
        num_bytes = engine.trim() + engine.runner.forget()
        if weights and self._profile.moves_weights and not self._weights:
            if engine.runner.recordings is not None:
                engine.runner.recordings.forget()
            if engine.watch is not None:
                engine.watch.release()
            try:
                self._offload()
            except BaseException:
                self._bring_back()
                raise
            num_bytes += sum(weights.num_bytes for weights in self._weights)
        self._profile.release_cached()
        self.is_asleep = True
        return num_bytes

    def _offload(self) -> None:
        engine = self._engine
        self._weights.append(OffloadedWeights(engine.runner.forward.model))
        if engine.scheduler.speculation is not None:
            for model in engine.scheduler.speculation.drafter.release_weights():
                self._weights.append(OffloadedWeights(model))

    def end(self) -> None:
        """Bring the weights back. Keys and values come with the requests that need them."""
        if self._weights:
            self._bring_back()
        self.is_asleep = False

    def _bring_back(self) -> None:
        for weights in self._weights:
            weights.restore()
        self._weights.clear()
        if self._engine.watch is not None:
            self._engine.watch.renew()
        if self._engine.scheduler.speculation is not None:
            self._engine.scheduler.speculation.drafter.weights_are_back()

    def check_awake(self) -> None:
        """Raises InvalidOperation while asleep."""
        if self.is_asleep:
            raise InvalidOperation("this LLM is asleep; call wake() first")
