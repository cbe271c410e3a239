"""What front processes and an engine's process tell each other."""

from typing import Literal

import msgspec

from ..engine.memory.lending import LendingReport
from ..engine.memory.memory_map import MemoryMap
from ..engine.messages import Abort, Add, Finish, Resume, SetPriority
from ..engine.migration.messages import (
    Begin,
    Begun,
    Cancel,
    Cancelled,
    Carried,
    Carry,
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
from ..engine.stats import EngineStats
from ..request.step_output import Failure, StepOutput

Question = Literal[
    "ping",
    "sleep",
    "sleep_weights",
    "wake",
    "trim",
    "limit_memory",
    "weights_changed",
    "memory_map",
    "load_adapter",
    "unload_adapter",
    "lending",
]


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Something to be done between steps; an `Answer` of the same number follows.

    Attributes:
        about: what it is to be done with: an adapter's name, and its folder to load it from; a
            `LendingOrder` in JSON; bytes in digits, or nothing for all that there were.
    """

    number: int
    question: Question
    about: tuple[str, ...] = ()


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What came of an `Ask`: a value, or why not."""

    number: int
    value: int | MemoryMap | None = None
    failure: Failure | None = None


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The engine is ready: what a front end must know of its model, pickled (`Face`)."""

    face: bytes


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What a step brought to this front's requests."""

    outputs: list[StepOutput]


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """What the engine holds and has done.

    Attributes:
        carried_bytes, handed_pages: of sequences that left, copied and as they were, so far.
        is_leaving: the process was told to end, and waits until nothing is left to lose.
        lending: what it has with other engines; None where that is nothing.
    """

    stats: EngineStats
    is_asleep: bool = False
    carried_bytes: int = 0
    handed_pages: int = 0
    is_leaving: bool = False
    lending: LendingReport | None = None


_ToEnd = Begin | Carry | Pause | GoOn | Release | Prepare | Extend | Commit | Cancel
_FromEnd = (
    Begun | Carried | Paused | Ended | WentOn | Released | Ready | Committed | Cancelled | Refused
)
ToEngine = Add | Resume | Finish | Abort | SetPriority | Ask | _ToEnd
FromEngine = Welcome | Outputs | Answer | Pulse | _FromEnd

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
