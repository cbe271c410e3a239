"""How long a step takes, as a function of what is in it."""

import math

import msgspec

from ....vmem.errors import InvalidConfig


class StepWork(msgspec.Struct, frozen=True, gc=False):
    """What a step computes.

    Attributes:
        prompt_tokens: of prompts and parts of them.
        prompt_pairs: of a prompt token and one that it attends to, itself included.
        num_decodes: requests that get a token without a prompt's.
        context_tokens: tokens that those attend to, theirs included.
        loans_s: what it takes besides, as tokens lie at creditors, or debtors' here.
    """

    prompt_tokens: int = 0
    prompt_pairs: float = 0.0
    num_decodes: int = 0
    context_tokens: int = 0
    loans_s: float = 0.0


def pairs(start: int, num_tokens: int) -> float:
    """Of tokens `start … start + num_tokens` of a prompt, with all before them and themselves."""
    return num_tokens * start + num_tokens * (num_tokens + 1) / 2


class PromptCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step with prompts: of the step, a token, and a pair that attends."""

    step_s: float
    token_s: float
    pair_s: float = 0.0


class DecodeCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step that decodes: of the step, a request, and a token that it attends to.

    Attributes:
        least: requests from which on this holds; kernels change with the size of a batch.
    """

    step_s: float
    request_s: float
    context_s: float = 0.0
    least: int = 1


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """What steps of an instance take.

    A step with prompts and decodes pays a prompt step and what each decode adds to it: weights are
    read once.

    Attributes:
        prompt: of prompts.
        decode: by number of decoding requests, the fewest first.
        host_s, host_token_s: of every step, and of each token of its requests, on the host, before
            the first stage.
        stages: of a pipeline, each with an equal part of the layers. A step passes them one after
            the other, and as many steps are under way.
        hop_s, hop_token_s: from one stage to the next, a step and a token.
    """

    prompt: PromptCost
    decode: tuple[DecodeCost, ...]
    host_s: float = 0.0
    host_token_s: float = 0.0
    stages: int = 1
    hop_s: float = 0.0
    hop_token_s: float = 0.0

    def __post_init__(self) -> None:
        leasts = [piece.least for piece in self.decode]
        if not leasts or leasts[0] > 1 or leasts != sorted(set(leasts)):
            raise InvalidConfig(f"decode costs begin at {leasts}; use 1 first, then larger numbers")
        if self.stages < 1:
            raise InvalidConfig(f"stages is {self.stages}; a pipeline has at least one")

    def in_stages(self, stages: int, *, hop_s: float, hop_token_s: float) -> "StepCost":
        """The same over a pipeline of so many stages."""
        return msgspec.structs.replace(self, stages=stages, hop_s=hop_s, hop_token_s=hop_token_s)

    def stage_times(self, work: StepWork) -> tuple[float, float]:
        """Seconds that a step keeps the first stage busy, and each of the others."""
        if work.prompt_tokens:
            of = self.prompt
            total = of.step_s + of.token_s * work.prompt_tokens + of.pair_s * work.prompt_pairs
        else:
            total = self._piece(work.num_decodes).step_s
        if work.num_decodes:
            piece = self._piece(work.num_decodes)
            total += piece.request_s * work.num_decodes + piece.context_s * work.context_tokens
        total += work.loans_s
        host_s = self.host_s + self.host_token_s * (work.prompt_tokens + work.context_tokens)
        if self.stages == 1:
            return total + host_s, 0.0
        num_tokens = work.prompt_tokens + work.num_decodes
        stage_s = total / self.stages + self.hop_s + self.hop_token_s * num_tokens
        return stage_s + host_s, stage_s

    def step_s(self, work: StepWork) -> float:
        """Seconds of a step through all stages, alone."""
        first_s, other_s = self.stage_times(work)
        return first_s + (self.stages - 1) * other_s

    def decode_run(self, work: StepWork) -> "DecodeRun":
        """Decode steps of the same requests, one after the other, of which `work` is the first."""
        grown = work.context_tokens + work.num_decodes
        later = msgspec.structs.replace(work, context_tokens=grown)
        first_s = self.step_s(work)
        return DecodeRun(first_s, self.step_s(later) - first_s)

    def _piece(self, num_decodes: int) -> DecodeCost:
        found = self.decode[0]
        for piece in self.decode[1:]:
            if num_decodes < piece.least:
                break
            found = piece
        return found


