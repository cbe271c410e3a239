"""One batch through the model: flat inputs, attention over the slots, sampled tokens."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate

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
        ends = list(accumulate(item.num_tokens for item in batch))  # flat rows behind each request
        rows = _logit_rows(batch, ends)
        logits = self._forward(batch, ends, rows)  # [len(rows), vocab]
        index_of = {row: index for index, row in enumerate(rows)}
        _collect_prompt_logprobs(batch, ends, logits, index_of)
        sampling = [i for i, item in enumerate(batch) if item.samples]
        chosen = logits[[index_of[ends[i] - 1] for i in sampling]]
        tokens = sample(chosen, [batch[i].request.sampling for i in sampling])
        result: list[SampledToken | None] = [None] * len(batch)
        for index, token in zip(sampling, tokens, strict=True):
            result[index] = token
        return result

    def _forward(
        self, batch: Sequence[ScheduledRequest], ends: Sequence[int], rows: Sequence[int]
    ) -> torch.Tensor:
        """Logits of the flat rows `rows`, [len(rows), vocab]."""
        device = self.loaded.device
        ids = [
            token
            for item in batch
            for token in item.request.token_ids[item.start : item.start + item.num_tokens]
        ]
        positions = [p for item in batch for p in range(item.start, item.start + item.num_tokens)]
        keep = torch.tensor(rows, dtype=torch.long, device=device)
        step = CacheStep(
            self.cache, self.backend, self._attention_batch(batch, ends), self.loaded.attention
        )
        with attention_step(step):
            output = self.loaded.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                **({"logits_to_keep": keep} if self._selects_logits else {}),
            )
        logits = output.logits[0]  # [num_rows or num_tokens, vocab]
        return logits if self._selects_logits else logits[keep]

    def _attention_batch(
        self, batch: Sequence[ScheduledRequest], ends: Sequence[int]
    ) -> AttentionBatch:
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
            cu_seqlens_q=torch.tensor([0, *ends], dtype=torch.int32, device=device),
            seqused_k=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            slot_ids=torch.tensor(slot_ids, dtype=torch.int32, device=device),
            write_index=(rows.to(device), offsets.to(device)),
            block_tables=self.cache.block_tables(slots),
        )


def _logit_rows(batch: Sequence[ScheduledRequest], ends: Sequence[int]) -> list[int]:
    """Flat rows whose logits are wanted: ends that sample, prompts whose scores are asked."""
    rows: list[int] = []
    for item, end in zip(batch, ends, strict=True):
        if item.request.num_scored < item.request.num_prompt_tokens:
            rows += range(end - item.num_tokens, end)
        elif item.samples:
            rows.append(end - 1)
    return rows


def _collect_prompt_logprobs(
    batch: Sequence[ScheduledRequest],
    ends: Sequence[int],
    logits: torch.Tensor,
    index_of: Mapping[int, int],
) -> None:
    """Score the prompt tokens that follow this step's rows, where a request asks for it."""
    for item, end in zip(batch, ends, strict=True):
        request, num_top = item.request, item.request.params.prompt_logprobs
        if num_top is None or not request.scores_prompt:
            continue
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)  # nothing precedes the first token
        # The row at position p scores token p + 1; what a preempted run scored stays.
        first = max(len(request.prompt_logprobs) - 1, item.start)
        last = min(item.start + item.num_tokens, request.num_prompt_tokens - 1)
        if first < last:
            index = index_of[end - item.num_tokens + first - item.start]
            targets = torch.tensor(request.token_ids[first + 1 : last + 1])
            request.prompt_logprobs += prompt_logprobs(
                logits[index : index + last - first], targets, num_top
            )
