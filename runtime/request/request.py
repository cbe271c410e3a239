"""One prompt on its way through the engine."""

import enum
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...allocator import Slot
from ...allocator.transfer import Fetch, Lent, Remainder, Segment
from .outputs import Logprob
from .sampling_params import SamplingParams
from .sampling_state import SamplingState
from .spec import RequestSpec, SequenceKey


class RequestState(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # without a slot: new, or preempted
    RUNNING = "running"  # with a slot
    AWAY = "away"  # out of its engine's sight, until it is known whether another has it
    FINISHED = "finished"


@dataclass(eq=False)
class Mending:
    """A request that lost tokens from its middle, or its start, while they are computed again.

    It goes on at the first gap, as a prompt under way does: what it has before (`Request.lent`,
    `slot`, `num_computed`) grows up to what there is behind.

    Attributes:
        behind: what there is behind each gap, in order; one at least.
        room_tokens: the most that its slot has meanwhile.
        num_lost: tokens that were lost.
        short_since_s: since when nobody takes in what its slot has no room for; None if that is
            not so.
    """

    behind: list[Remainder]
    room_tokens: int
    num_lost: int
    short_since_s: float | None = None


class Request:
    """One prompt, its tokens, its state. A prompt with `n` outputs is `n` requests.

    Attributes:
        key: names it among all requests.
        spec: what was asked.
        epoch: of the last move that brought it here, 0 without one; outputs tell it (`StepOutput`).
        leader: the key of the request that computes the same prompt; this one waits and shares
            its slot's beginning.
        token_ids: the prompt's tokens, then the output's.
        num_computed: tokens whose keys and values are in the slot or the segment, or will be when
            the work launched so far is done.
        num_pending: further tokens that were sampled, but are known on the device alone.
        pending_index: of the last of them: its place among those sampled in the same step.
        fetch: its keys and values on their way back, while it has a place among those that run
            and no slot yet.
        segment, lent: its first tokens, if they lie in another cache; those behind them that other
            processes have. The slot has the rest.
        mending: what it has behind tokens that were lost; None if none are missing.
        prompt_logprobs: entries of the prompt's tokens that are known, where they are asked.
        variant: as of `RequestSpec.kv_variant`; adapter, chain: as of `RequestSpec`.
        priority, tenant: as of `RequestSpec`; the priority may change (`SetPriority`).
        num_served: prompt tokens that were computed for it, or found, at one time or another.
        queued_time_s, scheduled_time_s: when it came, and when it first had a slot (`StepOutput`).
        waited_s: from when it came to when it last got a slot.
    """

    def __init__(
        self,
        spec: RequestSpec,
        *,
        max_tokens: int,
        sampling: SamplingState,
        index: int = 0,
        leader: SequenceKey | None = None,
    ) -> None:
        self.key: SequenceKey = (spec.request_id, index)
        self.spec = spec
        self.epoch = 0
        self.params: SamplingParams = spec.params
        self.variant = spec.kv_variant
        self.adapter = spec.adapter
        self.chain = spec.chain
        self.priority = spec.priority
        self.tenant = spec.tenant
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.leader = leader
        self.token_ids = list(spec.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed = 0
        self.num_pending = 0
        self.pending_index = 0
        self.num_cached = 0  # prompt tokens found in a slot at the first admission
        self.num_served = 0
        self.state = RequestState.WAITING
        self.slot: Slot | None = None
        self.fetch: Fetch | None = None
        self.segment: Segment | None = None
        self.lent: list[Lent] = []
        self.mending: Mending | None = None
        self.can_fetch = True  # False once that failed
        self.queued_time_s = time.monotonic()
        self.scheduled_time_s: float | None = None
        self.waited_s = 0.0
        self.prompt_logprobs: list[dict[int, Logprob] | None] = []

    @property
    def was_admitted(self) -> bool:
        """True if it has, or has had, a slot."""
        return self.scheduled_time_s is not None

    @property
    def slot_start(self) -> int:
        """Position of the token that row 0 of its slot is of."""
        if self.lent:
            return self.lent[-1].stop
        return 0 if self.segment is None else self.segment.num_tokens

    @property
    def is_spread(self) -> bool:
        """True if tokens of it may lie elsewhere than in its slot."""
        return self.segment is not None or bool(self.lent) or self.mending is not None

    @property
    def behind(self) -> Sequence[Remainder]:
        """What it has behind gaps (`Mending`)."""
        return () if self.mending is None else self.mending.behind

    @property
    def all_lent(self) -> list[Lent]:
        """All that other processes have of it, in order."""
        return [*self.lent, *(one for stretch in self.behind for one in stretch.lent)]

    @property
    def slots(self) -> list[Slot]:
        """Its slot, and those of what it has behind gaps."""
        every = (self.slot, *(stretch.slot for stretch in self.behind))
        return [slot for slot in every if slot is not None]

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

    def extend_output(self, token_ids: Iterable[int]) -> None:
        """Take over tokens that were generated elsewhere."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            self.sampling.advance(token_id)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to go through the model, up to the next that are there; 1 while decoding."""
        done = self.num_computed
        for stretch in self.behind:
            if done < stretch.start:
                return stretch.start - done
            done = stretch.stop
        return self.num_tokens - done

    @property
    def is_complete(self) -> bool:
        """True if it has all tokens that it may have, once those pending are known."""
        return self.num_output_tokens + self.num_pending >= self.max_tokens

    @property
    def can_run_ahead(self) -> bool:
        """True if its next token can be sampled before the host knows the last."""
        return not self.sampling.looks_back and self.params.logprobs is None

    def ids(self, start: int, stop: int) -> list[int]:
        """Tokens `start … stop`; one that is pending as `-1 - pending_index`."""
        ids = self.token_ids[start:stop]
        if stop > len(self.token_ids):
            ids.append(-1 - self.pending_index)
        return ids

    @property
    def scores_prompt(self) -> bool:
        """True if the prompt's own log probabilities are asked of this request, and not told
        yet."""
        if self.params.prompt_logprobs is None or self.key[1]:
            return False
        return not self.num_output_tokens  # they are told with the first

    @property
    def num_scored(self) -> int:
        """Tokens from the start whose logits are not wanted any more, or never were."""
        num_known = len(self.prompt_logprobs)
        if not self.scores_prompt or num_known == self.num_prompt_tokens:
            return self.num_tokens
        # The first entry is nobody's; each further one came from the logits of the token before.
        return max(0, num_known - 1)

    @property
    def reusable_tokens(self) -> list[int]:
        """The tokens whose keys and values may come from elsewhere.

        At least the last token is always computed: its logits choose the next one. So is every
        prompt token whose own logits are wanted and not there yet.
        """
        return self.token_ids[: min(self.num_tokens - 1, self.num_scored)]

    @property
    def is_finished(self) -> bool:
        """True once no more tokens will come."""
        return self.state is RequestState.FINISHED

    def __repr__(self) -> str:
        return (
            f"Request({self.key[0]}/{self.key[1]}, {self.state.value}, "
            f"{self.num_prompt_tokens}+{self.num_output_tokens} tokens)"
        )


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """`num_tokens` tokens of a request that go through the model in one step.

    What it says is right until the step is launched, which moves the request on.

    Attributes:
        draft: tokens that are guessed to follow, which the step verifies.
    """

    request: Request
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        """Position of the first of them."""
        return self.request.num_computed

    @property
    def samples(self) -> bool:
        """True if the last of them is the last that the request has: it yields a new token."""
        return self.start + self.num_tokens == self.request.num_tokens

    @property
    def num_rows(self) -> int:
        """All tokens that go through the model, guessed ones too."""
        return self.num_tokens + len(self.draft)

    @property
    def stop(self) -> int:
        """Position behind the last of these."""
        return self.start + self.num_rows

    @property
    def ids(self) -> list[int]:
        """These tokens, as of `Request.ids`."""
        return self.request.ids(self.start, self.start + self.num_tokens) + list(self.draft)


@dataclass(frozen=True, slots=True)
class Padding:
    """Where a padded decode may write: a position that is mapped, and that nobody reads yet.

    Attributes:
        slot, write_at: the position.
        token_id: what the padding computes.
    """

    slot: Slot
    write_at: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes through the model in one step.

    Attributes:
        items: at least one token of each; their slots are backed for all of them.
        padding: for a step of decodes alone, if some slot has a position to spare.
    """

    items: tuple[ScheduledRequest, ...]
    padding: Padding | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def can_run_ahead(self) -> bool:
        """True if all of its tokens can be sampled before the host knows those before."""
        return all(item.request.can_run_ahead and not item.draft for item in self.items)
