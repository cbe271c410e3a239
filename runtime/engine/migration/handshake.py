"""One migration, as an arbiter sees it: a state, what is to be told in it, and what answers change.

    state       told, until it is answered    answer           next
    ─────────   ───────────────────────────   ──────────────   ─────────────────────────────────────
    BEGINNING   source: Begin                 Begun            PREPARING
    PREPARING   target: Prepare               Ready            COPYING, or PAUSING if little is left
                                                               or the pages themselves are to go
    COPYING     source: Carry                 Carried          COPYING, EXTENDING or PAUSING
    EXTENDING   target: Extend                Ready            COPYING or PAUSING
    PAUSING     source: Pause                 Paused           COMMITTING ◀── the commit point
                                              Carried          EXTENDING: it has grown too long
    COMMITTING  target: Commit                Committed        RELEASING
    RELEASING   source: Release               Released         DONE, moved
    RETURNING   source: GoOn                  WentOn           DONE, stayed; or lost
                target: Cancel                Cancelled        (both are waited for)

    Before the commit point the source is the owner: whatever goes wrong (`Ended`, `Refused`, a
    death, no answer in time) leads to RETURNING. From it on the target is, and only its refusal or
    its death lead there: then the sequence goes back to the source under a later epoch, with what
    tokens came. The source's death stops nothing from then on. `lost` is a sequence that neither
    has: it is computed again from its tokens, wherever its front end wants.

Source: Llumnix, arXiv:2406.03243, section 4.2, for the stages; its handshake has no commit point.
"""

import enum
from dataclasses import dataclass
from typing import Literal

from ...request.continuation import Continuation
from ...request.spec import SequenceKey
from .messages import (
    Answer,
    Begin,
    Begun,
    Cancel,
    Cancelled,
    Carried,
    Carry,
    Command,
    Commit,
    Committed,
    Ended,
    Extend,
    GoOn,
    Pause,
    Paused,
    Prepare,
    Ready,
    Refused,
    Release,
    Released,
    WentOn,
)

Outcome = Literal["moved", "stayed", "lost"]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """How a migration copies.

    Attributes:
        most: copies while decoding goes on, before the last one; 0 to carry all at the end, as
            where pages change hands.
        small_tokens: so few are left for the last one at once.
        spare_tokens: that the target has room for beyond those that are computed.
        lease_s: how long either end waits for the arbiter; None for ever.
    """

    most: int = 2
    small_tokens: int = 16
    spare_tokens: int = 64
    lease_s: float | None = 10.0


class HandshakeState(enum.Enum):
    """Where a migration is; see the table above."""

    BEGINNING = "beginning"
    PREPARING = "preparing"
    COPYING = "copying"
    EXTENDING = "extending"
    PAUSING = "pausing"
    COMMITTING = "committing"
    RELEASING = "releasing"
    RETURNING = "returning"
    DONE = "done"


_S = HandshakeState


