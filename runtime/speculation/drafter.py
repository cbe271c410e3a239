"""Who guesses."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from ...attention_backends import LayerAttention
from ..request.request import Request


class Drafter(ABC):
    """Guesses how outputs go on. A wrong guess costs time, and never changes a token.

    Attributes:
        kind: what stats and metrics call it.
        takes_time: it runs a model, so that guesses must be worth it, and a request's slot is
            backed for what is to be guessed before it is asked.
        num_caught_up: tokens that it computed in the last `draft` because it had not seen them.
    """

    kind: ClassVar[str]
    takes_time: ClassVar[bool] = False
    num_caught_up = 0

    @abstractmethod
    def draft(self, wanted: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """So many tokens at most for each of some requests; for those without a guess none.

        The host knows all tokens of these requests.
        """

    def num_unseen(self, request: Request) -> int:
        """Tokens of a request that it has to compute before it guesses, beside the last."""
        return 0

    @property
    def kv_bytes(self) -> int:
        """Memory of keys and values of its own."""
        return 0

    def let_go(self) -> None:  # noqa: B027 - nothing to do for some
        """Forget what requests that run no more have left."""

    def trim(self) -> int:
        """Give back what can be had again by computing; returns the bytes."""
        return 0

    def model_changed(  # noqa: B027
        self, layers: Sequence[LayerAttention], *, recordable: bool
    ) -> None:
        """Go on with the model that verifies as it is now; arguments as of the runner's."""

    def release_weights(self) -> Sequence[nn.Module]:
        """Hold on to no weights, which will be elsewhere; returns the models that are its own."""
        return ()

    def weights_are_back(self) -> None:  # noqa: B027
        """Go on after `release_weights`."""

    def close(self) -> None:  # noqa: B027
        """Give back what it holds."""
