"""One batch through the model: flat inputs, attention over the slots, sampled tokens."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from ...allocator import SlotCache
from ...attention_backends import AttentionBackend, AttentionBatch
from ..model.attention_hook import CacheStep, attention_step
from ..model.loading import LoadedModel
from ..request.request import Request, ScheduledRequest
from .recordings import DecodeGraphs, Recorder
from .sampler import SampledToken, check_finite, choose, prompt_logprobs, sample
from .step_inputs import StepInputs, StepValues
from .upload import select_rows


class ModelRunner:
    """Runs the model over one batch, laid out flat as [1, num_tokens], without padding.

    Args:
        loaded: the model.
        cache: the slots.
        backend: the attention kernels.
        recorder: records decode steps, which are then replayed (`graphs`); None for never.
        max_seqs: the largest batch of decodes.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: SlotCache,
        backend: AttentionBackend,
        *,
        recorder: Recorder | None = None,
        max_seqs: int = 1,
    ) -> None:
        self.loaded = loaded
        self.cache = cache
        self.backend = backend
        parameters = inspect.signature(loaded.model.forward).parameters
        self._selects_logits = "logits_to_keep" in parameters
        self.graphs: DecodeGraphs | None = None
        if recorder is not None:
            self.graphs = DecodeGraphs(self._call_model, cache, recorder, loaded.device, max_seqs)

    @torch.inference_mode()
    def launch(
        self,
        batch: Sequence[ScheduledRequest],
        last_tokens: torch.Tensor | None = None,
        *,
        wait: bool = True,
    ) -> "LaunchedStep":
        """Compute the batch, and sample for each request whose last token is in it.

        `last_tokens` are those of the step before, of which some may be pending in the batch.
        Without `wait` the tokens stay on the device; all requests must be able to run ahead.
        """
        ends = list(accumulate(item.num_tokens for item in batch))  # flat rows behind each request
        rows = _logit_rows(batch, ends)
        logits = self._logits(batch, ends, rows, last_tokens)  # [len(rows), vocab]
        index_of = {row: index for index, row in enumerate(rows)}
        _collect_prompt_logprobs(batch, ends, logits, index_of)
        sampling = [i for i, item in enumerate(batch) if item.samples]
        wanted = select_rows(logits, [index_of[ends[i] - 1] for i in sampling])
        requests = [batch[i].request for i in sampling]
        states = [request.sampling for request in requests]
        if wait or not sampling:
            return LaunchedStep(requests, sampled=sample(wanted, states))
        chosen = choose(wanted, states)
        for state in states:
            state.num_output_tokens += 1
        return LaunchedStep(requests, chosen=chosen)

    def _logits(
        self,
        batch: Sequence[ScheduledRequest],
        ends: Sequence[int],
        rows: Sequence[int],
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the flat rows `rows`, [len(rows), vocab], replayed if all of it is decodes."""
        if self.graphs is not None and len(batch) == ends[-1] == len(rows):
            logits = self.graphs.run(batch, last_tokens)
            if logits is not None:
                return logits
        return self._forward(batch, ends, rows, last_tokens)

    def _forward(
        self,
        batch: Sequence[ScheduledRequest],
        ends: Sequence[int],
        rows: Sequence[int],
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the flat rows `rows`, [len(rows), vocab]."""
        inputs, attention = self._inputs(batch, rows, last_tokens)
        logits = self._call_model(inputs.ids, inputs.positions, attention, inputs.keep)
        return logits if self._selects_logits else logits[inputs.keep]

    def _call_model(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [num_tokens, vocab], or of the rows `keep` alone if the model can select."""
        step = CacheStep(self.cache, self.backend, batch, self.loaded.attention)
        selects = self._selects_logits and keep is not None
        with attention_step(step):
            output = self.loaded.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                **({"logits_to_keep": keep} if selects else {}),
            )
        return output.logits[0]

    def _inputs(
        self,
        batch: Sequence[ScheduledRequest],
        rows: Sequence[int] = (),
        last_tokens: torch.Tensor | None = None,
    ) -> tuple[StepInputs, AttentionBatch]:
        """The batch on the device, flat; the logits of `rows` will be wanted."""
        slots = [item.request.slot for item in batch if item.request.slot is not None]
        assert len(slots) == len(batch), "a scheduled request has no slot"
        spans = [range(item.start, item.start + item.num_tokens) for item in batch]
        counts = [item.num_tokens for item in batch]
        write_rows, write_offsets = self.cache.locate(slots, [s.start for s in spans], counts)
        values = StepValues(
            ids=[
                token
                for item, span in zip(batch, spans, strict=True)
                for token in item.request.ids(span.start, span.stop)
            ],
            positions=[position for span in spans for position in span],
            write_rows=write_rows,
            write_offsets=write_offsets,
            query_lens=counts,
            kv_lens=[span.stop for span in spans],
            slots=[slot.index for slot in slots],
            keep=rows,
        )
        inputs = StepInputs(sum(counts), len(batch), self.loaded.device, num_kept=len(rows))
        inputs.fill(values, last_tokens)
        tables = self.cache.block_tables(slots)
        return inputs, inputs.batch(values.query_lens, values.kv_lens, values.slots, tables)


class LaunchedStep:
    """A step under way: the requests that it samples for, and their tokens once it is done.

    Attributes:
        tokens: the sampled tokens on the device, int64 [len(requests)]; None if they are known.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        sampled: list[SampledToken] | None = None,
        chosen: torch.Tensor | None = None,
    ) -> None:
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
        """The requests' tokens, once they are there.

        Raises InvalidOperation if some do not follow from their logits (`check_finite`).
        """
        if self._sampled is None:
            if self._done is not None:
                self._done.synchronize()
            chosen, finite = self._chosen.tolist()
            check_finite(finite)
            self._sampled = [SampledToken(token_id) for token_id in chosen]
        return self._sampled


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
