"""Weights that some requests want beside the model's: adapters, and blocks of other models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ....vmem.errors import InvalidConfig, UsageError, VkvError
from ...adapters.adapters import Adapters
from ...chains.chains import BlockStats, Chains, ChainStats
from ...request.request import Batch, Request, ScheduledRequest
from ...request.spec import RequestSpec

Lacking = list[tuple[Request, VkvError]]


def check_chain(chains: Chains | None, spec: RequestSpec) -> None:
    """Raises a `UsageError` unless this engine computes the model that a request names."""
    assert spec.chain is not None, "the caller has looked"
    if chains is None:
        raise InvalidConfig(
            f"this engine runs one model alone, and not {spec.chain.name!r}; open a zoo of both"
        )
    chains.check(spec.chain)
    if spec.adapter is not None:
        raise UsageError(
            f"the adapter {spec.adapter.name!r} is of the first model, and {spec.chain.name!r} has "
            "none here; leave the adapter or the model out"
        )


def provided(
    batch: Batch, adapters: Adapters | None, chains: Chains | None
) -> tuple[Batch, Lacking]:
    """The batch with all of its weights in memory, and the requests that lack some, each with why.

    Steps with adapters and steps with other models take turns: those of a batch for whom it is not
    the turn are in neither. Rows of a model, and of models that share most, come together.
    """
    lacking: Lacking = []
    if chains is not None:
        batch = _in_turn(batch, chains)
        batch = _here(batch, "chain", chains, lacking)
        if any(item.request.chain is not None for item in batch.items):
            order = sorted(batch.items, key=lambda item: chains.order(item.request.chain))
            batch = replace(batch, items=tuple(order))
    if adapters is not None:
        batch = _here(batch, "adapter", adapters, lacking)
    return batch, lacking


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


def chain_stats(
    chains: Chains | None, requests: Mapping[str, Sequence[Request]]
) -> tuple[tuple[ChainStats, ...], tuple[BlockStats, ...]]:
    """As of `Chains.stats`, of an engine's unfinished requests."""
    if chains is None:
        return (), ()
    return chains.stats([one.chain for several in requests.values() for one in several])
