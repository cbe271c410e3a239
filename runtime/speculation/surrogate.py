"""A model guesses for itself, with some of its layers left out.

Source: surrogates of blocks, arXiv:2404.18322 (BlockLLM), which are pruned copies with weights of
their own; left-out layers, arXiv:2309.08168 (Draft & Verify).
"""

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from ...attention_backends import LayerAttention
from ..execution.model_runner import ModelRunner
from ..model.forward import Forward
from ..request.request import Request
from .drafter import Drafter
from .shadows import go_ahead, shadow_of
from .skipping import least_needed, num_layers, without_layers


class Surrogate(Drafter):
    """Guesses by some of the layers of the model that verifies, for a step's requests in a batch.

    The layers are the model's own, and so are the slots: a layer attends to the keys and values
    that the whole model left there, and writes those of guesses behind them, where they are written
    over when the guesses are verified. So it takes no memory, and has seen all there is to see.

    Args:
        model: the whole model.
        share: of its layers that are run: those that change most what they are given.
        vocab_size: tokens of the model.
        make_runner: a runner of the model with these layers over the same slots.

    Raises InvalidConfig if the model cannot do without some of its layers.

    Attributes:
        kept: the layers that are run.
    """

    kind = "surrogate"
    takes_time = True

    def __init__(
        self,
        model: PreTrainedModel,
        share: float,
        *,
        vocab_size: int,
        make_runner: Callable[[Forward], ModelRunner],
    ) -> None:
        self._model = model
        num_kept = max(1, round(share * num_layers(model)))
        self.kept = least_needed(model, num_kept, vocab_size)
        self._runner = make_runner(Forward(without_layers(model, self.kept)))
        self._shadows: WeakKeyDictionary[Request, Request] = WeakKeyDictionary()

    def draft(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """As of `Drafter`."""
        shadows = {request: self._shadow(request) for request in wanted}
        said = go_ahead(
            self._runner,
            dict.fromkeys(shadows.values(), 1),
            {shadow: wanted[request] for request, shadow in shadows.items()},
        )
        return {request: said[shadow] for request, shadow in shadows.items()}

    def model_changed(self, layers: Sequence[LayerAttention], *, recordable: bool) -> None:
        """As of `Drafter`."""
        self._runner.forward = Forward(without_layers(self._model, self.kept))
        self._runner.model_changed(layers, recordable=recordable)

    def release_weights(self) -> Sequence[nn.Module]:
        """As of `Drafter`."""
        self.close()
        return ()  # they are the whole model's

    def close(self) -> None:
        """As of `Drafter`."""
        if self._runner.recordings is not None:
            self._runner.recordings.forget()

    def _shadow(self, request: Request) -> Request:
        """A request that stands where this one does, in its slot."""
        shadow = self._shadows.get(request)
        if shadow is None:
            shadow = self._shadows[request] = shadow_of(request)
        shadow.token_ids = list(request.token_ids)
        shadow.num_computed = request.num_computed
        shadow.sampling = request.sampling.fork(shadow.params)
        shadow.slot = request.slot
        return shadow
