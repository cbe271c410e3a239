"""Who owns each sequence, and which outputs count."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...request.outputs import FinishReason
from ...request.spec import RequestSpec, SequenceKey
from ...request.step_output import StepOutput
from ..messages import Message

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Former:
    """Who had a sequence before, under which epoch, and what it had generated when it let it go."""

    owner: str
    epoch: int
    output_token_ids: Sequence[int]


@dataclass(eq=False)
class Owned:
    """What is recorded of an unfinished sequence.

    Attributes:
        owner, epoch: whose outputs count, and what they must say; None for nobody's.
        output_token_ids: those that have come.
        former: whose last outputs count, too, however late, until its tokens are all here.
        early: outputs of the owner that wait for those.
        told: what its engine was told while it moved, for the next owner, too.
        has_ended: nobody wants more of it.
        is_aborted: it ends with that, whoever has it.
    """

    spec: RequestSpec
    index: int
    owner: str | None
    epoch: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    former: Former | None = None
    early: list[StepOutput] = field(default_factory=list)
    told: list[Message] = field(default_factory=list)
    has_ended: bool = False
    is_aborted: bool = False

    @property
    def key(self) -> SequenceKey:
        """Names the sequence."""
        return self.spec.request_id, self.index

    @property
    def num_missing(self) -> int:
        """Tokens that the former owner generated and that have not come."""
        if self.former is None:
            return 0
        return max(0, len(self.former.output_token_ids) - len(self.output_token_ids))


class Outputs:
    """Passes on what owners say of their sequences, each token once and in order.

    An output counts if it tells the owner's epoch; those that the former owner gave before it let
    the sequence go count still, and the new owner's wait for them.
    """

    def __init__(self) -> None:
        self._counting: list[StepOutput] = []

    def take(self) -> list[StepOutput]:
        """What counts and was not taken yet."""
        outputs, self._counting = self._counting, []
        return outputs

    def accept(self, sequence: Owned, output: StepOutput) -> None:
        """Take what an instance said of a sequence."""
        former = sequence.former
        is_missed = former is not None and sequence.num_missing > 0
        if sequence.has_ended:
            return
        if output.epoch == sequence.epoch and sequence.owner is not None:
            if is_missed:
                sequence.early.append(output)
            else:
                self._pass_on(sequence, output)
        elif former is not None and is_missed and output.epoch == former.epoch:
            self._pass_on(sequence, output)
            self._pass_early(sequence)

    def fill_gap(self, sequence: Owned) -> None:
        """The former owner says nothing any more: pass on what it generated, tokens alone."""
        former, num_missing = sequence.former, sequence.num_missing
        sequence.former = None
        if former is not None and num_missing and not sequence.has_ended:
            _log.warning("%d tokens of %s come without more", num_missing, sequence.key)
            self._say(sequence, token_ids=tuple(former.output_token_ids[-num_missing:]))
        self._pass_early(sequence)

    def end_if_aborted(self, sequence: Owned) -> bool:
        """End a sequence that nobody has, if it was to be aborted; False if it was not."""
        if sequence.is_aborted:
            self._say(sequence, finish_reason="abort")
        return sequence.is_aborted

    def _say(
        self,
        sequence: Owned,
        *,
        token_ids: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
    ) -> None:
        output = StepOutput(
            request_id=sequence.spec.request_id,
            index=sequence.index,
            epoch=sequence.epoch,
            token_ids=token_ids,
            finish_reason=finish_reason,
        )
        self._pass_on(sequence, output)

    def _pass_early(self, sequence: Owned) -> None:
        if not sequence.num_missing:
            early, sequence.early = sequence.early, []
            for output in early:
                if not sequence.has_ended:
                    self._pass_on(sequence, output)

    def _pass_on(self, sequence: Owned, output: StepOutput) -> None:
        sequence.output_token_ids += output.token_ids
        sequence.has_ended = output.finish_reason is not None
        self._counting.append(output)
