"""Which tokens one sequence must not have next: those not allowed, and the ends of bad words."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class TokenBars:
    """The tokens that one sequence may not have, at all or at this step.

    Attributes:
        looks_back: True if some depend on the tokens that were generated before.
    """

    __slots__ = ("_allowed", "_barred", "_mask", "_phrases", "_recent", "looks_back")

    def __init__(self, allowed: Sequence[int] | None, bad_words: Sequence[Sequence[int]]) -> None:
        self._allowed = allowed
        self._barred = sorted({word[0] for word in bad_words if len(word) == 1})
        # What completes a bad word of several tokens, by those before it.
        self._phrases = [(tuple(word[:-1]), word[-1]) for word in bad_words if len(word) > 1]
        self.looks_back = bool(self._phrases)
        longest = max((len(before) for before, _ in self._phrases), default=0)
        self._recent: deque[int] = deque(maxlen=longest)
        self._mask: Tensor | None = None  # [vocab], on the logits' device; made on first use

    @classmethod
    def of(cls, allowed: Sequence[int] | None, bad_words: Sequence[Sequence[int]]) -> Self | None:
        """The bars, or None if there are none."""
        return None if allowed is None and not bad_words else cls(allowed, bad_words)

    def fork(self) -> Self:
        """Another that stands where this one does, and goes its own way."""
        twin = copy.copy(self)
        twin._recent = self._recent.copy()
        return twin

    def mask(self, vocab_size: int, device: torch.device) -> Tensor:
        """True where a token is barred at every step: bool [vocab_size], on `device`."""
        if self._mask is None:
            with torch.inference_mode(False):  # or it could not be used outside of it
                mask = torch.zeros(vocab_size, dtype=torch.bool)
                if self._allowed is not None:
                    mask.fill_(True)
                    mask[[i for i in self._allowed if i < vocab_size]] = False
                mask[[i for i in self._barred if i < vocab_size]] = True
                self._mask = mask.to(device)
        return self._mask

    def now(self) -> list[int]:
        """The tokens that would complete a bad word at this step."""
        recent = tuple(self._recent)
        return [last for before, last in self._phrases if recent[-len(before) :] == before]

    def advance(self, token_id: int) -> None:
        """Note a token of the output."""
        self._recent.append(token_id)
