"""The step loop: schedule, run, postprocess."""

import bisect
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...allocator import SlotCache
from ...attention_backends import AttentionBackend
from ...vmem.errors import (
    InvalidOperation,
    InvalidPrompt,
    InvalidSamplingParams,
    RequestTooLarge,
    RequestTooLong,
    Shortage,
)
from ..execution.model_runner import LaunchedStep, ModelRunner
from ..execution.recordings import Recorder
from ..execution.recurrent_runner import StateRunner
from ..execution.sampler import SampledToken, SamplingState
from ..frontend.detokenizer import IncrementalDetokenizer, decode_logprobs
from ..model.loading import LoadedModel
from ..model.recurrent_state import StateRows
from ..request.request import Request, ScheduledRequest
from ..request.sampling_params import SamplingParams
from ..scheduling.scheduler import Scheduler


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine holds now, and what it has done so far.

    Attributes:
        virtual_bytes: address space reserved for the slots.
        physical_bytes: memory that exists for KV now.
        pages_held: pages that requests hold, live or parked.
        pages_parked: pages among them that only finished requests hold; `trim` returns them.
        pages_ahead: pages among them mapped ahead of live requests' tokens.
        pages_limit: the most pages there may be.
        state_bytes: memory of recurrent and convolution state, beside the pages.
        page_bytes: size of a page.
        growth_tokens: tokens that one page of every range covers.
        tokens_held: tokens whose keys and values are held, live or parked.
        tokens_parked: tokens among them of finished requests.
        num_running, num_waiting: live requests by state.
        num_preemptions: requests whose slot was taken away to be computed again.
        prefix_hit_tokens: prompt tokens that needed no computing.
        num_steps, num_prompt_tokens, num_output_tokens: work done.
        num_graphs: recordings of decode steps that exist.
        num_replays: steps that ran from one.
        num_computed_tokens: tokens that went through the model, those computed again included.
        mapping_time_s: time the step loop waited for memory.
        background_time_s: time the look-ahead thread spent on it instead.
        step_time_s: time of all steps together.
        driver_calls: system or driver calls, by kind.
    """

    virtual_bytes: int
    physical_bytes: int
    pages_held: int
    pages_parked: int
    pages_ahead: int
    pages_limit: int
    state_bytes: int
    page_bytes: int
    growth_tokens: int
    tokens_held: int
    tokens_parked: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    prefix_hit_tokens: int
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_graphs: int
    num_replays: int
    num_computed_tokens: int
    mapping_time_s: float
    background_time_s: float
    step_time_s: float
    driver_calls: dict[str, int]


class Engine:
    """Runs requests together, one step at a time. Not for use from several threads.

    Args:
        loaded: the model.
        cache: the slots.
        backend: the attention kernels.
        scheduler: chooses the batches.
        recorder: records decode steps to replay them; None for never. Not for hybrids.
        overlap: prepare a step while the device computes the one before. Not for hybrids.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: SlotCache,
        backend: AttentionBackend,
        scheduler: Scheduler,
        recorder: Recorder | None = None,
        *,
        overlap: bool = False,
    ) -> None:
        self.loaded = loaded
        self.cache = cache
        self.scheduler = scheduler
        self.overlap = overlap
        self._under_way: LaunchedStep | None = None
        self.states: StateRows | None = None
        if loaded.keeps_state:
            assert recorder is None, "state is gathered and scattered by the host"
            assert not overlap, "state goes on from the step before"
            self.states = StateRows(loaded.model.config, cache.num_slots)
            self.runner: ModelRunner = StateRunner(loaded, cache, backend, self.states)
        else:
            self.runner = ModelRunner(
                loaded, cache, backend, recorder=recorder, max_seqs=scheduler.max_seqs
            )
        # The longest sequence that the pool could hold if it were alone.
        limit = cache.pool.limit_pages
        self._longest = bisect.bisect_right(range(cache.max_len), limit, key=cache.num_pages) - 1
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_computed_tokens = 0
        self._step_time_s = 0.0

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished."""
        return self.scheduler.has_work

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that went through the model so far."""
        return self._num_computed_tokens

    @property
    def requests(self) -> list[Request]:
        """The unfinished requests."""
        return [*self.scheduler.running, *self.scheduler.waiting]

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> list[Request]:
        """Queue a prompt: `params.n` requests, of which the others share the first one's rows.

        Raises InvalidPrompt, InvalidSamplingParams, RequestTooLong or RequestTooLarge, with
        nothing queued.
        """
        prompt = list(prompt_token_ids)
        max_tokens = self.check(prompt, params)
        requests: list[Request] = []
        for index in range(params.n):
            requests.append(
                Request(
                    request_id,
                    prompt,
                    params,
                    index=index,
                    max_tokens=max_tokens,
                    sampling=SamplingState(
                        params,
                        prompt,
                        index=index,
                        eos_token_ids=() if params.ignore_eos else self.loaded.eos_token_ids,
                    ),
                    detokenizer=self._detokenizer(prompt, params),
                    leader=requests[0] if requests else None,
                )
            )
        for request in requests:
            self.scheduler.add(request)
        return requests

    def step(self) -> list[Request]:
        """One forward pass; returns the requests that got a token by it: none without work.

        With `overlap`, those that got one by the pass before, which ran meanwhile.

        Raises a Shortage if memory is short for even one request; none is lost by that.
        """
        if not self.has_work:
            return []
        start = time.perf_counter()
        advanced = self._overlapped_step() if self.overlap else self._plain_step()
        if not self.has_work:
            self._under_way = None  # it computes what follows the ends of requests, for nobody
        self._step_time_s += time.perf_counter() - start
        return advanced

    def _plain_step(self) -> list[Request]:
        """Schedule, run, postprocess."""
        batch = self.scheduler.schedule()
        launched = self.runner.launch(batch)
        self._advance(batch, launched)
        return self._postprocess(launched)

    def _overlapped_step(self) -> list[Request]:
        """Schedule and launch a step, then postprocess the one before, while the device works.

        So a request's end is seen one step late, and what that step computed for it is dropped.
        """
        advanced: list[Request] = []
        if not all(request.can_run_ahead for request in self.scheduler.running):
            advanced += self._catch_up()
        try:
            batch = self.scheduler.schedule()
        except Shortage:
            if self._under_way is None:
                raise
            return self._catch_up()  # a request may end by it, and leave its memory to others
        if not batch:  # all wait for their last token
            return advanced + self._catch_up()
        before = self._under_way
        wait = not all(item.request.can_run_ahead for item in batch)
        launched = self.runner.launch(batch, before.tokens if before else None, wait=wait)
        self._advance(batch, launched)
        advanced += self._catch_up(launched)
        return advanced + self._catch_up() if wait else advanced

    def _catch_up(self, launched: LaunchedStep | None = None) -> list[Request]:
        """Postprocess the step under way; `launched` takes its place."""
        before, self._under_way = self._under_way, launched
        if before is None:
            return []
        try:
            return self._postprocess(before)
        except InvalidOperation:
            self._step_back()
            raise

    def _step_back(self) -> None:
        """Forget what is under way: the next step computes it again."""
        self._under_way = None
        for request in self.requests:
            request.num_pending = 0
            request.num_computed = min(request.num_computed, request.num_tokens - 1)
            request.sampling.num_output_tokens = request.num_output_tokens

    def abort(self, requests: Sequence[Request]) -> None:
        """Drop requests; the pages they hold go back at once. Finished ones are left alone."""
        for request in requests:
            if not request.is_finished:
                self.scheduler.abort(request)
                self._close_text(request)
                request.finish_reason = "abort"
        if not self.has_work:
            self._under_way = None

    def stats(self) -> EngineStats:
        """A snapshot of memory and work."""
        kv = self.cache.stats()
        graphs = self.runner.graphs
        return EngineStats(
            virtual_bytes=kv.virtual_bytes,
            physical_bytes=kv.physical_bytes,
            pages_held=kv.pages_held + kv.pages_ahead + kv.pages_parked,
            pages_parked=kv.pages_parked,
            pages_ahead=kv.pages_ahead,
            pages_limit=kv.pages_limit,
            state_bytes=self.states.num_bytes if self.states else 0,
            page_bytes=kv.page_bytes,
            growth_tokens=kv.growth_tokens,
            tokens_held=kv.tokens_held + kv.tokens_parked,
            tokens_parked=kv.tokens_parked,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_graphs=graphs.num_recordings if graphs else 0,
            num_replays=graphs.num_replays if graphs else 0,
            num_computed_tokens=self._num_computed_tokens,
            mapping_time_s=kv.mapping_time_s,
            background_time_s=kv.background_time_s,
            step_time_s=self._step_time_s,
            driver_calls=kv.driver_calls,
        )

    # -- admission checks --------------------------------------------------------------------

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Refuse what could never run; returns the most tokens that the request may generate.

        Raises as `add_request` does.
        """
        vocab_size, max_len = self.loaded.vocab_size, self.cache.max_len
        params.check_vocab(vocab_size)
        if not prompt:
            raise InvalidPrompt("the prompt has no tokens; give it at least one")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise InvalidPrompt(
                    f"token id {token} in the prompt is not in [0, {vocab_size}); was it "
                    "tokenised for another model?"
                )
        if len(prompt) >= max_len:
            raise RequestTooLong(
                f"the prompt has {len(prompt)} tokens, and max_len is {max_len} with the output; "
                "shorten it or raise max_len"
            )
        if params.stop_strings and self.loaded.tokenizer is None:
            raise InvalidSamplingParams(
                f"stop = {params.stop_strings!r} needs a tokenizer, and the model has none; use "
                "stop_token_ids"
            )
        limit = self.cache.pool.limit_pages
        max_tokens = min(params.max_tokens or max_len, max_len - len(prompt))
        if params.max_tokens is None:  # as many as fit, then
            max_tokens = max(1, min(max_tokens, self._longest - len(prompt) + 1))
        # The last token is never computed, so it needs no room.
        pages = self.cache.num_pages(len(prompt) + max_tokens - 1)
        if pages > limit:
            raise RequestTooLarge(
                f"{len(prompt)} prompt tokens with up to {max_tokens} generated need {pages} "
                f"pages, and the pool has {limit}; raise kv_memory or lower max_tokens"
            )
        return max_tokens

    def _detokenizer(
        self, prompt: Sequence[int], params: SamplingParams
    ) -> IncrementalDetokenizer | None:
        if self.loaded.tokenizer is None:
            return None
        return IncrementalDetokenizer(
            self.loaded.tokenizer,
            prompt,
            stop=params.stop_strings,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    # -- after the model ---------------------------------------------------------------------

    def _advance(self, batch: Sequence[ScheduledRequest], launched: LaunchedStep) -> None:
        """Note what will be in the slots, and which tokens will come."""
        self._num_steps += 1
        for item in batch:
            request = item.request
            prompt_left = max(0, request.num_prompt_tokens - request.num_computed)
            self._num_prompt_tokens += min(item.num_tokens, prompt_left)
            request.num_computed += item.num_tokens
            self._num_computed_tokens += item.num_tokens
        for row, request in enumerate(launched.requests):
            request.num_pending += 1
            request.pending_row = row

    def _postprocess(self, launched: LaunchedStep) -> list[Request]:
        """Append a step's tokens, but none behind the end of a request."""
        advanced: list[Request] = []
        for request, token in zip(launched.requests, launched.wait(), strict=True):
            if not request.is_finished:
                request.num_pending -= 1
                self._append(request, token)
                advanced.append(request)
        return advanced

    def _append(self, request: Request, token: SampledToken) -> None:
        """Add a token to its request; finish the request if that was its last."""
        request.token_ids.append(token.token_id)
        self._num_output_tokens += 1
        if request.first_token_time_s is None:
            request.first_token_time_s = time.monotonic()
        if token.logprobs is not None and token.logprob is not None:
            request.cumulative_logprob += token.logprob
            request.logprobs.append(
                decode_logprobs(self.loaded.tokenizer, token.logprobs)
                if self.loaded.tokenizer is not None
                else token.logprobs
            )
        params, token_id = request.params, token.token_id
        if token_id in params.stop_ids:
            self._finish(request, "stop", token_id)
        elif token_id in self.loaded.eos_token_ids and not params.ignore_eos:
            self._finish(request, "stop", None)
        else:
            if request.detokenizer is not None:
                request.detokenizer.append(token_id)
                if request.detokenizer.stopped is not None:
                    self._finish(request, "stop", request.detokenizer.stopped)
                    return
            if request.num_output_tokens >= request.max_tokens:
                self._finish(request, "length", None)

    def _finish(self, request: Request, reason: str, stop_reason: int | str | None) -> None:
        self._close_text(request)
        request.finish_reason = reason  # type: ignore[assignment]
        request.stop_reason = stop_reason
        self.scheduler.finish(request)

    @staticmethod
    def _close_text(request: Request) -> None:
        if request.detokenizer is not None:
            request.detokenizer.finish()
        request.finished_time_s = time.monotonic()
