"""Giving things back in reverse order, again where the system refused."""

from collections.abc import Callable


class Closing:
    """Steps that give back what was taken: the last one first, each until it has succeeded once."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        """`step` gives back what lies on all that was added before."""
        self._steps.append(step)

    def close(self) -> None:
        """Take all steps. One that raises is the first to be tried by the next call."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()
