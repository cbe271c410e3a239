"""Where a model's modules make way for those of its relatives, row by row."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...vmem.errors import ChainMismatch
from ..model.extras.overlays import Overlay
from .anatomy import Anatomy, Call
from .steps import current_step


class Sites:
    """The modules of a model at which rows of other models may part ways.

    Args:
        model: as it computes, packed or not.

    Attributes:
        anatomy: how it calls its modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.anatomy = Anatomy(model)
        self._model = model
        self._overlays: dict[str, _Parting] = {}

    def install(self, names: Sequence[str]) -> None:
        """Have rows part ways at these modules from now on."""
        for name in names:
            if name not in self._overlays:
                module = self._model.get_submodule(name)
                self._overlays[name] = _Parting(module, name, self.anatomy.calls[name])

    @property
    def names(self) -> Collection[str]:
        """Where rows part ways by now."""
        return self._overlays.keys()

    def uninstall(self) -> None:
        """Leave the model as it was."""
        for overlay in self._overlays.values():
            overlay.take_off()
        self._overlays.clear()

    def find(self, part: nn.Module, is_read: Callable[[nn.Module], bool | None]) -> list[str]:
        """The largest modules that hold what was read, and nothing else, in the order of calls.

        Args:
            part: a model of this architecture, not packed, of which some was read.
            is_read: whether what a module holds itself, not what is in it, was read; None for one
                that holds nothing.

        Raises ChainMismatch for what cannot be computed for some rows at a time.
        """
        found = set(self._find("", part, is_read))
        return [name for name in self.anatomy.calls if name in found]

    def _find(
        self, name: str, module: nn.Module, is_read: Callable[[nn.Module], bool | None]
    ) -> Iterator[str]:
        held = [is_read(one) for one in module.modules()]
        if True not in held:
            return
        if self.anatomy.can_stand_alone(name) and False not in held:
            yield name
            return
        if is_read(module):
            self._check_unused(name, module)
        for child, inner in module.named_children():
            yield from self._find(f"{name}.{child}" if name else child, inner, is_read)

    def _check_unused(self, name: str, module: nn.Module) -> None:
        """Pass over what the model does not compute for a text, such as its eyes."""
        parent = name.rpartition(".")[0]
        if name not in self.anatomy.calls and parent and parent not in self.anatomy.calls:
            return
        raise ChainMismatch(
            f"{name} ({type(module).__name__}) differs between models that are to run together, "
            "and cannot be computed for some tokens at a time; serve each model by itself"
        )


class _Parting(Overlay):
    """A module's `forward`, each row by the copy that it belongs to."""

    def __init__(self, module: nn.Module, name: str, call: Call) -> None:
        super().__init__(module)
        self._name = name
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = current_step()
        if step is None:
            return self.inner(*args, **kwargs)
        return step.call(self._name, self._call, self.inner, args, kwargs)
