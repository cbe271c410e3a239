"""Weights that some requests want beside the model's: adapters, and blocks of other models."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ....vmem.errors import InvalidConfig, UsageError, VkvError
from ...adapters.adapters import Adapters, AdapterStats
from ...chains.chains import BlockStats, Chains, ChainStats
from ...chains.voices import Voice
from ...request.request import Batch, Request, ScheduledRequest
from ...request.spec import ChainKey, RequestSpec

Lacking = list[tuple[Request, VkvError]]


class ExtraWeights:
    """What an engine has beside its model; both parts may be missing.

    Args:
        adapters: that requests may name; None for a model without them.
        chains: models that run beside this one, and that requests may name; None for none.
    """

    def __init__(self, adapters: Adapters | None = None, chains: Chains | None = None) -> None:
        self._adapters = adapters
        self._chains = chains

    @property
    def adapters(self) -> Adapters:
        """The adapters. Raises InvalidConfig if the engine takes none."""
        if self._adapters is None:
            raise InvalidConfig("this engine runs a model alone; use one made by vkv.LLM")
        return self._adapters

    @property
    def voices(self) -> Mapping[str, Voice | None]:
        """Of the models that run beside this one, by name, and None under its own."""
        return {} if self._chains is None else self._chains.voices

    def eos_token_ids(self, chain: ChainKey, default: Collection[int]) -> Collection[int]:
        """Tokens that end a text of another model."""
        return default if self._chains is None else self._chains.eos_token_ids(chain)

    def check(self, spec: RequestSpec, *, goes_on: bool = False) -> None:
        """Raises a `UsageError` unless this engine has the weights that a request names;
        `goes_on` as of `Adapters.check`.
        """
        if spec.adapter is not None:
            self.adapters.check(spec.adapter, goes_on=goes_on)
        if spec.chain is not None:
            self._check_chain(spec.chain, spec)

    def _check_chain(self, chain: ChainKey, spec: RequestSpec) -> None:
        if self._chains is None:
            raise InvalidConfig(
                f"this engine runs one model alone, and not {chain.name!r}; open a zoo of both"
            )
        self._chains.check(chain)
        if spec.adapter is not None:
            raise UsageError(
                f"the adapter {spec.adapter.name!r} is of the first model, and {chain.name!r} has "
                "none here; leave the adapter or the model out"
            )

    def hold(self, request: Request) -> None:
        """Keep what a request names until `let_go`."""
        if request.adapter is not None and self._adapters is not None:
            self._adapters.hold(request.adapter)

    def let_go(self, request: Request) -> None:
        """The request is here no more."""
        if request.adapter is not None and self._adapters is not None:
            self._adapters.let_go(request.adapter)

    def provide(self, batch: Batch) -> tuple[Batch, Lacking]:
        """The batch with all of its weights in memory, and the requests that lack some, each with
        why.

        Steps with adapters and steps with other models take turns: those of a batch for whom it is
        not the turn are in neither. Rows of a model, and of models that share most, come together.
        """
        lacking: Lacking = []
        if self._chains is not None:
            batch = _in_turn(batch, self._chains)
            batch = _here(batch, "chain", self._chains, lacking)
            if any(item.request.chain is not None for item in batch.items):
                order = self._chains.order
                items = sorted(batch.items, key=lambda item: order(item.request.chain))
                batch = replace(batch, items=tuple(items))
        if self._adapters is not None:
            batch = _here(batch, "adapter", self._adapters, lacking)
        return batch, lacking

    def rest(self) -> None:
        """No request is left: others may have the memory of what is here."""
        for weights in self._parts():
            weights.provide(())

    def forget(self) -> int:
        """Give all of their memory back; returns the bytes. No request may be left."""
        return sum(weights.forget() for weights in self._parts())

    def model_changed(self) -> None:
        """The model under them has other weights, or other layers."""
        for weights in self._parts():
            weights.model_changed()

    def adapter_stats(self) -> tuple[AdapterStats, ...]:
        """Each adapter's."""
        return () if self._adapters is None else self._adapters.stats()

    def chain_stats(
        self, requests: Mapping[str, Sequence[Request]]
    ) -> tuple[tuple[ChainStats, ...], tuple[BlockStats, ...]]:
        """As of `Chains.stats`, of an engine's unfinished requests."""
        if self._chains is None:
            return (), ()
        return self._chains.stats([one.chain for few in requests.values() for one in few])

    def _parts(self) -> tuple[Adapters | Chains, ...]:
        return tuple(part for part in (self._adapters, self._chains) if part is not None)


def _in_turn(batch: Batch, chains: Chains) -> Batch:
    """The batch without those with adapters, or without those of other models, if it has both."""
    kinds = {_kind(item) for item in batch.items}
    if not {"adapter", "chain"} <= kinds:
        return batch
    aside = "adapter" if chains.is_their_turn else "chain"
    chains.is_their_turn = not chains.is_their_turn
    return Batch(tuple(item for item in batch.items if _kind(item) != aside))


def _kind(item: ScheduledRequest) -> str:
    if item.request.adapter is not None:
        return "adapter"
    return "plain" if item.request.chain is None else "chain"


def _here(batch: Batch, name: str, weights: Any, lacking: Lacking) -> Batch:
    keys = [key for item in batch.items if (key := getattr(item.request, name)) is not None]
    errors: Mapping[Any, VkvError] = weights.provide(keys)  # others may have the rest
    if not errors:
        return batch
    missing = [
        (item.request, error)
        for item in batch.items
        if (error := errors.get(getattr(item.request, name))) is not None
    ]
    lacking += missing
    gone = [request for request, _ in missing]
    return Batch(tuple(item for item in batch.items if item.request not in gone))