class DecodeRun(msgspec.Struct, frozen=True, gc=False):
    """Steps of which each takes `more_s` longer than the one before, as contexts grow."""

    first_s: float
    more_s: float

    def time_s(self, num_steps: int) -> float:
        """Of the first so many, together."""
        return num_steps * self.first_s + self.more_s * (num_steps * (num_steps - 1) / 2)

    def num_done(self, elapsed_s: float, most: int) -> int:
        """Steps, `most` at most, that are over after so long."""
        if elapsed_s >= self.time_s(most):
            return most
        if elapsed_s <= 0 or self.first_s <= 0:
            return 0
        if self.more_s <= 0:
            count = int(elapsed_s / self.first_s)
        else:
            b = self.first_s - self.more_s / 2  # more/2 n² + b n = elapsed
            count = int((math.sqrt(b * b + 2 * self.more_s * elapsed_s) - b) / self.more_s)
        count = min(max(count, 0), most)
        while count < most and self.time_s(count + 1) <= elapsed_s:  # what rounding took
            count += 1
        while count and self.time_s(count) > elapsed_s:
            count -= 1
        return count


class TransferCost(msgspec.Struct, frozen=True, kw_only=True):
    """What moving keys and values takes, the term that DistServe's own simulator lacks.

    Attributes:
        latency_s: of the handshake, once for the copy and once for the switch.
        bytes_per_s: None where pages change hands and nothing is copied.
        token_bytes: keys and values of a token, over all layers.
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    token_bytes: int = 0

    def __post_init__(self) -> None:
        if self.latency_s < 0 or (self.bytes_per_s is not None and self.bytes_per_s <= 0):
            raise InvalidConfig(
                f"latency_s {self.latency_s} and bytes_per_s {self.bytes_per_s}: use a time from 0 "
                "on, and a positive rate, or None for pages that change hands"
            )

    def time_s(self, num_tokens: int) -> float:
        """Until so many tokens' keys and values are there."""
        if self.bytes_per_s is None:
            return self.latency_s
        return self.latency_s + num_tokens * self.token_bytes / self.bytes_per_s

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes that are copied for so many tokens."""
        return 0 if self.bytes_per_s is None else num_tokens * self.token_bytes


class LoanCost(msgspec.Struct, frozen=True, kw_only=True):
    """What tokens that lie at creditors add to the steps of their owner, beside attending to them.

    Attributes:
        step_s: of any step that asks creditors.
        holder_s: of each that is asked, all layers together.
        byte_s: of a byte of queries and results.
        query_bytes: queries and results of a token and a segment that it attends to, all layers
            together.
        move_bytes_per_s: keys and values that move there, once; the owner's steps wait for it.
    """

    step_s: float = 0.0
    holder_s: float = 0.0
    byte_s: float = 0.0
    query_bytes: float = 0.0
    move_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        least = min(self.step_s, self.holder_s, self.byte_s, self.query_bytes)
        if least < 0 or self.move_bytes_per_s <= 0:
            raise InvalidConfig(f"{self}: costs are not negative, and rates are above 0")

    def asking_s(self, num_holders: int, num_queries: int) -> float:
        """Of a step that asks so many creditors, with so many tokens times their segments."""
        if not num_holders:
            return 0.0
        num_bytes = self.query_bytes * num_queries
        return self.step_s + self.holder_s * num_holders + self.byte_s * num_bytes
