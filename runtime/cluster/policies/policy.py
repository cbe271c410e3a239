"""What a policy of a cluster is, and what it decides."""

from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

from ...request.spec import SequenceKey
from ..snapshot import ClusterSnapshot, Newcomer, Role

Reason = Literal["balance", "drain", "decode"]
"""Why a request moves: loads differ, its instance is to end, or its prompt is computed."""


class Move(msgspec.Struct, frozen=True):
    """A request that goes on elsewhere. One that waits moves without keys and values."""

    key: SequenceKey
    source: int
    target: int
    reason: Reason


class ClusterPolicy(Protocol):
    """Decides for a cluster, from a snapshot alone.

    The same question gets the same answer, and nothing is changed by asking, so that one object
    serves a running cluster and a simulated one. Whoever asks carries the answers out, and shows
    what came of them in the next snapshot.
    """

    name: str

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        """The instance that takes a newcomer; None to hold it back until something changes."""
        ...

    def migrations(self, snapshot: ClusterSnapshot) -> list[Move]:
        """Requests to move now, none of them twice, each to where it has room."""
        ...

    def scale(self, snapshot: ClusterSnapshot) -> int:
        """How many instances there should be, without those that drain."""
        ...

    def roles(self, snapshot: ClusterSnapshot) -> Mapping[int, Role]:
        """Instances that should have another role from now on."""
        ...
