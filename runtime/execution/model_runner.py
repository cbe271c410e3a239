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
from ..model.attention_hook import CacheStep
from ..model.forward import Forward
from ..request.request import Batch, Request, ScheduledRequest
from .recordings import DecodeRecordings, Recorder
from .sampler import SampledToken, choose, prompt_logprobs, sample
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
    ) -> None:
        self.forward = forward
        self.cache = cache
        self.backend = backend
        self.device = device
        self._layers = tuple(layers)
        self.adapters = adapters
        self.recordings: DecodeRecordings | None = None
        if recorder is not None:
            self.recordings = DecodeRecordings(
                self.logits, cache, recorder, device, max_seqs, adapters
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
    ) -> "LaunchedStep":
        """Compute the batch, and sample for each request whose last token is in it.

        `last_tokens` are those of the step before, of which some may be pending in the batch.
        Without `wait` the tokens stay on the device; all requests must be able to run ahead.
        """
        items = batch.items
        ends = list(accumulate(item.num_tokens for item in items))  # flat tokens up to each
        positions = _logit_positions(items, ends)
        logits = self._compute(batch, ends, positions, last_tokens)  # [len(positions), vocab]
        index_of = {position: index for index, position in enumerate(positions)}
        _collect_prompt_logprobs(items, ends, logits, index_of)
        sampling = [i for i, item in enumerate(items) if item.samples]
        wanted = select_rows(logits, [index_of[ends[i] - 1] for i in sampling])
        computed = [item.request for item in items]
        requests = [computed[i] for i in sampling]
        states = [request.sampling for request in requests]
        if wait or not sampling:
            return LaunchedStep(computed, requests, sampled=sample(wanted, states))
        chosen = choose(wanted, states)
        for state in states:
            state.num_output_tokens += 1
        return LaunchedStep(computed, requests, chosen=chosen)

    def logits(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of all tokens of a flat batch, [num_tokens, vocab], or of those of `keep`."""
        step = CacheStep(self.cache, self.backend, batch, self._layers)
        return self.forward(ids, positions, step, keep=keep)

    def _compute(
        self,
        batch: Batch,
        ends: Sequence[int],
        positions: Sequence[int],
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the flat tokens `positions`, [len(positions), vocab].

        Replayed if all of the batch is decodes.
        """
        if self.recordings is not None and len(batch) == ends[-1] == len(positions):
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
        with adapting(self._adapter_step(items, positions)):
            return self.logits(inputs.ids, inputs.positions, attention, inputs.keep)

    def _adapter_step(
        self, items: Sequence[ScheduledRequest], keep: Sequence[int]
    ) -> AdapterStep | None:
        """Whose adapter each flat token wants, and each of those kept; None without any."""
        if self.adapters is None or all(item.request.adapter is None for item in items):
            return None
        tables = [self.adapters.table(item.request.adapter) for item in items]
        counts = [item.num_tokens for item in items]
        until = [bisect_left(keep, end) for end in accumulate(counts)]  # kept up to each end
        num_kept = [last - first for first, last in pairwise([0, *until])]
        step = self.adapters.step(sum(counts), len(keep))
        step.fill(list(zip(tables, counts, strict=True)), list(zip(tables, num_kept, strict=True)))
        return step

    def _inputs(
        self,
        items: Sequence[ScheduledRequest],
        logit_positions: Sequence[int] = (),
        last_tokens: torch.Tensor | None = None,
    ) -> tuple[StepInputs, AttentionBatch]:
        """The batch on the device, flat; the logits of `logit_positions` will be wanted."""
        slots = [item.request.slot for item in items if item.request.slot is not None]
        assert len(slots) == len(items), "a scheduled request has no slot"
        spans = [range(item.start, item.start + item.num_tokens) for item in items]
        counts = [item.num_tokens for item in items]
        write_rows, write_offsets = self.cache.locate(slots, [s.start for s in spans], counts)
        values = StepValues(
            ids=[
                token
                for item, span in zip(items, spans, strict=True)
                for token in item.request.ids(span.start, span.stop)
            ],
            positions=[position for span in spans for position in span],
            write_rows=write_rows,
            write_offsets=write_offsets,
            query_lens=counts,
            kv_lens=[span.stop for span in spans],
            slots=[slot.index for slot in slots],
            keep=logit_positions,
        )
        inputs = StepInputs(sum(counts), len(items), self.device, num_kept=len(logit_positions))
        inputs.fill(values, last_tokens)
        tables = self.cache.block_tables(slots)
        return inputs, inputs.batch(values.query_lens, values.kv_lens, values.slots, tables)


class LaunchedStep:
    """A step under way: the requests that it samples for, and their tokens once it is done.

    Attributes:
        computed: all requests of the step, prompt chunks that do not sample among them.
        requests: those that it samples for.
        tokens: the sampled tokens on the device, int64 [len(requests)]; None if they are known.
    """

    def __init__(
        self,
        computed: Sequence[Request],
        requests: Sequence[Request],
        *,
        sampled: list[SampledToken] | None = None,
        chosen: torch.Tensor | None = None,
    ) -> None:
        self.computed = computed
        self.requests = requests
        self._sampled = sampled
        self._done: torch.cuda.Event | None = None
        self.tokens: torch.Tensor | None = None
        if chosen is not None:
            self.tokens, self._chosen = chosen[0], chosen
            if chosen.is_cuda:  # the copy begins as soon as the step is done
                self._chosen = torch.empty_like(chosen, device="cpu", pin_memory=True)
                self._chosen.copy_(chosen, non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record(torch.cuda.current_stream(chosen.device))

    def wait(self) -> list[SampledToken]:
        """The requests' tokens, once they are there."""
        if self._sampled is None:
            if self._done is not None:
                self._done.synchronize()
            chosen, finite = self._chosen.tolist()
            self._sampled = [
                SampledToken(token_id, is_finite=bool(is_finite))
                for token_id, is_finite in zip(chosen, finite, strict=True)
            ]
        return self._sampled


def _logit_positions(items: Sequence[ScheduledRequest], ends: Sequence[int]) -> list[int]:
    """Flat tokens whose logits are wanted: ends that sample, prompts whose scores are asked."""
    positions: list[int] = []
    for item, end in zip(items, ends, strict=True):
        if item.request.num_scored < item.request.num_prompt_tokens:
            positions += range(end - item.num_tokens, end)
        elif item.samples:
            positions.append(end - 1)
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
