"""What an arbiter tells the two ends of a migration, and what they answer, as plain data.

Each message names a sequence and the epoch of the attempt. An arbiter repeats a command until it is
answered; so every command may come twice or late, and so may every answer.
"""

from typing import Literal

import msgspec

from ...request.continuation import Continuation
from ...request.spec import SequenceKey


class Begin(msgspec.Struct, frozen=True, tag=True):
    """To the source: expose what the sequence has computed. Answered by `Begun`."""

    key: SequenceKey
    epoch: int
    lease_s: float | None = None


class Carry(msgspec.Struct, frozen=True, tag=True):
    """To the source: carry tokens `start … stop` to `address`, while decoding goes on.

    Answered by `Carried` once they are there.
    """

    key: SequenceKey
    epoch: int
    stage: int
    address: bytes
    start: int
    stop: int


class Pause(msgspec.Struct, frozen=True, tag=True):
    """To the source: take the sequence out, and carry what there is from `start` on to `address`.

    Answered by `Paused` once that is there, or, with nothing done, by `Carried` if the target has
    room for fewer tokens than there are (`num_room`).
    """

    key: SequenceKey
    epoch: int
    stage: int
    address: bytes
    start: int
    num_room: int


class GoOn(msgspec.Struct, frozen=True, tag=True):
    """To the source: the sequence is yours. Answered by `WentOn`.

    Attributes:
        owner_epoch: what its outputs say from now on; None for what they said.
        output_token_ids: that are known to have come, from wherever.
    """

    key: SequenceKey
    epoch: int
    owner_epoch: int | None = None
    output_token_ids: tuple[int, ...] = ()


class Release(msgspec.Struct, frozen=True, tag=True):
    """To the source: the target has the sequence. Answered by `Released`."""

    key: SequenceKey
    epoch: int


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """To the target: keep a place, and memory for `num_room` tokens. Answered by `Ready`.

    Attributes:
        continuation: how far the sequence has come by now, with the epoch.
        num_tokens: of its tokens, those that are computed; 0 if there is nothing to carry.
        token_format: of the source's cache; the target's must be equal.
        page_format: likewise; where the target's is equal, pages may change hands.
        model: the fingerprint of the source's; the target's must be equal. Empty where unknown.
    """

    key: SequenceKey
    epoch: int
    continuation: Continuation
    num_tokens: int
    num_room: int
    token_format: str
    page_format: str = ""
    lease_s: float | None = None
    model: str = ""


class Extend(msgspec.Struct, frozen=True, tag=True):
    """To the target: have memory for `num_room` tokens in all. Answered by `Ready`."""

    key: SequenceKey
    epoch: int
    num_room: int


class Commit(msgspec.Struct, frozen=True, tag=True):
    """To the target: the sequence is yours. Answered by `Committed`.

    Attributes:
        num_tokens: of its tokens, those that were carried, in all.
        model_state: what a hybrid remembers of exactly these (`model_state`).
    """

    key: SequenceKey
    epoch: int
    continuation: Continuation
    num_tokens: int
    model_state: bytes | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """To the target: nothing of this epoch is yours. Answered by `Cancelled`."""

    key: SequenceKey
    epoch: int


class Begun(msgspec.Struct, frozen=True, tag=True):
    """The sequence is exposed: `num_ready` tokens could be carried now.

    Attributes:
        token_format, page_format: of its cache; the latter is empty where pages stay.
        model: the fingerprint of the one that computed it; empty where unknown.
    """

    key: SequenceKey
    epoch: int
    continuation: Continuation
    num_ready: int
    token_format: str
    page_format: str = ""
    model: str = ""


class Carried(msgspec.Struct, frozen=True, tag=True):
    """What was asked for in `stage` is over there; `num_ready` tokens are computed by now."""

    key: SequenceKey
    epoch: int
    stage: int
    num_ready: int


class Paused(msgspec.Struct, frozen=True, tag=True):
    """The sequence runs nowhere, and all of it is over there. What it is, as of `Commit`."""

    key: SequenceKey
    epoch: int
    continuation: Continuation
    num_tokens: int
    model_state: bytes | None = None


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The source has ended the attempt by itself: it has the sequence still, or that has
    finished."""

    key: SequenceKey
    epoch: int
    why: str


class WentOn(msgspec.Struct, frozen=True, tag=True):
    """The sequence goes on at the source; not so if it has finished there, or is gone."""

    key: SequenceKey
    epoch: int
    is_here: bool


class Released(msgspec.Struct, frozen=True, tag=True):
    """The source has nothing of the sequence any more."""

    key: SequenceKey
    epoch: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The target has memory for `num_room` tokens at `address`; `num_held` are there already.

    Attributes:
        by_pages: the pages themselves are to come, all at the end.
    """

    key: SequenceKey
    epoch: int
    address: bytes
    num_held: int
    num_room: int
    by_pages: bool = False


class Committed(msgspec.Struct, frozen=True, tag=True):
    """The target has the sequence."""

    key: SequenceKey
    epoch: int


class Cancelled(msgspec.Struct, frozen=True, tag=True):
    """The target has nothing of the epoch, and never will."""

    key: SequenceKey
    epoch: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The target will not do what it was told, under this epoch never."""

    key: SequenceKey
    epoch: int
    what: Literal["prepare", "extend", "commit"]
    why: str


ToSource = Begin | Carry | Pause | GoOn | Release
ToTarget = Prepare | Extend | Commit | Cancel
Command = ToSource | ToTarget
FromSource = Begun | Carried | Paused | Ended | WentOn | Released
FromTarget = Ready | Committed | Cancelled | Refused
Answer = FromSource | FromTarget
