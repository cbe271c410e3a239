"""A step that was launched, and its tokens when they come."""

from collections.abc import Sequence

import torch

from ..request.request import Request
from .sampler import SampledToken


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
