"""Outputs that a grammar allows, chosen at random without a model."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase
from vkv import StructuredOutputsParams
from vkv.runtime.execution.grammars import Grammars
from vkv.runtime.execution.token_bytes import token_bytes
from vkv.runtime.request.token_grammar import TokenGrammar, allowed_bits

_CLOSING = (b'"', b"}", b"]")


@dataclass(frozen=True)
class Walker:
    """A vocabulary, and what compiles grammars for it."""

    grammars: Grammars
    table: Sequence[bytes]
    ends: Collection[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], width: int) -> "Walker":
        table = token_bytes(tokenizer, width, ends)
        return cls(Grammars(tokenizer, width, ends), table, ends)

    def walk(
        self, outputs: StructuredOutputsParams, rng: random.Random, *, max_tokens: int = 600
    ) -> str | None:
        """The text of an output; None if it was not whole after so many tokens.

        After a while it takes what closes strings and brackets where it may.
        """
        grammar = self.grammars.start(outputs)
        text: list[bytes] = []
        for step in range(max_tokens):
            token_id = self._choose(allowed(grammar), rng, hurry=step > 40)
            assert grammar.failure is None, grammar.failure
            grammar.advance(token_id)
            assert grammar.failure is None, grammar.failure
            if token_id in self.ends:
                return b"".join(text).decode()
            text.append(self.table[token_id])
            if grammar.is_complete:
                return b"".join(text).decode()
        return None

    def _choose(self, token_ids: Sequence[int], rng: random.Random, *, hurry: bool) -> int:
        ends = [i for i in token_ids if i in self.ends]
        if ends and (hurry or rng.random() < 0.5):
            return rng.choice(ends)
        closing = [i for i in token_ids if self.table[i] in _CLOSING]
        return rng.choice(closing if hurry and closing else token_ids)


def allowed(grammar: TokenGrammar) -> list[int]:
    """The tokens that may be next."""
    bits = np.unpackbits(allowed_bits([grammar])[0].view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()
