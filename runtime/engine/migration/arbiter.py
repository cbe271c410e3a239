"""Who owns each sequence: the one place where a migration is decided. It lives in the front end.

The owner is what is recorded here, with an epoch that outputs must tell; whatever another engine
says is dropped. The record changes in one assignment, when a source has said that all of a sequence
is over there and that it runs no more (`Handshake`).
"""

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from ....vmem.errors import InvalidOperation
from ...request.continuation import Continuation
from ...request.spec import RequestSpec, SequenceKey
from ...request.step_output import StepOutput
from ..messages import Abort, Add, Finish, Message, Resume, SetPriority
from .handshake import Handshake, HandshakeState, Stages
from .messages import Answer, Command

_log = logging.getLogger(__name__)

_REPEAT_S = 0.1  # between two times that a command is told
_GIVE_UP_S = 30.0  # for a migration to come to its commit point


class MigrationCounts(msgspec.Struct, frozen=True):
    """Migrations so far, by outcome."""

    moved: int = 0
    stayed: int = 0
    lost: int = 0


@dataclass(frozen=True)
class _Former:
    """Who had a sequence before, under which epoch, and what it had generated when it let it go."""

    owner: str
    epoch: int
    output_token_ids: Sequence[int]


class _Sequence:
    """What is recorded of an unfinished sequence.

    Attributes:
        owner, epoch: whose outputs count, and what they must say.
        output_token_ids: those that have come.
        former: whose last outputs count, too, however late, until its tokens are all here.
        early: outputs of the owner that wait for those.
        told: what its engine was told while it moved, for the next owner, too.
        has_ended: nobody wants more of it.
        is_aborted: it ends with that, whoever has it.
    """

    def __init__(self, spec: RequestSpec, index: int, owner: str, epoch: int) -> None:
        self.spec = spec
        self.index = index
        self.owner: str | None = owner
        self.epoch = epoch
        self.output_token_ids: list[int] = []
        self.former: _Former | None = None
        self.early: list[StepOutput] = []
        self.told: list[Message] = []
        self.has_ended = False
        self.is_aborted = False

    @property
    def num_missing(self) -> int:
        """Tokens that the former owner generated and that have not come."""
        if self.former is None:
            return 0
        return max(0, len(self.former.output_token_ids) - len(self.output_token_ids))