class Handshake:
    """One migration of one sequence. Pure: it neither sends, nor waits, nor looks at a clock.

    Attributes:
        key, epoch: name it.
        source, target: the instances.
        state: where it is.
        outcome: once it is done.
        why: it did not move.
        continuation: as the source let it go; None before the commit point.
        owner_epoch, output_token_ids: for a sequence that goes back after the commit point; the
            arbiter's to set.
    """

    def __init__(
        self, key: SequenceKey, epoch: int, source: str, target: str, stages: Stages
    ) -> None:
        self.key = key
        self.epoch = epoch
        self.source = source
        self.target = target
        self.state = _S.BEGINNING
        self.outcome: Outcome | None = None
        self.why = ""
        self.continuation: Continuation | None = None
        self.owner_epoch: int | None = None
        self.output_token_ids: tuple[int, ...] = ()
        self._stages = stages
        self._begun: Begun | None = None
        self._paused: Paused | None = None
        self._address = b""
        self._num_room = self._num_carried = self._num_ready = 0
        self._stage = 0  # of the last Carry or Pause
        self._by_pages = False  # all at the end, and nothing is copied
        self._dead: set[str] = set()
        self._unanswered: set[str] = set()  # instances, while RETURNING
        self._is_lost = False  # neither has it

    @property
    def is_done(self) -> bool:
        """True once nothing is to be told any more."""
        return self.state is _S.DONE

    @property
    def is_committed(self) -> bool:
        """True from the commit point on, as long as the target has not failed."""
        return self.state in (_S.COMMITTING, _S.RELEASING) or self.outcome == "moved"

    @property
    def was_committed(self) -> bool:
        """True from the commit point on, for ever."""
        return self._paused is not None

    @property
    def phase(self) -> object:
        """Equal as long as the same is to be told."""
        return self.state, self._stage, self._num_ready, len(self._unanswered)

    # -- what is told --------------------------------------------------------------------------

    def commands(self) -> list[tuple[str, Command]]:
        """What is to be told to whom, again and again until the state is another one."""
        move, lease_s = (self.key, self.epoch), self._stages.lease_s
        state = self.state
        if state is _S.BEGINNING:
            return [(self.source, Begin(*move, lease_s))]
        if state is _S.PREPARING:
            return [(self.target, self._prepare())]
        if state is _S.COPYING:
            span = self._num_carried, self._num_ready
            return [(self.source, Carry(*move, self._stage, self._address, *span))]
        if state is _S.EXTENDING:
            return [(self.target, Extend(*move, self._wanted_room()))]
        if state is _S.PAUSING:
            rest = self._address, self._num_carried, self._num_room
            return [(self.source, Pause(*move, self._stage, *rest))]
        if state is _S.COMMITTING:
            paused = self._paused
            assert paused is not None
            what = paused.continuation, paused.num_tokens, paused.model_state
            return [(self.target, Commit(*move, *what))]
        if state is _S.RELEASING:
            return [(self.source, Release(*move))]
        commands: list[tuple[str, Command]] = []
        if self.source in self._unanswered:
            go_on = GoOn(*move, self.owner_epoch, self.output_token_ids)
            commands.append((self.source, go_on))
        if self.target in self._unanswered:
            commands.append((self.target, Cancel(*move)))
        return commands

    def reminders(self) -> list[tuple[str, Command]]:
        """What to tell, now and then, the end that has nothing to do: that the migration lives."""
        move, state = (self.key, self.epoch), self.state
        if state in (_S.PREPARING, _S.EXTENDING):
            return [(self.source, Begin(*move, self._stages.lease_s))]
        if state in (_S.COPYING, _S.PAUSING) and self._num_room:
            return [(self.target, Extend(*move, self._num_room))]
        if state is _S.COMMITTING and self.source not in self._dead:
            rest = self._address, self._num_carried, self._num_room
            return [(self.source, Pause(*move, self._stage, *rest))]
        return []

    def _prepare(self) -> Prepare:
        begun = self._begun
        assert begun is not None
        return Prepare(
            self.key,
            self.epoch,
            begun.continuation,
            begun.num_ready,
            self._wanted_room(),
            begun.token_format,
            begun.page_format,
            self._stages.lease_s,
            begun.model,
        )

    def _wanted_room(self) -> int:
        return self._num_ready + self._stages.spare_tokens if self._num_ready else 0

    # -- what changes it -----------------------------------------------------------------------

    def on(self, answer: Answer) -> None:
        """Take an answer; one that is late or comes twice changes nothing."""
        if (answer.key, answer.epoch) != (self.key, self.epoch):
            return
        if isinstance(answer, Ended):
            if self.state in _BEFORE_COMMIT:
                self._return(answer.why)
        elif isinstance(answer, Refused):
            if self.state in _REFUSED_IN[answer.what]:
                self._return(answer.why)
        elif isinstance(answer, WentOn):
            self._has_answered(self.source, is_lost=not answer.is_here)
        elif isinstance(answer, Cancelled):
            self._has_answered(self.target)
        elif isinstance(answer, Begun):
            if self.state is _S.BEGINNING:
                self._begun, self._num_ready = answer, answer.num_ready
                self.state = _S.PREPARING
        elif isinstance(answer, Ready):
            self._on_ready(answer)
        elif isinstance(answer, Carried):
            self._on_carried(answer)
        elif isinstance(answer, Paused):
            if self.state is _S.PAUSING:
                self._paused, self.continuation = answer, answer.continuation
                self.state = _S.COMMITTING
        elif isinstance(answer, Committed):
            if self.state is _S.COMMITTING:
                self._release()
        else:
            assert isinstance(answer, Released), answer
            if self.state is _S.RELEASING:
                self._finish("moved")

    def died(self, instance: str, *, has_ended: bool = False) -> None:
        """An instance is gone for good. `has_ended`: all outputs of the sequence have come."""
        if instance not in (self.source, self.target) or self.is_done:
            return
        self._dead.add(instance)
        if self.state is _S.RETURNING:
            self._is_lost = self._is_lost or instance == self.source
            self._has_answered(instance)
        elif instance == self.source:
            if self.state is _S.RELEASING:
                self._finish("moved")
            elif self.state is not _S.COMMITTING:
                self._return("the source has died")
        elif self.state is _S.COMMITTING and has_ended:
            self._release()
        elif not (self.state is _S.RELEASING and has_ended):
            self._return("the target has died")

    def give_up(self, why: str) -> None:
        """End it, if the commit point has not come."""
        if self.state in _BEFORE_COMMIT:
            self._return(why)

    def _on_ready(self, answer: Ready) -> None:
        if self.state is _S.PREPARING:
            self._num_carried = min(answer.num_held, self._num_ready)
            self._by_pages = answer.by_pages
        elif self.state is not _S.EXTENDING or answer.num_room < self._wanted_room():
            return
        self._address, self._num_room = answer.address, answer.num_room
        self._next_stage()

    def _on_carried(self, answer: Carried) -> None:
        if answer.stage != self._stage:
            return
        if self.state is _S.COPYING:
            self._num_carried = self._num_ready
        elif self.state is not _S.PAUSING:
            return
        self._num_ready = max(self._num_ready, answer.num_ready)
        is_short = self._num_room < self._num_ready + self._stages.spare_tokens // 4
        if self.state is _S.PAUSING or (self._num_room and is_short):
            self.state = _S.EXTENDING
        else:
            self._next_stage()

    def _next_stage(self) -> None:
        left = self._num_ready - self._num_carried
        is_much = left > self._stages.small_tokens and not self._by_pages
        may_copy = self._stage < self._stages.most and is_much
        self._stage += 1
        self.state = _S.COPYING if may_copy else _S.PAUSING

    def _release(self) -> None:
        self.state = _S.RELEASING
        if self.source in self._dead:
            self._finish("moved")

    def _return(self, why: str) -> None:
        self.why = self.why or why
        self.state = _S.RETURNING
        self._unanswered = {self.source, self.target} - self._dead
        self._is_lost = self.source in self._dead
        self._end_return()

    def _has_answered(self, instance: str, *, is_lost: bool = False) -> None:
        if self.state is not _S.RETURNING or instance not in self._unanswered:
            return
        self._unanswered.discard(instance)
        self._is_lost = self._is_lost or is_lost
        self._end_return()

    def _end_return(self) -> None:
        if not self._unanswered:
            self._finish("lost" if self._is_lost else "stayed")

    def _finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.state = _S.DONE


_BEFORE_COMMIT = frozenset((_S.BEGINNING, _S.PREPARING, _S.COPYING, _S.EXTENDING, _S.PAUSING))
_REFUSED_IN = {
    "prepare": frozenset((_S.PREPARING,)),
    "extend": frozenset((_S.COPYING, _S.EXTENDING, _S.PAUSING)),  # what was kept is gone
    "commit": frozenset((_S.COMMITTING,)),
}
