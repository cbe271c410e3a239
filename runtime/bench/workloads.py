"""Requests to measure with, seeded so that every run has the same."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkItem:
    """A prompt and how many tokens it generates."""

    prompt: tuple[int, ...]
    num_output_tokens: int

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.prompt) + self.num_output_tokens


def ragged(
    count: int,
    *,
    prompt_lens: tuple[int, int],
    output_lens: tuple[int, int],
    vocab_size: int,
    seed: int = 0,
) -> Sequence[WorkItem]:
    """`count` random prompts, lengths uniform within the two bounds, ends included."""
    rng = random.Random(seed)
    return [
        WorkItem(
            tuple(rng.randrange(vocab_size) for _ in range(rng.randint(*prompt_lens))),
            rng.randint(*output_lens),
        )
        for _ in range(count)
    ]