class Arbiter:
    """Records who owns what, moves it, and passes on what owners say. For one thread at a time.

    What is to be sent is `take`n, by instance, and must be sent often: commands are repeated until
    they are answered. An instance's outputs must come in order, and before answers that it gave
    later. Only what can do no more harm may be declared dead: kill it first.

    Args:
        stages: how migrations copy.
        clock: in seconds.
        repeat_s: between two times that a command is told.
        give_up_s: for a migration to come to its commit point.
    """

    def __init__(
        self,
        *,
        stages: Stages | None = None,
        clock: Callable[[], float] = time.monotonic,
        repeat_s: float = _REPEAT_S,
        give_up_s: float = _GIVE_UP_S,
    ) -> None:
        self._stages = stages or Stages()
        self._clock = clock
        self._repeat_s = repeat_s
        self._give_up_s = give_up_s
        self._epochs = itertools.count(1)
        self._sequences: dict[SequenceKey, _Sequence] = {}
        self._handshakes: dict[SequenceKey, Handshake] = {}
        self._begun_s: dict[SequenceKey, float] = {}
        self._told: dict[SequenceKey, tuple[HandshakeState, int, float]] = {}
        self._outbox: list[tuple[str, Message | Command]] = []
        self._orphans: list[Continuation] = []
        self._outputs: list[StepOutput] = []
        self._counts = {"moved": 0, "stayed": 0, "lost": 0}

    # -- requests ----------------------------------------------------------------------------

    def add(self, spec: RequestSpec, instance: str) -> None:
        """A new request, for an instance. Its outputs are drawn from a seed that is known here."""
        if spec.params.seed is None and spec.seed is None:
            spec = msgspec.structs.replace(spec, seed=secrets.randbits(63))
        for index in range(spec.params.n):
            self._sequences[spec.request_id, index] = _Sequence(spec, index, instance, 0)
        self._outbox.append((instance, Add(spec)))

    def resume(self, continuation: Continuation, instance: str) -> None:
        """A sequence that nobody has (`take_orphans`) goes on at an instance, computed again."""
        sequence = self._sequences.get(continuation.key)
        if sequence is None or sequence.has_ended or self._end_if_aborted(sequence):
            return
        sequence.owner, sequence.epoch = instance, continuation.epoch
        self._outbox.append((instance, Resume(continuation)))
        self._tell_again(sequence)

    def tell(self, message: Finish | Abort | SetPriority) -> None:
        """Tell whoever has, or will have, a request's sequences."""
        instances: dict[str, None] = {}
        for key, sequence in list(self._sequences.items()):
            if key[0] != message.request_id:
                continue
            if isinstance(message, Finish):
                if key[1] != message.index:
                    continue
                sequence.has_ended = True
            elif isinstance(message, Abort):
                sequence.is_aborted = True
            else:
                sequence.spec = msgspec.structs.replace(sequence.spec, priority=message.priority)
            if sequence.owner is not None:
                instances[sequence.owner] = None
            if key in self._handshakes:
                sequence.told.append(message)
            else:
                self._forget_if_over(key)
        self._outbox += [(instance, message) for instance in instances]

    def owner(self, key: SequenceKey) -> str | None:
        """The instance that a sequence is on; None if it is on none, or is not unfinished."""
        sequence = self._sequences.get(key)
        return None if sequence is None else sequence.owner

    def sequences_of(self, instance: str) -> list[SequenceKey]:
        """The unfinished sequences that an instance owns."""
        return [key for key, sequence in self._sequences.items() if sequence.owner == instance]

    # -- migrations ----------------------------------------------------------------------------

    def migrate(self, key: SequenceKey, target: str) -> int:
        """Begin to move a sequence; returns the attempt's epoch.

        Raises InvalidOperation if it is not unfinished, is on its way already, or is there.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.has_ended or sequence.owner is None:
            raise InvalidOperation(
                f"output {key[1]} of request {key[0]!r} is not unfinished anywhere"
            )
        if key in self._handshakes:
            raise InvalidOperation(f"output {key[1]} of request {key[0]!r} is on its way already")
        if sequence.owner == target:
            raise InvalidOperation(f"output {key[1]} of request {key[0]!r} is on {target!r}")
        epoch = next(self._epochs)
        self._handshakes[key] = Handshake(key, epoch, sequence.owner, target, self._stages)
        self._begun_s[key] = self._clock()
        return epoch

    def is_moving(self, key: SequenceKey) -> bool:
        """True while a sequence is on its way."""
        return key in self._handshakes

    @property
    def num_moving(self) -> int:
        """Migrations under way."""
        return len(self._handshakes)

    @property
    def counts(self) -> MigrationCounts:
        """Migrations that are over."""
        return MigrationCounts(**self._counts)

    def handshake(self, key: SequenceKey) -> Handshake | None:
        """The migration of a sequence; None while it is not on its way."""
        return self._handshakes.get(key)

    def on(self, answer: Answer) -> None:
        """Take what an instance answered."""
        handshake = self._handshakes.get(answer.key)
        if handshake is not None:
            handshake.on(answer)
            self._record(handshake)

    def died(self, instance: str) -> None:
        """An instance is gone for good; what it had is to be resumed elsewhere (`take_orphans`)."""
        for sequence in list(self._sequences.values()):
            if sequence.former is not None and sequence.former.owner == instance:
                self._fill_gap(sequence)
        for key, handshake in list(self._handshakes.items()):
            handshake.died(instance, has_ended=self._sequences[key].has_ended)
            self._record(handshake)
        for key, sequence in list(self._sequences.items()):
            if sequence.owner == instance and key not in self._handshakes:
                self._orphan(sequence)
        self._outbox = [item for item in self._outbox if item[0] != instance]

    def take_orphans(self) -> list[Continuation]:
        """Sequences that nobody has, to be resumed; each is given once."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def take(self) -> list[tuple[str, Message | Command]]:
        """What is to be sent now, by instance, in order."""
        now_s = self._clock()
        for key, handshake in list(self._handshakes.items()):
            if now_s - self._begun_s[key] > self._give_up_s:
                handshake.give_up("it took too long")
            commands = handshake.commands()
            what = handshake.state, len(commands)
            *told, told_s = self._told.get(key, (None, 0, 0.0))
            if tuple(told) != what or now_s - told_s >= self._repeat_s:
                self._told[key] = (*what, now_s)
                self._outbox += commands
        outbox, self._outbox = self._outbox, []
        return outbox

    # -- outputs -----------------------------------------------------------------------------

    def accept(self, outputs: Iterable[StepOutput]) -> list[StepOutput]:
        """Of what an instance said, that which counts, and what it held up."""
        for output in outputs:
            key = output.request_id, output.index
            sequence = self._sequences.get(key)
            if sequence is None or sequence.has_ended:
                continue
            former, is_missed = sequence.former, sequence.num_missing > 0
            if output.epoch == sequence.epoch and sequence.owner is not None:
                if is_missed:
                    sequence.early.append(output)
                else:
                    self._pass_on(sequence, output)
            elif former is not None and is_missed and output.epoch == former.epoch:
                self._pass_on(sequence, output)
                self._pass_early(sequence)
            self._forget_if_over(key)
        return self.take_outputs()

    def take_outputs(self) -> list[StepOutput]:
        """What counts and was not returned yet: it came of no instance's output."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _pass_on(self, sequence: _Sequence, output: StepOutput) -> None:
        sequence.output_token_ids += output.token_ids
        sequence.has_ended = output.finish_reason is not None
        self._outputs.append(output)

    def _pass_early(self, sequence: _Sequence) -> None:
        if not sequence.num_missing:
            early, sequence.early = sequence.early, []
            for output in early:
                if not sequence.has_ended:
                    self._pass_on(sequence, output)

    # -- the record --------------------------------------------------------------------------

    def _record(self, handshake: Handshake) -> None:
        """Take over what a handshake has come to."""
        sequence = self._sequences[handshake.key]
        if handshake.is_committed and sequence.epoch != handshake.epoch:
            assert handshake.continuation is not None
            sequence.former = _Former(
                handshake.source, sequence.epoch, handshake.continuation.output_token_ids
            )
            sequence.owner, sequence.epoch = handshake.target, handshake.epoch
        went_back = handshake.was_committed and not handshake.is_committed
        if went_back and handshake.owner_epoch is None:
            self._fill_gap(sequence)
            sequence.owner, sequence.epoch = handshake.source, next(self._epochs)
            handshake.owner_epoch = sequence.epoch
            handshake.output_token_ids = tuple(sequence.output_token_ids)
        if handshake.is_done:
            self._conclude(sequence, handshake)

    def _fill_gap(self, sequence: _Sequence) -> None:
        """Tell what a former owner generated and cannot say any more: tokens alone."""
        former, num_missing = sequence.former, sequence.num_missing
        sequence.former = None
        if former is not None and num_missing and not sequence.has_ended:
            missing = tuple(former.output_token_ids[-num_missing:])
            request_id, index = sequence.spec.request_id, sequence.index
            _log.warning("%d tokens of %s/%d come without more", num_missing, request_id, index)
            output = StepOutput(
                request_id=request_id, index=index, epoch=sequence.epoch, token_ids=missing
            )
            self._pass_on(sequence, output)
        self._pass_early(sequence)

    def _conclude(self, sequence: _Sequence, handshake: Handshake) -> None:
        key = handshake.key
        del self._handshakes[key], self._begun_s[key]
        self._told.pop(key, None)
        outcome = handshake.outcome
        assert outcome is not None
        if outcome == "lost" and sequence.has_ended:
            outcome = "stayed"  # the source does not have it, since it has finished it
        self._counts[outcome] += 1
        if outcome == "lost":
            self._orphan(sequence)
        elif sequence.owner is not None:
            self._tell_again(sequence)
        self._forget_if_over(key)

    def _orphan(self, sequence: _Sequence) -> None:
        """Nobody has a sequence: offer it, or end it if nobody wants it any more."""
        sequence.owner = None
        sequence.early.clear()
        self._fill_gap(sequence)
        if not sequence.has_ended and not self._end_if_aborted(sequence):
            sequence.epoch = next(self._epochs)
            self._orphans.append(
                Continuation(
                    spec=sequence.spec,
                    index=sequence.index,
                    epoch=sequence.epoch,
                    output_token_ids=tuple(sequence.output_token_ids),
                    age_s=max(0.0, time.monotonic() - sequence.spec.arrival_time_s),
                )
            )
        self._forget_if_over((sequence.spec.request_id, sequence.index))

    def _end_if_aborted(self, sequence: _Sequence) -> bool:
        """End a sequence that nobody has, if it was to be aborted."""
        if sequence.is_aborted:
            key = sequence.spec.request_id, sequence.index
            output = StepOutput(request_id=key[0], index=key[1], finish_reason="abort")
            self._pass_on(sequence, output)
            self._forget_if_over(key)
        return sequence.is_aborted

    def _tell_again(self, sequence: _Sequence) -> None:
        told, sequence.told = sequence.told, []
        assert sequence.owner is not None
        self._outbox += [(sequence.owner, message) for message in told]

    def _forget_if_over(self, key: SequenceKey) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None and sequence.has_ended and key not in self._handshakes:
            del self._sequences[key]
