"""A step that was launched, and its tokens when they come; those behind a draft."""

from collections.abc import Sequence

import torch

from ..request.request import Request, ScheduledRequest
from .sampler import SampledToken, sample
from .upload import select_rows


class LaunchedStep:
    """A step under way: the requests that it samples for, and their tokens once it is done.

    Attributes:
        computed: all requests of the step, prompt chunks that do not sample among them.
        requests: those that it samples for.
        tokens: the sampled tokens on the device, int64 [len(requests)]; None if they are known.
    """

    def __init__(
        self,
        computed: Sequence[Request],
        requests: Sequence[Request],
        *,
        sampled: list[list[SampledToken]] | None = None,
        chosen: torch.Tensor | None = None,
    ) -> None:
        self.computed = computed
        self.requests = requests
        self._sampled = sampled
        self._done: torch.cuda.Event | None = None
        self.tokens: torch.Tensor | None = None
        if chosen is not None:
            self.tokens, self._chosen = chosen[0], chosen
            if chosen.is_cuda:  # the copy begins as soon as the step is done
                self._chosen = torch.empty_like(chosen, device="cpu", pin_memory=True)
                self._chosen.copy_(chosen, non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record(torch.cuda.current_stream(chosen.device))

    def wait(self) -> list[list[SampledToken]]:
        """The requests' tokens, once they are there: one each, and one more for each of its draft
        that was right."""
        if self._sampled is None:
            if self._done is not None:
                self._done.synchronize()
            chosen, finite = self._chosen.tolist()
            self._sampled = [
                [SampledToken(token_id, is_finite=bool(is_finite))]
                for token_id, is_finite in zip(chosen, finite, strict=True)
            ]
        return self._sampled

    def num_tokens(self) -> dict[Request, int]:
        """How many tokens each request got, once that is known."""
        return dict(zip(self.requests, map(len, self.wait()), strict=True))


def sample_drafted(
    logits: torch.Tensor, firsts: Sequence[int], items: Sequence[ScheduledRequest]
) -> list[list[SampledToken]]:
    """The tokens of items of which `firsts` are the first rows to sample from: those that would
    have come without a draft, as far as the draft goes with them.

    Each is chosen from its own logits with its own random numbers, by a state that knows those
    before it, and the next row is looked at only if the draft has guessed it.
    """
    sampled: list[list[SampledToken]] = [[] for _ in items]
    going, step = list(range(len(items))), 0
    while going:
        states = [items[i].request.sampling for i in going]
        rows = select_rows(logits, [firsts[i] + step for i in going])
        for i, token in zip(going, sample(rows, states), strict=True):
            sampled[i].append(token)
        going = [i for i in going if _is_guessed(items[i], step, sampled[i][-1])]
        step += 1
    return sampled


def _is_guessed(item: ScheduledRequest, step: int, token: SampledToken) -> bool:
    """Whether what follows a sampled token was computed, and is to be sampled, too."""
    if step >= len(item.draft) or not token.is_finite or item.draft[step] != token.token_id:
        return False
    state = item.request.sampling
    return not state.is_complete and not state.may_stop_at(token.token_id)
