"""One batch through the model: flat inputs, attention over the slots, sampled tokens."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from ...allocator import SlotCache
from ...attention_backends import AttentionBackend, AttentionBatch, LayerAttention
from ..adapters.adapters import Adapters
from ..adapters.steps import AdapterStep, adapting
from ..chains.chains import Chains
from ..chains.steps import ChainStep, chaining
from ..model.attention_hook import CacheStep
from ..model.forward import Forward
from ..model.segments import Place, SegmentedAttention, SegmentedStep
from ..request.request import Batch, Request, ScheduledRequest
from .launched_step import LaunchedStep, sample_drafted
from .recordings import DecodeRecordings, Recorder
from .sampler import choose, prompt_logprobs
from .step_inputs import StepInputs, StepValues
from .upload import select_rows


class ModelRunner:
    """Runs the model over one batch, laid out flat as [1, num_tokens].

    Nothing is padded, but where a recorded decode of a larger batch is replayed.

    Args:
        forward: the model.
        cache: the slots. The runner writes into them and never grows one.
        backend: the attention kernels.
        layers: what each layer that attends asks of attention.
        device: where the model is.
        recorder: records decode steps, which are then replayed (`recordings`); None for never.
        max_seqs: the largest batch of decodes.
        adapters: those of the batch's requests, which are in memory; None for a model alone.
        chains: the models of the batch's requests, which are in memory, too; None for one alone.

    Attributes:
        segmented: how requests are attended whose first tokens lie in the tier; None if none do.
    """

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        backend: AttentionBackend,
        layers: Sequence[LayerAttention],
        device: torch.device,
        *,
        recorder: Recorder | None = None,
        max_seqs: int = 1,
        adapters: Adapters | None = None,
        chains: Chains | None = None,
    ) -> None:
        self.forward = forward
        self.cache = cache
        self.backend = backend
        self.device = device
        self._layers = tuple(layers)
        self.adapters = adapters
        self.chains = chains
        self.segmented: SegmentedAttention | None = None
        self.recordings: DecodeRecordings | None = None
        if recorder is not None:
            self.recordings = DecodeRecordings(
                self.logits, cache, recorder, device, max_seqs, adapters, chains
            )

    @property
    def state_bytes(self) -> int:
        """Memory of recurrent and convolution state, beside the slots."""
        return 0

    def forget(self) -> int:
        """Give back what finished requests left beside the slots; returns the bytes."""
        return 0

    def save_state(self, slot_index: int) -> Any:
        """A copy of what the model remembers of a slot's tokens besides keys and values."""
        return None

    def load_state(self, slot_index: int, state: Any) -> None:
        """Put such a copy into a slot's place."""

    def model_changed(self, layers: Sequence[LayerAttention], *, recordable: bool) -> None:
        """Go on with what the model's layers ask of attention now, and record its steps anew.

        None is recorded if it is not `recordable` any more.
        """
        self._layers = tuple(layers)
        self.forget()
        if self.recordings is not None:
            self.recordings.forget()
            self.recordings.refused = None if recordable else "the model has forward hooks"

    @torch.inference_mode()
    def launch(
        self, batch: Batch, last_tokens: torch.Tensor | None = None, *, wait: bool = True
    ) -> LaunchedStep:
        """Compute the batch, and sample for each request whose last token is in it.

        `last_tokens` are those of the step before, of which some may be pending in the batch.
        Without `wait` the tokens stay on the device; all requests must be able to run ahead.
        """
        items = batch.items
        ends = list(accumulate(item.num_rows for item in items))  # flat tokens up to each
        positions = _logit_positions(items, ends)
        logits = self._compute(batch, ends, positions, last_tokens)  # [len(positions), vocab]
        index_of = {position: index for index, position in enumerate(positions)}
        _collect_prompt_logprobs(items, ends, logits, index_of)
        sampling = [i for i, item in enumerate(items) if item.samples]
        computed = [item.request for item in items]
        requests = [computed[i] for i in sampling]
        firsts = [index_of[ends[i] - 1 - len(items[i].draft)] for i in sampling]
        if wait or not sampling:
            sampled = sample_drafted(logits, firsts, [items[i] for i in sampling])
            return LaunchedStep(computed, requests, sampled=sampled)
        states = [request.sampling for request in requests]
        chosen = choose(select_rows(logits, firsts), states)
        for state in states:
            state.num_output_tokens += 1
        return LaunchedStep(computed, requests, chosen=chosen)

    def logits(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        keep: torch.Tensor | None = None,
        segmented: SegmentedStep | None = None,
    ) -> torch.Tensor:
        """Logits of all tokens of a flat batch, [num_tokens, vocab], or of those of `keep`."""
        step = CacheStep(self.cache, self.backend, batch, self._layers, segmented)
        return self.forward(ids, positions, step, keep=keep)

    def _compute(
        self,
        batch: Batch,
        ends: Sequence[int],
        positions: Sequence[int],
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the flat tokens `positions`, [len(positions), vocab].

        Replayed if all of the batch is decodes of requests whose slots have all their tokens.
        """
        is_plain = all(not item.request.is_spread for item in batch.items)
        if self.recordings is not None and is_plain and len(batch) == ends[-1] == len(positions):
            logits = self.recordings.run(batch, last_tokens)
            if logits is not None:
                return logits
        return self._run(batch.items, ends, positions, last_tokens)

    def _run(
        self,
        items: Sequence[ScheduledRequest],
        ends: Sequence[int],
        positions: Sequence[int],
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same, kernel by kernel."""
        inputs, attention = self._inputs(items, positions, last_tokens)
        segmented = self._segmented_step(items, attention)
        adapters, chains = self._adapter_step(items, positions), self._chain_step(items, positions)
        with adapting(adapters), chaining(chains):
            return self.logits(inputs.ids, inputs.positions, attention, inputs.keep, segmented)

    def _segmented_step(
        self, items: Sequence[ScheduledRequest], attention: AttentionBatch
    ) -> SegmentedStep | None:
        """How to attend where some requests' first tokens are elsewhere; None if none's are."""
        places = [_places(item.request) for item in items]
        if not any(places):
            return None
        assert self.segmented is not None, "a request has a segment, and nobody attends to it"
        return self.segmented.step(attention, [item.start for item in items], places)

    def _adapter_step(
        self, items: Sequence[ScheduledRequest], keep: Sequence[int]
    ) -> AdapterStep | None:
        """Whose adapter each flat token wants, and each of those kept; None without any."""
        if self.adapters is None or all(item.request.adapter is None for item in items):
            return None
        tables = [self.adapters.table(item.request.adapter) for item in items]
        counts, num_kept = _row_counts(items, keep)
        step = self.adapters.step(sum(counts), len(keep))
        step.fill(list(zip(tables, counts, strict=True)), list(zip(tables, num_kept, strict=True)))
        return step

    def _chain_step(
        self, items: Sequence[ScheduledRequest], keep: Sequence[int]
    ) -> ChainStep | None:
        """Which model computes each flat token, and each of those kept; None if one does all."""
        if self.chains is None or all(item.request.chain is None for item in items):
            return None
        keys = [item.request.chain for item in items]
        counts, num_kept = _row_counts(items, keep)
        rows, kept = (list(zip(keys, some, strict=True)) for some in (counts, num_kept))
        self.chains.count(rows)
        return self.chains.step(rows, kept, self.device)

    def _inputs(
        self,
        items: Sequence[ScheduledRequest],
        logit_positions: Sequence[int] = (),
        last_tokens: torch.Tensor | None = None,
    ) -> tuple[StepInputs, AttentionBatch]:
        """The batch on the device, flat; the logits of `logit_positions` will be wanted."""
        slots = [item.request.slot for item in items if item.request.slot is not None]
        assert len(slots) == len(items), "a scheduled request has no slot"
        spans = [range(item.start, item.stop) for item in items]
        counts = [item.num_rows for item in items]
        row_0 = [item.request.slot_start for item in items]  # the position of a slot's first row
        starts = [span.start - first for span, first in zip(spans, row_0, strict=True)]
        write_rows, write_offsets = self.cache.locate(slots, starts, counts)
        values = StepValues(
            ids=[token for item in items for token in item.ids],
            positions=[position for span in spans for position in span],
            write_rows=write_rows,
            write_offsets=write_offsets,
            query_lens=counts,
            kv_lens=[start + count for start, count in zip(starts, counts, strict=True)],
            slots=[slot.index for slot in slots],
            keep=logit_positions,
        )
        inputs = StepInputs(sum(counts), len(items), self.device, num_kept=len(logit_positions))
        inputs.fill(values, last_tokens)
        tables = self.cache.block_tables(slots)
        return inputs, inputs.batch(values.query_lens, values.kv_lens, values.slots, tables)


def _row_counts(
    items: Sequence[ScheduledRequest], keep: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Flat tokens of each item, and those among them that are in `keep`."""
    counts = [item.num_rows for item in items]
    until = [bisect_left(keep, end) for end in accumulate(counts)]  # kept up to each end
    return counts, [last - first for first, last in pairwise([0, *until])]


def _places(request: Request) -> list[Place]:
    """Where a request's tokens are that are not in its slot."""
    segment = request.segment
    places = [Place(*lent) for lent in request.lent]
    if segment is not None and segment.num_tokens:
        places.insert(0, Place(segment.holder, segment.slot.index, 0, segment.num_tokens))
    return places


def _logit_positions(items: Sequence[ScheduledRequest], ends: Sequence[int]) -> list[int]:
    """Flat tokens whose logits are wanted: ends that sample, prompts whose scores are asked."""
    positions: list[int] = []
    for item, end in zip(items, ends, strict=True):
        if item.request.num_scored < item.request.num_prompt_tokens:
            positions += range(end - item.num_tokens, end)
        elif item.samples:
            positions += range(end - 1 - len(item.draft), end)
    return positions


def _collect_prompt_logprobs(
    items: Sequence[ScheduledRequest],
    ends: Sequence[int],
    logits: torch.Tensor,
    index_of: Mapping[int, int],
) -> None:
    """Score the prompt tokens that follow this step's, where a request asks for it."""
    for item, end in zip(items, ends, strict=True):
        request, num_top = item.request, item.request.params.prompt_logprobs
        if num_top is None or not request.scores_prompt:
            continue
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)  # nothing precedes the first token
        # The logits at position p score token p + 1; what a preempted run scored stays.
        first = max(len(request.prompt_logprobs) - 1, item.start)
        last = min(item.start + item.num_tokens, request.num_prompt_tokens - 1)
        if first < last:
            index = index_of[end - item.num_tokens + first - item.start]
            targets = torch.tensor(request.token_ids[first + 1 : last + 1])
            request.prompt_logprobs += prompt_logprobs(
                logits[index : index + last - first], targets, num_top
            )
