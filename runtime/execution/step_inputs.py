"""What a step tells the device: small integers, in one buffer and one copy.

The host does not wait for the copy. A `StepInputs` may be filled again; its tensors stay at their
addresses, from which a recorded step (`recordings`) reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...attention_backends import AttentionBatch
from .upload import pins

Ints = Sequence[int] | torch.Tensor


@dataclass(kw_only=True)
class StepValues:
    """The numbers of a step, on the host.

    Attributes:
        ids, positions: of each token.
        write_rows, write_offsets: where each token's keys and values go (`KernelView.locate`).
        query_lens, kv_lens, slots: of each request, as in `AttentionBatch`.
        keep: tokens whose logits are wanted.
    """

    ids: list[int]
    positions: list[int]
    write_rows: Ints
    write_offsets: Ints
    query_lens: list[int]
    kv_lens: list[int]
    slots: list[int]
    keep: Sequence[int] = field(default_factory=tuple)


class StepInputs:
    """Tensors for a step of `num_tokens` tokens of `num_seqs` requests, at fixed addresses.

    Attributes:
        ids, positions: int64 [1, num_tokens].
        keep: int64 [num_kept].
    """

    def __init__(
        self, num_tokens: int, num_seqs: int, device: torch.device, *, num_kept: int = 0
    ) -> None:
        self._device = device
        # Those of 64 bits first, so that all are aligned.
        longs = [num_tokens] * 4 + [num_kept]
        ints = [num_seqs + 1, num_seqs, num_seqs]
        self._sizes = [(n, torch.int64) for n in longs] + [(n, torch.int32) for n in ints]
        self._num_bytes = sum(n * dtype.itemsize for n, dtype in self._sizes)
        self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8, device=device)
        (
            ids,
            positions,
            self._write_rows,
            self._write_offsets,
            self.keep,
            self._cu_seqlens_q,
            self._seqused_k,
            self._slot_ids,
        ) = self._split(self._buffer)
        self.ids, self.positions = ids[None], positions[None]

    def fill(self, values: StepValues, last_tokens: torch.Tensor | None = None) -> None:
        """Send a step's numbers, of exactly these sizes; work launched later sees them.

        An id below zero, `-1 - i`, stands for token `i` of `last_tokens`, int64 [num_sampled],
        which the host need not know yet.
        """
        # A buffer of its own each time: the last one may not have been read yet. PyTorch keeps
        # pinned memory from reuse until the copies that read it are over.
        host = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=pins(self._device))
        offsets = torch.zeros(len(values.query_lens) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(values.query_lens, dtype=torch.int32).cumsum(0)
        parts = (
            values.ids,
            values.positions,
            values.write_rows,
            values.write_offsets,
            values.keep,
            offsets,
            values.kv_lens,
            values.slots,
        )
        for view, part in zip(self._split(host), parts, strict=True):
            assert len(view) == len(part), (len(view), len(part))
            view.copy_(torch.as_tensor(part))
        self._buffer.copy_(host, non_blocking=True)
        if last_tokens is not None:
            places = (-1 - self.ids).clamp_(min=0)
            self.ids.copy_(torch.where(self.ids < 0, last_tokens[places], self.ids))

    def batch(
        self,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        slots: Sequence[int],
        block_tables: torch.Tensor | None = None,
    ) -> AttentionBatch:
        """The batch over these tensors, with its numbers on the host beside them."""
        return AttentionBatch(
            query_lens=tuple(query_lens),
            kv_lens=tuple(kv_lens),
            slots=tuple(slots),
            cu_seqlens_q=self._cu_seqlens_q,
            seqused_k=self._seqused_k,
            slot_ids=self._slot_ids,
            write_index=(self._write_rows, self._write_offsets),
            block_tables=block_tables,
        )

    def _split(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        parts = buffer.split([n * dtype.itemsize for n, dtype in self._sizes])
        return [part.view(dtype) for part, (_, dtype) in zip(parts, self._sizes, strict=True)]
