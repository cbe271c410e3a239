"""What the owner of a sequence and a holder of its segments say to each other.

    owner    Ask, queries │                 one a layer, for all requests with segments there
    holder                │ Told, results

Queries and results are bytes of tensors; keys and values never travel.
"""

import msgspec

from ....attention_backends import PastBatch


class AskedBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `PastBatch`, whose slots are the handles of loans."""

    query_lens: tuple[int, ...]
    positions: tuple[int, ...]
    key_starts: tuple[int, ...]
    key_stops: tuple[int, ...]
    loans: tuple[int, ...]

    @classmethod
    def of(cls, batch: PastBatch) -> "AskedBatch":
        """The numbers of `batch`."""
        return cls(
            batch.query_lens, batch.positions, batch.key_starts, batch.key_stops, batch.slots
        )


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attend, in a layer, with the queries that follow.

    Attributes:
        layer: which.
        num_heads: of the queries.
        batch: of this step; None for that of the ask before.
    """

    layer: int
    num_heads: int
    batch: AskedBatch | None = None


class Told(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Results follow; or nothing, and why."""

    objection: str = ""
