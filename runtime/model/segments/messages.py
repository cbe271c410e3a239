"""What the owner of a sequence and a holder of its segments say to each other.

    owner    Ask, queries │                 one a layer, for all requests with segments there
    holder                │ Told, results

    owner    Offer │        keys and values │               once, when they move there
    holder         │ Told                   │ Told, the loan

    owner    Fetch │                                        when they come back, or go elsewhere
    holder         │ Told, keys and values

    owner    GiveBack                                       which nobody answers

Queries and results are bytes of tensors; in steps keys and values never travel.
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


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Attend, in a layer, with the queries that follow.

    Attributes:
        layer: which.
        num_heads: of the queries.
        batch: of this step; None for that of the ask before.
    """

    layer: int
    num_heads: int
    batch: AskedBatch | None = None


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Take in `num_tokens` tokens of a sequence, the first at position `start`.

    Attributes:
        widths: bytes of a token in each stream, as of `TokenFormat`.
    """

    start: int
    num_tokens: int
    widths: tuple[int, ...]


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Send `num_tokens` tokens of a loan, from its row `start` on. It stays a loan."""

    loan: int
    start: int
    num_tokens: int


class GiveBack(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """A loan is not needed any more."""

    loan: int


class Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whatever an owner says."""

    what: Ask | Offer | Fetch | GiveBack


class Told(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes follow, or may; or nothing, and why.

    Attributes:
        objection: why not.
        called_back: loans that it is because of; all others are as they were.
        loan: what an offer is known by now.
        wanted: loans of this owner whose memory the holder needs, soon.
    """

    objection: str = ""
    called_back: tuple[int, ...] = ()
    loan: int = 0
    wanted: tuple[int, ...] = ()
