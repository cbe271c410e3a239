"""A `forward` of one module's own, over the one that it had: put on, and taken off in any order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class Overlay(ABC):
    """Stands for a module's `forward`, from when it is made until `take_off`.

    Several may lie over one another.

    Attributes:
        inner: what lies beneath it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.inner: Callable[..., Any] = module.forward
        self._module = module
        self._before: Any = vars(module).get("forward")  # None where it is the class's
        module.forward = self  # type: ignore[method-assign, assignment]

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's `forward` from now on."""

    def take_off(self) -> None:
        """Leave the module as if this had not been; without effect if it is not there."""
        above = vars(self._module).get("forward")
        if above is self:
            del self._module.forward
            if self._before is not None:
                self._module.forward = self._before
            return
        while isinstance(above, Overlay):
            if above.inner is self:
                above.inner, above._before = self.inner, self._before
                return
            above = above.inner


def overlays_of(module: nn.Module) -> Iterator[Overlay]:
    """Those that lie over a module's `forward`, the topmost first."""
    found = vars(module).get("forward")
    while isinstance(found, Overlay):
        yield found
        found = found.inner
