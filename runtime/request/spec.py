"""What is asked of an engine, as plain data that a process can send to another."""

import time
from collections.abc import Sequence

import msgspec

from .sampling_params import SamplingParams

SequenceKey = tuple[str, int]
"""Names one of a request's outputs: the request's id and the number of the output."""


class AdapterKey(msgspec.Struct, frozen=True):
    """Names an adapter.

    Attributes:
        name: what callers call it.
        digest: of all that it computes by, so that another of the same name is another.
    """

    name: str
    digest: str


class ChainKey(msgspec.Struct, frozen=True):
    """Names a model among several that share blocks, and that one engine runs together.

    Attributes:
        name: what callers call it.
        digest: of all that it computes by.
        kv: of those of its blocks that keys and values depend on; "" where these are all of the
            engine's own model, with which it then shares them.
    """

    name: str
    digest: str
    kv: str = ""


_MARK = "\x1f"  # of variants that are no caller's text


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt in tokens, and how to go on from it.

    Attributes:
        request_id: names the request among those an engine has; the caller sees to it.
        prompt_token_ids: at least one.
        params: how tokens are chosen. Stop strings are not the engine's: it knows no text.
        bad_words: what `params.bad_words` are in tokens: sequences that must not be completed.
        variant: what the caller says that prefixes are shared within: a tenant's salt.
        adapter: what is computed with beside the model; None for the model alone.
        chain: which model computes it, of several that share blocks; None for the engine's own.
        priority: the lower, the earlier, where requests are scheduled by priority.
        tenant: whose service it counts as. It has no part in `variant`: tenants may share prefixes.
        seed: what chance goes by where `params.seed` is None; None for the engine to draw one.
            Whoever sets it can have the request go on elsewhere (`Continuation`) with the tokens it
            would have had.
        arrival_time_s: on the system's monotonic clock, which all processes of a machine share.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...] = ()
    variant: str = ""
    adapter: AdapterKey | None = None
    chain: ChainKey | None = None
    priority: int = 0
    tenant: str = ""
    seed: int | None = None
    arrival_time_s: float = msgspec.field(default_factory=time.monotonic)

    @property
    def kv_variant(self) -> str:
        """What keys and values depend on besides the tokens: they are shared within it alone.

        No two have the same whose `variant`, `adapter` or `chain.kv` differ, whatever a caller's
        text is like. An adapter is of the engine's own model.
        """
        if self.chain is not None and self.chain.kv:
            return f"{_MARK}C{self.chain.kv}{_MARK}{self.variant}"
        if self.adapter is not None:
            adapter = self.adapter
            return f"{_MARK}A{adapter.digest}{_MARK}{adapter.name}{_MARK}{self.variant}"
        return f"{_MARK}N{self.variant}" if self.variant.startswith(_MARK) else self.variant

    @property
    def owner(self) -> str | tuple[str, str]:
        """Whose memory it uses: what it leaves there is cleared for others (`SlotCache.open`)."""
        return (self.tenant, self.kv_variant) if self.tenant else self.kv_variant
