"""The step: schedule, run, postprocess."""

import logging
import time
from collections.abc import Collection

from torch import Tensor

from ...allocator import KVStats, Slot, SlotCache
from ...vmem.errors import (
    InvalidOperation,
    RequestTooLong,
    Shortage,
    UsageError,
    VkvError,
)
from ...vmem.native_function import workspace_bytes
from ..execution.grammars import Grammars, check_grammars
from ..execution.launched_step import LaunchedStep
from ..execution.model_runner import ModelRunner
from ..execution.sampler import NO_TOKEN, SampledToken
from ..model.fingerprint import ModelFingerprint
from ..model.segments import HolderLost, SegmentServer
from ..model.weights import ModelWatch
from ..request.continuation import Continuation
from ..request.outputs import FinishReason
from ..request.request import Batch, Request, RequestState
from ..request.sampling_params import SamplingParams
from ..request.sampling_state import SamplingState
from ..request.spec import ChainKey, RequestSpec, SequenceKey
from ..request.step_output import Failure, StepOutput
from ..request.token_grammar import TokenGrammar
from ..scheduling.scheduler import Scheduler
from .admission import Admission
from .endings import End, end_of, told_end, told_token, typed
from .memory.extra_weights import ExtraWeights
from .memory.segments import take_back
from .stats import EngineStats, SegmentStats, SwapStats

_log = logging.getLogger(__name__)

_MOVE_WAIT_S = 0.05  # for keys and values on their way, before messages are looked at again
_MOST_ASIDE = 16  # steps, in which others have had their turn


