"""What sampling remembers of one sequence."""

from __future__ import annotations

import copy
import hashlib
import math
import secrets
import struct
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .sampling_params import SamplingParams
from .token_bars import TokenBars
from .token_grammar import TokenGrammar


class SamplingState:
    """What sampling remembers of one sequence: its parameters, its history and its step.

    It belongs to the sequence, not to its place in a batch: keep it through a preemption, and
    the recomputed sequence goes on with exactly the tokens it would have had.
    """

    __slots__ = (
        "_in_prompt",
        "_output_counts",
        "_prompt_token_ids",
        "_seed",
        "_stop_ids",
        "_uncounted",
        "bars",
        "grammar",
        "index",
        "num_output_tokens",
        "params",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        *,
        index: int = 0,
        eos_token_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        grammar: TokenGrammar | None = None,
        seed: int | None = None,
    ) -> None:
        """Start a sequence: number `index` of the request's `n`, after `prompt_token_ids`.

        `eos_token_ids` are the model's own stop tokens, which `min_tokens` holds off. `bad_words`
        are sequences of tokens that must not be completed. `grammar` is this sequence's own. `seed`
        is for a request that asks for none; None to draw one.

        One that goes on from tokens of its own is brought there by `advance`, token by token.
        """
        self.params = params
        self.index = index
        self.num_output_tokens = 0
        self.bars = TokenBars.of(params.allowed_token_ids, bad_words)
        self.grammar = grammar
        self._prompt_token_ids = prompt_token_ids
        self._stop_ids = params.stop_ids.union(eos_token_ids)
        given = seed if params.seed is None else params.seed
        self.seed = secrets.randbits(63) if given is None else given
        self._seed = struct.pack("<qQ", self.seed, index)
        # [vocab] each, on the logits' device; made on first use, by the penalties alone.
        self._in_prompt: Tensor | None = None
        self._output_counts: Tensor | None = None
        self._uncounted: list[int] = []  # tokens that came before these were made

    def fork(self, params: SamplingParams) -> SamplingState:
        """Another that stands where this one does and goes its own way, with the same randomness.

        `params` are to ask for the same tokens; they may ask for no log probabilities.
        """
        twin = copy.copy(self)
        twin.params = params
        twin.bars = None if self.bars is None else self.bars.fork()
        twin.grammar = None if self.grammar is None else self.grammar.fork()
        twin._uncounted = list(self._uncounted)
        if self._output_counts is not None:
            twin._output_counts = self._output_counts.clone()
        return twin

    def key(self) -> int:
        """This step's 64 random bits, as an int64: the same for the same seed, index and step."""
        step = struct.pack("<Q", self.num_output_tokens)
        digest = hashlib.blake2b(self._seed + step, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    @property
    def looks_back(self) -> bool:
        """True if the next token's choice depends on those before it, beside the logits."""
        if self.has_penalties or self.grammar is not None:
            return True
        return self.bars is not None and self.bars.looks_back

    @property
    def is_complete(self) -> bool:
        """True once the output is whole and nothing can follow."""
        return self.grammar is not None and self.grammar.is_complete

    def may_stop_at(self, token_id: int) -> bool:
        """True for a stop token, with which the output ends unless it is too short."""
        return token_id in self._stop_ids

    @property
    def failure(self) -> str | None:
        """Why no token can be chosen any more, if this knows it."""
        return None if self.grammar is None else self.grammar.failure

    def addends(self) -> list[tuple[int, float]]:
        """What to add to which token's logit at this step: the bias, and -inf for a barred stop."""
        addends = list(self.params.logit_bias.items()) if self.params.logit_bias else []
        if self.num_output_tokens < self.params.min_tokens:
            addends += [(token_id, -math.inf) for token_id in self._stop_ids]
        return addends

    def history(self, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which tokens the prompt holds (bool) and how often each was generated (float32).

        Both are [vocab_size], on `device`.
        """
        if self._in_prompt is None or self._output_counts is None:
            with torch.inference_mode(False):  # or they could not be changed outside of it
                # Of more embeddings than logits, some tokens never come.
                known = [token for token in self._prompt_token_ids if token < vocab_size]
                prompt = torch.tensor(known, dtype=torch.long, device=device)
                self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
                self._in_prompt[prompt] = True
                before = torch.tensor(self._uncounted, dtype=torch.long)
                counts = torch.bincount(before, minlength=vocab_size)
                self._output_counts = counts.to(device, torch.float32)
                self._uncounted.clear()
        return self._in_prompt, self._output_counts

    def advance(self, token_id: int) -> None:
        """Record the step's token."""
        self.num_output_tokens += 1
        if self.bars is not None:
            self.bars.advance(token_id)
        if self.grammar is not None:
            self.grammar.advance(token_id)
        if self._output_counts is not None:
            self._output_counts[token_id] += 1
        elif self.has_penalties:
            self._uncounted.append(token_id)
