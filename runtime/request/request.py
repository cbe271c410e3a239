"""One prompt on its way to text."""

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...allocator import Slot
from ..execution.sampler import SamplingState
from ..frontend.detokenizer import IncrementalDetokenizer
from .outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from .sampling_params import SamplingParams


class RequestState(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # without a slot: new, or preempted
    RUNNING = "running"  # with a slot
    FINISHED = "finished"


class Request:
    """One prompt, its tokens, its state. A prompt with `n` outputs is `n` requests.

    Attributes:
        token_ids: the prompt's tokens, then the output's.
        num_computed: tokens whose keys and values are in the slot, or will be when the work
            launched so far is done.
        num_pending: further tokens that were sampled, but are known on the device alone.
        pending_row: of the last of them: its row among those sampled in the same step.
        leader: the request that computes the same prompt; this one waits and shares its rows.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        index: int = 0,
        max_tokens: int,
        sampling: SamplingState,
        detokenizer: IncrementalDetokenizer | None,
        leader: "Request | None" = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.detokenizer = detokenizer
        self.leader = leader
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed = 0
        self.num_pending = 0
        self.pending_row = 0
        self.num_cached = 0  # prompt tokens found in a slot at the first admission
        self.state = RequestState.WAITING
        self.slot: Slot | None = None
        self.was_admitted = False
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, Logprob]] = []
        self.prompt_logprobs: list[dict[int, Logprob] | None] = []
        self.arrival_time_s = time.monotonic()
        self.first_token_time_s: float | None = None
        self.finished_time_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, without those pending."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to go through the model; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def is_complete(self) -> bool:
        """True if it has all tokens that it may have, once those pending are known."""
        return self.num_output_tokens + self.num_pending >= self.max_tokens

    @property
    def can_run_ahead(self) -> bool:
        """True if its next token can be sampled before the host knows the last."""
        return not self.sampling.has_penalties and self.params.logprobs is None

    def ids(self, start: int, stop: int) -> list[int]:
        """Tokens `start … stop`; one that is pending as `-1 - pending_row`."""
        ids = self.token_ids[start:stop]
        if stop > len(self.token_ids):
            ids.append(-1 - self.pending_row)
        return ids

    @property
    def scores_prompt(self) -> bool:
        """True if the prompt's own log probabilities are asked of this request."""
        return self.params.prompt_logprobs is not None and self.leader is None

    @property
    def num_scored(self) -> int:
        """Tokens from the start whose logits are not wanted any more, or never were."""
        num_known = len(self.prompt_logprobs)
        if not self.scores_prompt or num_known == self.num_prompt_tokens:
            return self.num_tokens
        # The first entry is nobody's; each further one came from the logits of the token before.
        return max(0, num_known - 1)

    @property
    def is_finished(self) -> bool:
        """True once no more tokens will come."""
        return self.state is RequestState.FINISHED

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}/{self.index}, {self.state.value}, "
            f"{self.num_prompt_tokens}+{self.num_output_tokens} tokens)"
        )


@dataclass(frozen=True)
class ScheduledRequest:
    """`num_tokens` tokens of a request that go through the model in one step."""

    request: Request
    num_tokens: int

    @property
    def start(self) -> int:
        """Position of the first of them."""
        return self.request.num_computed

    @property
    def samples(self) -> bool:
        """True if the last of them is the last that the request has: it yields a new token."""
        return self.start + self.num_tokens == self.request.num_tokens


def request_output(group: Sequence[Request], prompt: str | None) -> RequestOutput:
    """What the requests of one prompt have come to; `prompt` is its text, if it was one."""
    first = group[0]
    return RequestOutput(
        request_id=first.request_id,
        prompt=prompt,
        prompt_token_ids=tuple(first.token_ids[: first.num_prompt_tokens]),
        prompt_logprobs=(
            tuple(first.prompt_logprobs) if first.params.prompt_logprobs is not None else None
        ),
        outputs=tuple(_completion(request) for request in group),
        finished=all(request.is_finished for request in group),
        num_cached_tokens=first.num_cached,
        metrics=RequestMetrics(
            arrival_time_s=first.arrival_time_s,
            first_token_time_s=first.first_token_time_s,
            finished_time_s=first.finished_time_s,
        ),
    )


def _completion(request: Request) -> CompletionOutput:
    asked = request.params.logprobs is not None
    return CompletionOutput(
        index=request.index,
        text=request.detokenizer.text if request.detokenizer else "",
        token_ids=tuple(request.output_token_ids),
        cumulative_logprob=request.cumulative_logprob if asked else None,
        logprobs=tuple(request.logprobs) if asked else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
