"""Who guesses."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..request.request import Request


class Drafter(Protocol):
    """Guesses how outputs go on. A wrong guess costs time, and never changes a token."""

    def draft(self, wanted: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """So many tokens at most for each of some requests; for those without a guess none.

        The host knows all tokens of these requests.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...