class Engine:
    """Runs requests together, one step at a time. It knows tokens and no text.

    Not for use from several threads, nor driven by anything but an `EngineLoop`. One class, since
    requests, the step under way and a change of the model all meet in the same state.

    Args:
        runner: runs the model.
        cache: the slots.
        scheduler: chooses the batches.
        admission: refuses what could never run.
        eos_token_ids: tokens that end a generation.
        grammars: what `structured_outputs` are compiled by; None for a model without a tokenizer.
        watch: notices that somebody changed the model; None to look for nothing.
        fingerprint: what files of keys and values know the model by; None to have none.
        extras: adapters and other models that requests may name; None for a model alone.
        overlap: prepare a step while the device computes the one before. Not for hybrids.
        step_bytes: the most that tensors of a step take; for `stats`.

    Attributes:
        num_computed_tokens: tokens that went through the model so far.
        lender: lends its memory to other engines; None if nobody does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: SlotCache,
        scheduler: Scheduler,
        admission: Admission,
        *,
        eos_token_ids: Collection[int],
        grammars: Grammars | None = None,
        watch: ModelWatch | None = None,
        fingerprint: ModelFingerprint | None = None,
        extras: ExtraWeights | None = None,
        overlap: bool = False,
        step_bytes: int = 0,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.scheduler = scheduler
        self.admission = admission
        self.grammars = grammars
        self.watch = watch
        self.fingerprint = fingerprint
        self.extras = extras or ExtraWeights()
        self.overlap = overlap
        self._step_bytes = step_bytes
        self._eos_token_ids = frozenset(eos_token_ids)
        self._requests: dict[str, list[Request]] = {}
        self._outputs: list[StepOutput] = []  # that no one has taken yet
        self._under_way: LaunchedStep | None = None
        self._aside: dict[Request, int] = {}  # that lack memory for weights, and for how many steps
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self.num_computed_tokens = 0
        self.lender: SegmentServer | None = None
        self._num_failed = 0
        self._step_time_s = 0.0

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished."""
        return self.scheduler.has_work

    @property
    def is_caught_up(self) -> bool:
        """True if no step is under way."""
        return self._under_way is None

    @property
    def requests(self) -> list[Request]:
        """The unfinished requests, in the order in which they came."""
        return self.scheduler.requests

    # -- requests ----------------------------------------------------------------------------

    def add(self, spec: RequestSpec) -> list[Request]:
        """Queue a prompt: `params.n` requests, of which each further one starts from a copy of the
        first one's slot, whose whole pages they share.

        Raises a `UsageError`, with nothing queued.
        """
        max_tokens = self._check(spec)
        if spec.request_id in self._requests:
            raise UsageError(f"request {spec.request_id!r} is unfinished; use another id")
        requests = [self._make(spec, index, max_tokens) for index in range(spec.params.n)]
        for request in requests:
            self._remember(request)
            self.scheduler.add(request)
        return requests

    def _check(
        self, spec: RequestSpec, *, goes_on: bool = False, max_tokens: int | None = None
    ) -> int:
        """Refuse what could never run; returns the most tokens that it may generate, `max_tokens`
        at most if an engine has found that before."""
        self.extras.check(spec, goes_on=goes_on)
        return self.admission.check(
            spec.prompt_token_ids, spec.params, max_tokens=max_tokens, was_let_in=goes_on
        )

    def _ends(self, chain: ChainKey | None) -> Collection[int]:
        """Tokens that end a text of a model."""
        own = self._eos_token_ids
        return own if chain is None else self.extras.eos_token_ids(chain, own)

    def _make(self, spec: RequestSpec, index: int, max_tokens: int) -> Request:
        ends = () if spec.params.ignore_eos else self._ends(spec.chain)
        return Request(
            spec,
            index=index,
            max_tokens=max_tokens,
            sampling=SamplingState(
                spec.params,
                spec.prompt_token_ids,
                index=index,
                eos_token_ids=ends,
                bad_words=spec.bad_words,
                grammar=self._grammar(spec.params, ends),
                seed=spec.seed,
            ),
            leader=(spec.request_id, 0) if index else None,
        )

    def resume(self, continuation: Continuation) -> Request:
        """Queue a sequence that goes on; it is first in line if it has had a slot before.

        Raises a `UsageError`, with nothing queued.
        """
        request = self.restore(continuation)
        if continuation.output_token_ids or request.was_admitted:
            self.put_in(request)
        else:
            self._remember(request)
            self.scheduler.add(request)
        return request

    def restore(self, continuation: Continuation, earlier: Request | None = None) -> Request:
        """The request that a sequence goes on as, not queued yet. Raises a `UsageError`.

        `earlier` is what this returned for it when it had fewer tokens; it is brought up to now.
        """
        spec, (request_id, index) = continuation.spec, continuation.key
        if index >= spec.params.n:
            raise UsageError(f"request {request_id!r} has {spec.params.n} outputs, and no {index}")
        wanted = continuation.max_tokens
        max_tokens = self._check(spec, goes_on=True, max_tokens=wanted)
        self.admission.check_tokens(continuation.output_token_ids)
        if wanted is not None and wanted > max_tokens:
            raise RequestTooLong(
                f"request {request_id!r} may have {wanted} tokens, and has room for {max_tokens} "
                "here; let it go on where max_len and memory are at least those that it came from"
            )
        if self.find(continuation.key) is not None:
            raise UsageError(f"output {index} of request {request_id!r} is unfinished here")
        request = earlier or self._make(spec, index, max_tokens)
        continuation.restore(request)
        return request

    def find(self, key: SequenceKey) -> Request | None:
        """An unfinished request; None if it is not here."""
        found = (request for request in self._requests.get(key[0], ()) if request.key == key)
        return next(found, None)

    def take_out(self, request: Request) -> None:
        """Let a request go out of sight, as it stands and with its slot: nothing is told of it.

        No step may be under way (`catch_up`).
        """
        self.scheduler.take_out(request)
        self._forget(request)

    def put_in(self, request: Request, slot: Slot | None = None, num_computed: int = 0) -> None:
        """Let a request that is not here go on: with a slot that holds `num_computed` of its tokens
        at once, without one as soon as it gets one. One that has all its tokens ends.
        """
        self._remember(request)
        request.num_computed = num_computed
        self.scheduler.put_in(request, slot)
        if request.num_output_tokens:
            end = end_of(request, self._ends(request.chain))
            if end.reason is not None:
                self._outputs.append(told_end(request, end))
                self._leave(request, keep=True)

    def _grammar(self, params: SamplingParams, ends: Collection[int]) -> TokenGrammar | None:
        """A place in the grammar that an output is to follow, which is compiled if nobody did."""
        if params.structured_outputs is None:
            return None
        return check_grammars(self.grammars).start(params.structured_outputs, ends)

    def abort(self, request_id: str) -> None:
        """Drop all that is unfinished of a request; its pages go back at once."""
        for request in list(self._requests.get(request_id, ())):
            self._end(request, "abort")

    def finish(self, request_id: str, index: int) -> None:
        """End a sequence that has all the text it needs; without an output."""
        for request in list(self._requests.get(request_id, ())):
            if request.key[1] == index:
                self._leave(request, keep=True)

    def set_priority(self, request_id: str, priority: int) -> None:
        """Give all that is unfinished of a request another priority."""
        for request in self._requests.get(request_id, ()):
            self.scheduler.waiting.set_priority(request, priority)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request by an error; without effect on one that has ended."""
        if not request.is_finished:
            self._num_failed += 1
            self._end(request, "error", failure=Failure.of(typed(error)))

    def take_outputs(self) -> list[StepOutput]:
        """What requests got since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def tell_abort(self, request: Request) -> None:
        """Say of a request that is out of sight that it was aborted."""
        self._outputs.append(told_end(request, End("abort")))

    # -- the step ----------------------------------------------------------------------------

    def step(self) -> None:
        """One forward pass over what can go on; nothing without work.

        With `overlap`, requests get the tokens of the pass before, which ran meanwhile.
        `scheduler.shortage` says whether memory was short for even one request.
        """
        if not self.has_work:
            return
        start, num_before = time.perf_counter(), self.num_computed_tokens
        self.notice_changes(thoroughly=bool(self.scheduler.waiting))
        if self.overlap:
            self._overlapped_step()
        else:
            self._plain_step()
        self._drop_step_if_idle()
        step_s = time.perf_counter() - start
        self._step_time_s += step_s
        self.scheduler.tiers.note_step(self.num_computed_tokens - num_before, step_s)

    def trim(self) -> int:
        """Give what no live request needs back to the system; returns the bytes."""
        num_bytes = self.scheduler.tiers.trim() + self.cache.trim()
        if self.scheduler.speculation is not None:
            num_bytes += self.scheduler.speculation.drafter.trim()
        if not self.has_work:
            num_bytes += self.extras.forget()
            if self.runner.recordings is not None:
                self.runner.recordings.drop_gone()
        return num_bytes

    def weights_changed(self) -> None:
        """Drop all that was computed with the model as it was: recordings, parked keys and values,
        open files of them.

        Unfinished requests keep their tokens, and their keys and values are computed again.

        Raises InvalidOperation or UnsupportedModel if the model does not fit any more; so do
        requests end from then on.
        """
        self.catch_up()
        for request in self.scheduler.running[::-1]:  # so that they come back in their order
            self.scheduler.preempt(request, keep=False)
        self.scheduler.tiers.forget()
        self.cache.trim()  # last: what is being copied could not be trimmed
        if self.fingerprint is not None:
            self.fingerprint.renew()
        if self.watch is not None:
            layers = self.watch.learn()
            recordable = not self.watch.has_hooks
            self.runner.model_changed(layers, recordable=recordable)
            if self.scheduler.speculation is not None:
                self.scheduler.speculation.drafter.model_changed(layers, recordable=recordable)
        self.extras.model_changed()

    def notice_changes(self, *, thoroughly: bool = True) -> None:
        """Look whether somebody changed the model: thoroughly where a prompt is computed next."""
        if self.watch is None:
            return
        try:
            change = self.watch.change(thoroughly=thoroughly)
            if change is not None:
                _log.warning("%s while vkv.LLM has the model; all is computed anew", change)
                self.weights_changed()
        except VkvError as error:
            self.catch_up()
            for request in self.requests:
                self.fail(request, error)

    def _plain_step(self) -> None:
        batch = self._next_batch()
        if not batch.items:
            self.scheduler.tiers.wait(self.scheduler.running, _MOVE_WAIT_S)
        elif launched := self._launch(batch, None, wait=True):
            self._postprocess(launched)

    def _overlapped_step(self) -> None:
        """Schedule and launch a step, then postprocess the one before, while the device works.

        So a request's end is seen one step late, and what that step computed for it is dropped.
        """
        if not all(request.can_run_ahead for request in self.scheduler.running):
            self.catch_up()
        batch = self._next_batch()
        if not batch.items:  # all wait for their last token, or for memory that an end may bring
            if self._under_way is not None:
                self.catch_up()
                self.scheduler.shortage = None  # which was found before those ends
            else:
                self.scheduler.tiers.wait(self.scheduler.running, _MOVE_WAIT_S)
            return
        before = self._under_way
        wait = not batch.can_run_ahead
        launched = self._launch(batch, before.tokens if before else None, wait=wait)
        self.catch_up(launched)
        if wait:
            self.catch_up()

    def _next_batch(self) -> Batch:
        """What the next step computes. Once one that runs has lacked weights for more steps than
        taking turns explains, nobody is let in, who would take the memory that it waits for."""
        self.scheduler.holds_back = any(
            num_steps >= _MOST_ASIDE and request.state is RequestState.RUNNING
            for request, num_steps in self._aside.items()
        )
        return self._with_weights(self.scheduler.schedule())

    def _with_weights(self, batch: Batch) -> Batch:
        """The batch, without requests whose weights cannot be in memory now: they stand aside for a
        step, or end if they never will be.
        """
        batch, lacking = self.extras.provide(batch)
        for request, error in lacking:
            if not isinstance(error, Shortage):
                self.catch_up()
                self.fail(request, error)
        aside = [(request, error) for request, error in lacking if isinstance(error, Shortage)]
        ran = {item.request for item in batch.items}
        self._aside = {
            request: num_steps
            for request, num_steps in self._aside.items()
            if not (request.is_finished or request in ran)
        }
        for request, _ in aside:
            self._aside[request] = self._aside.get(request, 0) + 1
        if not lacking:
            return batch
        if aside:
            tiers = self.scheduler.tiers
            is_coming = tiers.give_way() or tiers.is_moving(self.scheduler.running)
            if not (batch.items or is_coming):
                self.scheduler.shortage = aside[0]
        return Batch(tuple(item for item in batch.items if not item.request.is_finished))

    def _launch(
        self, batch: Batch, last_tokens: Tensor | None, *, wait: bool
    ) -> LaunchedStep | None:
        """Run a batch, and note what will be in the slots, and which tokens will come.

        None if the model failed; so have the batch's requests then. None, too, if a holder of
        segments was lost: then all of the batch are computed again, most of them in the next step.
        """
        try:
            launched = self.runner.launch(batch, last_tokens, wait=wait)
        except HolderLost as lost:
            self.catch_up()
            take_back(self.scheduler, lost)
            return None
        except Exception as error:  # noqa: BLE001 - told to the requests of the batch, and logged
            _log.exception("a step of %d requests failed", len(batch))
            self.catch_up()
            for item in batch.items:
                self.fail(item.request, error)
            return None
        self._num_steps += 1
        for item in batch.items:
            request = item.request
            prompt_left = max(0, request.num_prompt_tokens - request.num_computed)
            self._num_prompt_tokens += min(item.num_tokens, prompt_left)
            request.num_computed += item.num_tokens
            self.num_computed_tokens += item.num_rows
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.note_step(batch.items, launched.num_tokens())
        for index, request in enumerate(launched.requests):
            request.num_pending += 1
            request.pending_index = index
        return launched

    def catch_up(self, launched: LaunchedStep | None = None) -> None:
        """Postprocess the step under way; `launched` takes its place."""
        before, self._under_way = self._under_way, launched
        if before is not None:
            self._postprocess(before)

    def _drop_step_if_idle(self) -> None:
        if not self.has_work:
            self._under_way = None  # it computes what follows the ends of requests, for nobody
            if self.scheduler.speculation is not None:
                self.scheduler.speculation.drafter.let_go()
            self.extras.rest()

    # -- after the model ---------------------------------------------------------------------

    def _postprocess(self, launched: LaunchedStep) -> None:
        """Append a step's tokens, but none behind the end of a request."""
        try:
            tokens = launched.wait()
        except Exception as error:  # noqa: BLE001 - told to the requests of the step, and logged
            _log.exception("a step of %d requests failed", len(launched.computed))
            for request in launched.computed:
                self.fail(request, error)
            return
        for request, some in zip(launched.requests, tokens, strict=True):
            request.num_pending -= not request.is_finished
            for token in some:
                if request.is_finished:
                    break
                if token.is_finite:
                    self._append(request, token)
                else:
                    self.fail(request, InvalidOperation(request.sampling.failure or NO_TOKEN))

    def _append(self, request: Request, token: SampledToken) -> None:
        """Add a token to its request; finish the request if that was its last."""
        request.token_ids.append(token.token_id)
        self._num_output_tokens += 1
        self.scheduler.accounts.generated(request)
        end = end_of(request, self._ends(request.chain))
        self._outputs.append(told_token(request, token, end))
        if end.reason is not None:
            self._leave(request, keep=True)

    def _end(self, request: Request, reason: FinishReason, failure: Failure | None = None) -> None:
        """End a request before its time."""
        self._outputs.append(told_end(request, End(reason), failure))
        self._leave(request, keep=False)

    def _leave(self, request: Request, *, keep: bool) -> None:
        if keep:
            self.scheduler.finish(request)
        else:
            self.scheduler.abort(request)
        self._forget(request)

    def _remember(self, request: Request) -> None:
        self._requests.setdefault(request.key[0], []).append(request)
        self.extras.hold(request)

    def _forget(self, request: Request) -> None:
        siblings = self._requests[request.key[0]]
        siblings.remove(request)
        if not siblings:
            del self._requests[request.key[0]]
        self.extras.let_go(request)
        self._drop_step_if_idle()

    # -- what it holds -----------------------------------------------------------------------

    @property
    def loans_are_placed(self) -> bool:
        """Whether somebody decides what may be lent, so that who waits for it gets it in time."""
        segments = self.scheduler.tiers.segments
        return segments is not None and segments.loans.limits is not None

    def stats(self, kv: KVStats | None = None) -> EngineStats:
        """Memory and work, from counters; `kv`, if the cache has been asked already."""
        recordings, tiers = self.runner.recordings, self.scheduler.tiers
        swapping = tiers.swapping
        speculation = self.scheduler.speculation
        models, blocks = self.extras.chain_stats(self._requests)
        return EngineStats(
            kv=self.cache.stats() if kv is None else kv,
            state_bytes=self.runner.state_bytes,
            working_bytes=self._step_bytes + workspace_bytes(),
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_failed=self._num_failed,
            num_recordings=recordings.num_recordings if recordings else 0,
            num_replays=recordings.num_replays if recordings else 0,
            num_computed_tokens=self.num_computed_tokens,
            step_time_s=self._step_time_s,
            num_drafted=speculation.num_drafted if speculation else 0,
            num_accepted=speculation.num_accepted if speculation else 0,
            speculation=speculation.stats() if speculation else None,
            swap=SwapStats.of(swapping) if swapping is not None else None,
            segments=self._segment_stats(),
            tenants=self.scheduler.accounts.stats(),
            adapters=self.extras.adapter_stats(),
            models=models,
            blocks=blocks,
        )

    def _segment_stats(self) -> SegmentStats | None:
        tiers = self.scheduler.tiers
        if tiers.segments is None:
            return None
        return SegmentStats.of(tiers.segments, self.scheduler.running, self.lender)
