"""Who owns each sequence: the one place where a migration is decided. It lives in the front end.

The owner is what is recorded here, with an epoch that outputs must tell; whatever another engine
says is dropped. The record changes in one assignment, when a source has said that all of a sequence
is over there and that it runs no more (`Handshake`).
"""

import itertools
import secrets
import time
from collections.abc import Callable, Iterable

import msgspec

from ....vmem.errors import InvalidOperation
from ...request.continuation import Continuation
from ...request.spec import RequestSpec, SequenceKey
from ...request.step_output import StepOutput
from ..messages import Abort, Add, Finish, Message, Resume, SetPriority
from .handshake import Handshake, Stages
from .messages import Answer, Command
from .ownership import Former, Outputs, Owned

_REPEAT_S = 0.1  # between two times that a command is told
_GIVE_UP_S = 30.0  # for a migration to come to its commit point


class MigrationCounts(msgspec.Struct, frozen=True):
    """Migrations so far, by outcome.

    Attributes:
        moved, stayed, lost: they went on at the target; at the source; at neither.
        orphaned: sequences that nobody had any more, those that were lost on the way, and those
            that were taken away, included.
    """

    moved: int = 0
    stayed: int = 0
    lost: int = 0
    orphaned: int = 0


class Arbiter:
    """Records who owns what, moves it, and passes on what owners say. For one thread at a time.

    What is to be sent is `take`n, by instance, and must be sent often: commands are repeated until
    they are answered. Requests and what is told of them must reach an instance in order, and before
    commands that were taken later; its outputs must come in order, and before answers that it gave
    later. Only what can do no more harm may be declared dead: kill it first.

    One class, since the record, and all that may change it, are in one place.

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
        self._sequences: dict[SequenceKey, Owned] = {}
        self._handshakes: dict[SequenceKey, Handshake] = {}
        self._begun_s: dict[SequenceKey, float] = {}
        self._told: dict[SequenceKey, tuple[object, float]] = {}  # in which phase, and when
        self._outbox: list[tuple[str, Message | Command]] = []
        self._orphans: list[Continuation] = []
        self._outputs = Outputs()
        self._counts = {"moved": 0, "stayed": 0, "lost": 0, "orphaned": 0}

    # -- requests ----------------------------------------------------------------------------

    def add(self, spec: RequestSpec, instance: str) -> None:
        """A new request, for an instance. Its outputs are drawn from a seed that is known here."""
        if spec.params.seed is None and spec.seed is None:
            spec = msgspec.structs.replace(spec, seed=secrets.randbits(63))
        for index in range(spec.params.n):
            self._sequences[spec.request_id, index] = Owned(spec, index, instance, 0)
        self._outbox.append((instance, Add(spec)))

    def resume(self, continuation: Continuation, instance: str) -> None:
        """A sequence that nobody has (`take_orphans`) goes on at an instance, computed again."""
        sequence = self._sequences.get(continuation.key)
        if sequence is None or sequence.has_ended:
            return
        if self._outputs.end_if_aborted(sequence):
            self._forget_if_over(sequence)
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
                self._forget_if_over(sequence)
        self._outbox += [(instance, message) for instance in instances]

    @property
    def has_some(self) -> bool:
        """True while a sequence is unfinished."""
        return bool(self._sequences)

    @property
    def unfinished(self) -> list[Owned]:
        """What is recorded of each sequence that has not ended, in the order in which they came."""
        return [sequence for sequence in self._sequences.values() if not sequence.has_ended]

    def owner(self, key: SequenceKey) -> str | None:
        """The instance that a sequence is on; None if it is on none, or is not unfinished."""
        sequence = self._sequences.get(key)
        return None if sequence is None else sequence.owner

    def sequences_of(self, instance: str) -> list[SequenceKey]:
        """The unfinished sequences that an instance owns."""
        return [key for key, sequence in self._sequences.items() if sequence.owner == instance]

    def involves(self, instance: str) -> bool:
        """Whether an instance has a sequence, or takes part in a migration that is not over."""
        moving = (name for move in self._handshakes.values() for name in (move.source, move.target))
        return instance in moving or bool(self.sequences_of(instance))

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

    @property
    def num_moving(self) -> int:
        """Migrations under way."""
        return len(self._handshakes)

    @property
    def under_way(self) -> list[Handshake]:
        """Migrations that are not over."""
        return list(self._handshakes.values())

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
                self._outputs.fill_gap(sequence)
        for key, handshake in list(self._handshakes.items()):
            handshake.died(instance, has_ended=self._sequences[key].has_ended)
            self._record(handshake)
        for key, sequence in list(self._sequences.items()):
            if sequence.owner == instance and key not in self._handshakes:
                self._orphan(sequence)
        self._outbox = [item for item in self._outbox if item[0] != instance]

    def take_away(self, key: SequenceKey) -> None:
        """Have an instance let go of a sequence, which is to be resumed elsewhere
        (`take_orphans`), computed again. Without effect on one that is on its way, or has ended.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.owner is None or sequence.has_ended:
            return
        if key not in self._handshakes:
            self._outbox.append((sequence.owner, Finish(*key)))
            self._orphan(sequence)

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
            phase, told_s = self._told.get(key, (None, 0.0))
            is_new = phase != handshake.phase
            if is_new or now_s - told_s >= self._repeat_s:
                self._told[key] = handshake.phase, now_s
                self._outbox += handshake.commands()
                self._outbox += [] if is_new else handshake.reminders()
        outbox, self._outbox = self._outbox, []
        return outbox

    # -- outputs -----------------------------------------------------------------------------

    def accept(self, outputs: Iterable[StepOutput] = ()) -> list[StepOutput]:
        """Of what an instance said, that which counts; and what counts now for other reasons."""
        for output in outputs:
            sequence = self._sequences.get((output.request_id, output.index))
            if sequence is not None:
                self._outputs.accept(sequence, output)
                if sequence.has_ended:
                    self._forget_if_over(sequence)
        return self._outputs.take()

    # -- the record --------------------------------------------------------------------------

    def _record(self, handshake: Handshake) -> None:
        """Take over what a handshake has come to."""
        sequence = self._sequences[handshake.key]
        if handshake.is_committed and sequence.epoch != handshake.epoch:
            assert handshake.continuation is not None
            sequence.former = Former(
                handshake.source, sequence.epoch, handshake.continuation.output_token_ids
            )
            sequence.owner, sequence.epoch = handshake.target, handshake.epoch
        went_back = handshake.was_committed and not handshake.is_committed
        if went_back and handshake.owner_epoch is None:
            self._outputs.fill_gap(sequence)
            sequence.owner, sequence.epoch = handshake.source, next(self._epochs)
            handshake.owner_epoch = sequence.epoch
            handshake.output_token_ids = tuple(sequence.output_token_ids)
        if handshake.is_done:
            self._conclude(sequence, handshake)

    def _conclude(self, sequence: Owned, handshake: Handshake) -> None:
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
        self._forget_if_over(sequence)

    def _orphan(self, sequence: Owned) -> None:
        """Nobody has a sequence: offer it, or end it if nobody wants it any more."""
        sequence.owner = None
        self._outputs.fill_gap(sequence)
        if not sequence.has_ended and not self._outputs.end_if_aborted(sequence):
            sequence.epoch = next(self._epochs)
            self._counts["orphaned"] += 1
            self._orphans.append(
                Continuation(
                    spec=sequence.spec,
                    index=sequence.index,
                    epoch=sequence.epoch,
                    output_token_ids=tuple(sequence.output_token_ids),
                    age_s=max(0.0, time.monotonic() - sequence.spec.arrival_time_s),
                )
            )
        self._forget_if_over(sequence)

    def _tell_again(self, sequence: Owned) -> None:
        told, sequence.told = sequence.told, []
        assert sequence.owner is not None
        self._outbox += [(sequence.owner, message) for message in told]

    def _forget_if_over(self, sequence: Owned) -> None:
        if sequence.has_ended and sequence.key not in self._handshakes:
            self._sequences.pop(sequence.key, None)
