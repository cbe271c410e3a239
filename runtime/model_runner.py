"""One batch through the model: flat inputs, attention over the slots, sampled tokens."""

import inspect
from collections.abc import Sequence

import torch

from ..allocator import SlotCache
from ..attention_backends import AttentionBackend, AttentionBatch
from .attention import CacheStep, attention_step
from .models import LoadedModel
from .request import ScheduledRequest
from .sampler import SampledToken, prompt_logprobs, sample


class ModelRunner:
    """Runs the model over one batch, laid out flat as [1, num_tokens], without padding."""

    def __init__(self, loaded: LoadedModel, cache: SlotCache, backend: AttentionBackend) -> None:
        self.loaded = loaded
        self.cache = cache
        self.backend = backend
        parameters = inspect.signature(loaded.model.forward).parameters
        self._selects_logits = "logits_to_keep" in parameters

    @torch.inference_mode()
    def run(self, batch: Sequence[ScheduledRequest]) -> list[SampledToken | None]:
        """Compute the batch; a new token for each request whose last token is in it."""
        rows = self._logit_rows(batch)
        logits = self._forward(batch, rows)  # [len(rows), vocab]
        first_row = {row: index for index, row in reversed(list(enumerate(rows)))}
        self._collect_prompt_logprobs(batch, logits, first_row)
        ends = [end - 1 for end in _ends(batch)]
        sampling = [i for i, item in enumerate(batch) if item.samples]
        chosen = logits[[first_row[ends[i]] for i in sampling]]
        tokens = sample(chosen, [batch[i].request.sampling for i in sampling])
        result: list[SampledToken | None] = [None] * len(batch)
        for index, token in zip(sampling, tokens, strict=True):
            result[index] = token
        return result

    def _forward(self, batch: Sequence[ScheduledRequest], rows: Sequence[int]) -> torch.Tensor:
        device = self.loaded.device
        ids = [
            token
            for item in batch
            for token in item.request.token_ids[item.start : item.start + item.num_tokens]
        ]
        positions = [p for item in batch for p in range(item.start, item.start + item.num_tokens)]
        attention = self._attention_batch(batch)
        keep = torch.tensor(rows, dtype=torch.long, device=device)
        step = CacheStep(self.cache, self.backend, attention, self.loaded.attention)
        with attention_step(step):
            output = self.loaded.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                **({"logits_to_keep": keep} if self._selects_logits else {}),
            )
        logits = output.logits[0]  # [num_rows or num_tokens, vocab]
        return logits if self._selects_logits else logits[keep]

    def _attention_batch(self, batch: Sequence[ScheduledRequest]) -> AttentionBatch:
        device = self.loaded.device
        slots = [item.request.slot for item in batch if item.request.slot is not None]
        assert len(slots) == len(batch), "a scheduled request has no slot"
        starts = [item.start for item in batch]
        counts = [item.num_tokens for item in batch]
        kv_lens = [start + count for start, count in zip(starts, counts, strict=True)]
        slot_ids = [slot.index for slot in slots]
        rows, offsets = self.cache.locate(slots, starts, counts)
        return AttentionBatch(
            query_lens=tuple(counts),
            kv_lens=tuple(kv_lens),
            slots=tuple(slot_ids),
            cu_seqlens_q=torch.tensor([0, *_ends(batch)], dtype=torch.int32, device=device),
            seqused_k=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            slot_ids=torch.tensor(slot_ids, dtype=torch.int32, device=device),
            write_index=(rows.to(device), offsets.to(device)),
            block_tables=self.cache.block_tables(slots),
        )

    @staticmethod
    def _logit_rows(batch: Sequence[ScheduledRequest]) -> list[int]:
        """Flat rows whose logits are wanted: ends that sample, prompts whose scores are asked."""
        rows: set[int] = set()
        for item, end in zip(batch, _ends(batch), strict=True):
            if item.request.params.prompt_logprobs is not None:
                rows.update(range(end - item.num_tokens, end))
            elif item.samples:
                rows.add(end - 1)
        return sorted(rows)

    @staticmethod
    def _collect_prompt_logprobs(
        batch: Sequence[ScheduledRequest], logits: torch.Tensor, first_row: dict[int, int]
    ) -> None:
        for item, end in zip(batch, _ends(batch), strict=True):
            request, num_top = item.request, item.request.params.prompt_logprobs
            if num_top is None:
                continue
            if not request.prompt_logprobs:
                request.prompt_logprobs.append(None)  # nothing precedes the first token
            # The row at position p scores token p + 1; what a preempted run scored stays.
            first = max(len(request.prompt_logprobs) - 1, item.start)
            last = min(item.start + item.num_tokens, request.num_prompt_tokens - 1)
            if first < last:
                row = first_row[end - item.num_tokens + first - item.start]
                targets = torch.tensor(request.token_ids[first + 1 : last + 1])
                request.prompt_logprobs += prompt_logprobs(
                    logits[row : row + last - first], targets, num_top
                )


def _ends(batch: Sequence[ScheduledRequest]) -> list[int]:
    """The flat row behind the last of each request."""
    ends, total = [], 0
    for item in batch:
        total += item.num_tokens
        ends.append(total)
    return ends
