"""What every attention backend is given, and what it declares of itself."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionBatch:
    """One step's queries, laid out flat, and where each sequence's keys and values are.

    Built once a step; every layer reads the same object, and batches compare by identity.
    Sequence `b` owns the queries `cu_seqlens_q[b] : cu_seqlens_q[b + 1]`. They are those of the
    *last* of its `seqused_k[b]` tokens: its query `i` stands at position
    `seqused_k[b] - query_lens[b] + i` and sees the keys at positions up to its own.

    The tuples are the same numbers on the host, for backends that loop; the tensors are on the
    device of the cache.
    """

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]  # tokens in the cache, this step's included
    slots: tuple[int, ...]  # index into the cache's first dimension, for contiguous slots
    cu_seqlens_q: torch.Tensor  # int32 [num_seqs + 1]
    seqused_k: torch.Tensor  # int32 [num_seqs]
    slot_ids: torch.Tensor  # int32 [num_seqs]
    write_index: tuple[torch.Tensor, torch.Tensor]  # int64 [num_tokens] each: slot, position
    block_tables: torch.Tensor | None = None  # int32 [num_seqs, max_blocks], paged caches only

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.query_lens)

    @property
    def max_seqlen_k(self) -> int:
        return max(self.kv_lens)


@dataclass(frozen=True, kw_only=True, eq=False)
class PastBatch:
    """Queries of some sequences, laid out flat, and of each sequence a stretch of its past.

    Sequence `b` owns the next `query_lens[b]` queries; they stand at positions `positions[b]`,
    `positions[b] + 1`, …. The keys at positions `key_starts[b]` to `key_stops[b]`, all of them
    before its first query, lie in rows 0, 1, … of slot `slots[b]`. A query sees those of them that
    are within its window.

    Built once a step, as an `AttentionBatch` is. All numbers are on the host.
    """

    query_lens: tuple[int, ...]
    positions: tuple[int, ...]
    key_starts: tuple[int, ...]
    key_stops: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys of each stretch."""
        pairs = zip(self.key_starts, self.key_stops, strict=True)
        return tuple(stop - start for start, stop in pairs)


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """What one layer asks of attention, constant over the model's life.

    Attributes:
        scale: multiplies q·k before the softmax.
        window: keys a query sees, itself included (`k > q - window`), or None for all.
        softcap: logits become `softcap * tanh(logits / softcap)`, or None.
        sinks: float [num_heads], one extra logit a head that takes probability but has no
            value (GPT-OSS), or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend can do; compared with the model's needs once, at load.

    Attributes:
        devices: torch device types.
        dtypes: of queries, keys and values.
        max_head_dim: largest head size of keys (and values), or None for any.
        head_dim_multiple: head sizes must be a multiple of it.
        unequal_head_dims: keys and values may differ in head size.
        window, softcap, sinks, lse: the features of `LayerAttention`, and returning the
            log-sum-exp.
        contiguous: reads contiguous slots.
        paged: reads a paged cache through block tables.
        block_multiple: the tokens of a paged cache's blocks must be a multiple of it.
        over_read_tokens: keys and values are loaded in tiles of this many tokens, so that those
            of `ceil(len / tile) * tile` tokens must be backed and finite. 1: never reads past
            the length.
        graphs: a batch of decodes can be recorded and replayed with other numbers in its tensors.
            Of the batch, `store` and `forward` then use the tensors, and `max_seqlen_q` and
            `max_seqlen_k` as upper bounds, and nothing else. On CUDA the recording is a graph; on
            a CPU it holds operations of PyTorch and calls of a `NativeFunction`, and nothing else.
        repeatable: to the bit, a query's result depends on its own sequence up to it alone, not on
            the rest of the batch, the chunk that it comes in, or the number of threads.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    unequal_head_dims: bool = True
    window: bool = True
    softcap: bool = True
    sinks: bool = True
    lse: bool = True
    contiguous: bool = True
    paged: bool = False
    block_multiple: int = 1
    over_read_tokens: int = 1
    graphs: bool = False
    repeatable: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionNeeds:
    """What a model asks of a backend: the union over its layers."""

    device: str
    dtype: torch.dtype
    head_dims: frozenset[tuple[int, int]]  # (key, value) head sizes that occur
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    paged: bool = False


class PerStep(Generic[T]):
    """What a backend prepared for the current batch; gone when another batch comes.

    Layers of one step share the batch object, so the first layer builds and the rest look up.
    The batch is held weakly: an id that a later batch happens to reuse cannot hit.
    """

    def __init__(self) -> None:
        self._batch: weakref.ref[object] | None = None
        self._values: dict[Hashable, T] = {}

    def get(self, batch: object, key: Hashable, build: Callable[[], T]) -> T:
        """The value kept for `batch` under `key`, built if this is the first ask."""
        if self._batch is None or self._batch() is not batch:
            self._batch = weakref.ref(batch)
            self._values = {}
        if key not in self._values:
            self._values[key] = build()
        return self._values[key]


class AttentionBackend(ABC):
    """Attention of flat queries over a KV cache, by one family of kernels.

    A backend holds no per-request state; what it prepares for a step it keeps in a `PerStep`,
    against the identity of the `AttentionBatch`. One backend serves one thread.
    """

    name: str
    capabilities: Capabilities

    @classmethod
    @abstractmethod
    def unavailable_reason(cls) -> str | None:
        """Why the kernels cannot be used on this machine (what to install), or None."""

    def check_cache(self, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:  # noqa: B027
        """Refuse, at load, a layer's cache whose strides or size the kernels cannot address.

        Raises UnsupportedAttention, naming the value. Most backends take any strided view.
        """

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        """Write the new tokens' keys and values into the cache.

        Args:
            key: [num_tokens, num_kv_heads, head_dim]; `value` the same with its own head size.
            key_cache, value_cache: as in `forward`.
        """
        key_cache.index_put_(batch.write_index, key)
        value_cache.index_put_(batch.write_index, value)

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of every query over its own sequence.

        Args:
            query: [num_tokens, num_heads, head_dim]. `num_heads` is a multiple of
                `num_kv_heads`; head `h` reads KV head `h // (num_heads // num_kv_heads)`.
            key_cache: [num_slots, max_len, num_kv_heads, head_dim], strided, this step's keys
                already written; or [num_blocks, block_size, num_kv_heads, head_dim] if paged.
            value_cache: the same with the values' head size.
            out: where to put the result, [num_tokens, num_heads, value_head_dim].

        Returns:
            [num_tokens, num_heads, value_head_dim], of the query's dtype.
        """

    def forward_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the natural log-sum-exp of the logits, float32 [num_tokens, num_heads].

        With sinks, the sink's logit is part of the sum. Offered where `capabilities.lse`.
        """
        raise NotImplementedError(f"{self.name} does not return the log-sum-exp")

    def forward_past(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PastBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward_lse` over keys that are all in the queries' past; without sinks, which belong
        to the whole. The log-sum-exp is -inf where a query sees none of them, and the output then
        anything. For contiguous slots, where `capabilities.lse`.

        Here a kernel that knows nothing of it takes each query as a sequence of its own, whose last
        key is the stretch's; queries that see as many keys go together.
        """
        out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
        plain = replace(layer, sinks=None)
        for num_seen, (rows, single) in _by_keys_seen(batch, layer.window, query.device).items():
            out[rows], lse[rows] = self.forward_lse(
                query[rows], key_cache, value_cache, single, replace(plain, window=num_seen)
            )
        return out, lse


