"""What can never run is refused before it is queued."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...vmem.errors import (
    InvalidConfig,
    InvalidPrompt,
    InvalidSamplingParams,
    RequestTooLarge,
    RequestTooLong,
)
from ..request.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a model and a cache can take.

    Attributes:
        vocab_size: token ids are below it.
        max_len: tokens of a slot, prompt and output.
        limit_pages: the most pages that the pool may have.
        longest: tokens of the longest sequence that the pool could hold if it were alone.
        num_pages: pages that a number of tokens of one slot needs.
        takes_priority: requests are scheduled by priority.
    """

    vocab_size: int
    max_len: int
    limit_pages: int
    longest: int
    num_pages: Callable[[int], int]
    takes_priority: bool = False

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Refuse what could never run; returns the most tokens that the request may generate.

        Raises InvalidPrompt, InvalidSamplingParams, RequestTooLong or RequestTooLarge.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidSamplingParams(
                f"the parameters are {type(params).__name__} {params!r}; use SamplingParams(…)"
            )
        params.check_vocab(self.vocab_size)
        self._check_prompt(prompt)
        # The last token is never computed, so it needs no room.
        room = self.max_len - len(prompt)
        if params.max_tokens is None:  # as many as fit, then
            max_tokens = max(1, min(room, self.longest - len(prompt) + 1))
        else:
            max_tokens = min(params.max_tokens, room)
        pages = self.num_pages(len(prompt) + max_tokens - 1)
        if pages > self.limit_pages:
            raise RequestTooLarge(
                f"{len(prompt)} prompt tokens with up to {max_tokens} generated need {pages} "
                f"pages, and the pool has {self.limit_pages}; raise kv_memory or lower max_tokens"
            )
        return max_tokens

    def check_priority(self, priority: int) -> None:
        """Raises InvalidConfig for a priority that nothing here would go by."""
        if priority and not self.takes_priority:
            raise InvalidConfig(
                f"priority is {priority}, and requests are not scheduled by priority here; leave "
                "it out, or start with scheduling_policy='priority'"
            )

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise InvalidPrompt("the prompt has no tokens; give it at least one")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < self.vocab_size:
                raise InvalidPrompt(
                    f"token id {token} in the prompt is not in [0, {self.vocab_size}); was it "
                    "tokenised for another model?"
                )
        if len(prompt) >= self.max_len:
            raise RequestTooLong(
                f"the prompt has {len(prompt)} tokens, and max_len is {self.max_len} with the "
                "output; shorten it or raise max_len"
            )
