"""Where one sequence stands in the grammar that its output follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens as llguidance has them, and the threads that compute masks over them."""

    tokenizer: LLTokenizer
    executor: LLExecutor


class TokenGrammar:
    """A sequence's place in its grammar. It belongs to the sequence, as `SamplingState` does.

    Not for use from several threads.

    Attributes:
        matcher: llguidance's; it computes which tokens may be next.
        vocabulary: of all grammars of one engine the same.
        barred_ends: end tokens that must not come while anything else may.
        failure: why no token can be chosen any more; None while one can.
    """

    __slots__ = ("_on_failure", "barred_ends", "failure", "matcher", "vocabulary")

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        *,
        barred_ends: Sequence[int] = (),
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """Begin at the grammar's start; `on_failure` is called once it cannot be followed."""
        self.matcher = matcher
        self.vocabulary = vocabulary
        self.barred_ends = tuple(barred_ends)
        self.failure: str | None = None
        self._on_failure = on_failure

    @property
    def is_complete(self) -> bool:
        """True once the output is whole and nothing can follow."""
        return self.failure is None and self.matcher.is_stopped()

    def fork(self) -> TokenGrammar:
        """Another that stands where this one does and goes its own way; nobody hears of its end."""
        twin = TokenGrammar(self.matcher.deep_copy(), self.vocabulary, barred_ends=self.barred_ends)
        twin.failure = self.failure
        return twin

    def advance(self, token_id: int) -> None:
        """Note a token of the output."""
        self.matcher.consume_token(token_id)
        self.check()

    def check(self) -> None:
        """Note whether the matcher has failed: it would let the output end where it stands."""
        if self.failure is not None or not self.matcher.is_error():
            return
        why = self.matcher.get_error().replace("<non-verbose/>", "").strip()
        self.failure = (
            "the grammar of structured_outputs cannot be followed any further: "
            f"{why[:300]}. Either no token of the "
            "vocabulary continues the output, or the grammar takes too much work; simplify it"
        )
        if self._on_failure is not None:
            self._on_failure()


def allowed_bits(grammars: Sequence[TokenGrammar]) -> np.ndarray:
    """Which tokens may be next, a bit for each from the lowest: int32 [grammars, tokens / 32].

    None where a grammar has failed, which it notes.
    """
    vocabulary = grammars[0].vocabulary
    bits = np.empty((len(grammars), -(-vocabulary.tokenizer.vocab_size // 32)), dtype=np.int32)
    vocabulary.executor.unsafe_compute_mask_ptr(
        [(grammar.matcher, row) for row, grammar in enumerate(grammars)],
        bits.ctypes.data,
        bits.strides[0],
        len(bits),
    )
    for grammar, row in zip(grammars, bits, strict=True):
        grammar.check()
        if grammar.failure is not None:
            row[:] = 0
        elif grammar.barred_ends:
            _clear_unless_alone(row, grammar.barred_ends)
    return bits


def _clear_unless_alone(row: np.ndarray, token_ids: Sequence[int]) -> None:
    """Clear the bits of some tokens, if others are set."""
    ids = np.array(token_ids)
    bit = np.left_shift(np.int32(1), (ids % 32).astype(np.int32), dtype=np.int32)
    others = row.copy()
    np.bitwise_and.at(others, ids // 32, ~bit)
    if others.any():
        row[:] = others