def _by_keys_seen(
    batch: PastBatch, window: int | None, device: torch.device
) -> dict[int | None, tuple[torch.Tensor, AttentionBatch]]:
    """Of the queries that see so many keys, the last ones (None: all): which they are, and a batch
    that has each as a sequence."""
    seen: dict[int | None, list[tuple[int, int]]] = {}  # (query, its sequence)
    query = 0
    for sequence, count in enumerate(batch.query_lens):
        start, stop = batch.key_starts[sequence], batch.key_stops[sequence]
        for position in range(batch.positions[sequence], batch.positions[sequence] + count):
            first = start if window is None else max(start, position - window + 1)
            if first < stop:
                num_seen = None if first == start else stop - first
                seen.setdefault(num_seen, []).append((query, sequence))
            query += 1
    kv_lens = batch.kv_lens
    return {
        num_seen: (
            torch.tensor([query for query, _ in members], device=device),
            _one_by_one([(kv_lens[b], batch.slots[b]) for _, b in members], device),
        )
        for num_seen, members in seen.items()
    }


def _one_by_one(sequences: Sequence[tuple[int, int]], device: torch.device) -> AttentionBatch:
    """A batch of one query each over (keys, slot)."""
    kv_lens, slots = zip(*sequences, strict=True)
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    ints = {"dtype": torch.int32, "device": device}
    return AttentionBatch(
        query_lens=(1,) * len(kv_lens),
        kv_lens=kv_lens,
        slots=slots,
        cu_seqlens_q=torch.arange(len(kv_lens) + 1, **ints),
        seqused_k=torch.tensor(kv_lens, **ints),
        slot_ids=torch.tensor(slots, **ints),
        write_index=(nowhere, nowhere),
    )


def missing_features(capabilities: Capabilities, needs: AttentionNeeds) -> Sequence[str]:
    """What `needs` asks that `capabilities` lack, in words; empty if nothing."""
    missing = []
    if needs.device not in capabilities.devices:
        missing.append(f"runs on {'/'.join(sorted(capabilities.devices))}, not {needs.device}")
    if needs.dtype not in capabilities.dtypes:
        missing.append(f"no {needs.dtype}")
    if needs.paged and not capabilities.paged:
        missing.append("no paged KV")
    if not needs.paged and not capabilities.contiguous:
        missing.append("reads paged KV only")
    for key_dim, value_dim in sorted(needs.head_dims):
        limit = capabilities.max_head_dim
        if limit is not None and max(key_dim, value_dim) > limit:
            missing.append(f"head size {max(key_dim, value_dim)} above its {limit}")
        if key_dim % capabilities.head_dim_multiple or value_dim % capabilities.head_dim_multiple:
            missing.append(
                f"head sizes must be multiples of {capabilities.head_dim_multiple}, "
                f"not {key_dim} and {value_dim}"
            )
        if key_dim != value_dim and not capabilities.unequal_head_dims:
            missing.append(f"unequal head sizes {key_dim} and {value_dim}")
    for feature in ("window", "softcap", "sinks"):
        if getattr(needs, feature) and not getattr(capabilities, feature):
            missing.append(f"no {feature}")
    return missing
