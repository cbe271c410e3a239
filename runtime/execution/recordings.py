"""Decode steps recorded once and replayed: CUDA graphs by size of batch, or `tape` on a CPU.

A step of a small batch takes the host longer to launch than the device to run. A recording of all
its kernels is launched at once. That a slot's addresses never change is what makes it easy here:
whatever differs from step to step (tokens, positions, slots, lengths) lies in tensors that are
filled anew before a replay, and memory may be mapped behind a slot between two replays.

On a GPU batches come in a few sizes, and contexts in a few lengths: into how many parts a kernel
splits a context is part of a recording, and goes by the longest that it is played for. Beyond
`_COARSE` tokens these are twice the one before, so that no context has less than half of its parts.

A batch smaller than its size is padded with decodes that do no harm. Each
writes its keys and values to the place of some request's next token, which is mapped, and which is
not read before that token overwrites it. It attends to the first token of that slot alone. Where no
slot has such a place, the padding repeats the shortest request, and writes what that writes: of
those that have no adapter and are of no other model, for padding has neither. Where all have, the
step runs as if it were not recorded.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...allocator import Slot, SlotCache
from ...attention_backends import AttentionBatch
from ..adapters.adapters import Adapters
from ..adapters.steps import AdapterStep, adapting
from ..chains.chains import Chains
from ..chains.steps import ChainStep, chaining
from ..request.request import Batch, Padding, ScheduledRequest
from ..request.spec import ChainKey
from .step_inputs import StepInputs, StepValues

_SHORTEST = 1024  # tokens of context of the first recordings
_COARSE = 4096  # the next are for four times as many, up to here
_WARM_UPS = 2  # runs before a recording, in which libraries set themselves up

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionBatch], torch.Tensor]
"""From ids [1, B], positions [1, B] and the batch to logits [B, vocab]."""

_log = logging.getLogger(__name__)


class Unrecordable(RuntimeError):
    """What was to be recorded, or a recording, cannot stand for the run; `str()` says why."""


class Recorder(Protocol):
    """How a device records work and plays it again.

    Attributes:
        pads: batches come in a few sizes and lengths, and smaller ones are padded; otherwise every
            size has a recording of its own.
        refusal_level: of the log's entry that a model is not recorded.
    """

    pads: bool
    refusal_level: int

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Call `run`, and return a function that replays it on the same tensors.

        The first replay has the numbers that were recorded; before each later one the tensors
        are filled with others. Raises RuntimeError if something in `run` cannot be recorded. A
        replay raises it if it finds that the recording does not hold for other numbers.
        """
        ...

    def forget(self) -> None:
        """All recordings are gone."""


class CudaRecorder:
    """CUDA graphs, which share one pool of memory: only one is played at a time.

    Args:
        device: whose streams record.
        still: held during a recording, so that no thread maps or makes memory meanwhile.
    """

    pads = True
    refusal_level = logging.WARNING

    def __init__(
        self, device: torch.device, still: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._device = device
        self._still = still
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # PyTorch's handle, whose type is private

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with torch.cuda.device(self._device):
            return self._record(run)

    def _record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        stream = self._stream = self._stream or torch.cuda.Stream()
        launching = torch.cuda.current_stream()
        stream.wait_stream(launching)
        try:
            with torch.cuda.stream(stream):
                for number in range(_WARM_UPS):
                    with _Waits() if number == _WARM_UPS - 1 else nullcontext():
                        run()
                with self._still():
                    graph, out = self._capture(run)
        finally:  # what it works with may go, and be used again
            launching.wait_stream(stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    def _capture(
        self, run: Callable[[], torch.Tensor], *, is_last: bool = False
    ) -> "tuple[torch.cuda.CUDAGraph, torch.Tensor]":
        """On the current stream. Other than `torch.cuda.graph` this waits for no kernel, and
        empties no cache unless memory is short: recordings are made while requests run."""
        pool = self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = run()
            finally:
                graph.capture_end()
            return graph, out
        except torch.OutOfMemoryError:
            if is_last:
                raise
        except BaseException:
            self._end_capture(pool)
            raise
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return self._capture(run, is_last=True)

    def _end_capture(self, pool: Any) -> None:
        """After a capture that CUDA gave up. PyTorch's allocator would take it for under way, for
        good, and then give no cached memory back when it is short."""
        with suppress(RuntimeError, AttributeError):  # PyTorch has ended it, or has other names
            index = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)

    def forget(self) -> None:
        self._pool = None  # it went with the last graph


class _Waits(TorchDispatchMode):
    """Refuses, in one thread, what would have the host wait for the device: it ends a capture in
    an error that PyTorch does not recover from.

    PyTorch's own mode for it (`set_sync_debug_mode`) is every thread's, and would end copies that
    others have under way.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tags = getattr(func, "tags", ())
        looks = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        result = func(*args, **(kwargs or {})) if not looks else None
        if looks or _waits(func, args, result):
            raise Unrecordable(f"{func} waits for the device")
        return result


_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def _waits(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether an operation copied from a device to the host, or from memory there that is not
    pinned."""
    if not isinstance(result, torch.Tensor):
        return False
    sources = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if result.is_cpu:
        return any(source.is_cuda for source in sources)
    return func in _COPIES and any(s.is_cpu and not s.is_pinned() for s in sources)


Runs = tuple[tuple[ChainKey | None, int], ...]
"""Models, and how many rows of a step in turn are theirs; empty for a step of one alone."""
_Known = dict[tuple[int, int], "_Recording"]  # by how many requests, and the longest of them
_MOST_OF_CHAINS = 32  # kinds of steps of several models
_LEAST_ALIKE = 6  # of these in turn, before the next is recorded: it takes as long as several


@dataclass(frozen=True)
class _Recording:
    inputs: StepInputs
    replay: Callable[[], torch.Tensor]  # logits [size, vocab]
    adapters: AdapterStep | None


class DecodeRecordings:
    """Recordings of decode steps, made when first needed.

    Args:
        forward: the model; of the batch it may read the tensors, and as bounds `max_seqlen_q` and
            `max_seqlen_k`.
        cache: contiguous slots.
        max_seqs: the largest batch.
        adapters: of the batches' requests. Steps with adapters have recordings of their own, which
            any of them are played for; None for a model alone.
        chains: of the batches' requests. A step of several models is recorded once it has come
            several times in turn with as many requests of each; None for one alone.

    Attributes:
        refused: why the model cannot be recorded, once that was seen; then nothing is recorded.
        num_replays: steps that ran from a recording.
        recorder: what makes recordings.
    """

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        recorder: Recorder,
        device: torch.device,
        max_seqs: int,
        adapters: Adapters | None = None,
        chains: Chains | None = None,
    ) -> None:
        self._forward = forward
        self._chains = chains
        self._num_gone = 0
        self._last_runs: Runs = ()
        self._num_alike = 0
        self._adapters = adapters
        self._num_installs = 0
        self._cache = cache
        self.recorder = recorder
        self._device = device
        self._batch_sizes: Sequence[int] = range(1, max_seqs + 1)
        self._lengths = [cache.max_len]
        if recorder.pads:
            self._batch_sizes = _steps(1, 2, max_seqs)
            self._lengths = _lengths(cache.max_len)
        self._recordings: _Known = {}
        self._with_adapters: _Known = {}
        self._of_chains: dict[Runs, _Known] = {}  # those used longest ago first
        self.refused: str | None = None
        self._refused_chains = False
        self.num_replays = 0

    @property
    def num_recordings(self) -> int:
        kinds = (self._recordings, self._with_adapters, *self._of_chains.values())
        return sum(map(len, kinds))

    def run(self, batch: Batch, last_tokens: torch.Tensor | None = None) -> torch.Tensor | None:
        """Logits [len(batch), vocab] of requests that compute one token each.

        `last_tokens` has the pending ones among these tokens, as in `StepInputs.fill`.
        They are overwritten by the next call. None if the model cannot be recorded.
        """
        self.drop_gone()
        runs = _runs(batch)
        known = self._known(batch, runs)
        if known is None:
            return None
        size = _at_least(self._batch_sizes, len(batch))
        if len(batch) < size and batch.padding is None and not _plain(batch):
            return None
        values = self._values(batch, size)
        key = size, _at_least(self._lengths, max(values.kv_lens))
        recording = known.get(key)
        if recording is None:
            steps = self._adapter_step(batch, size), self._chain_step(runs, size)
            recording = self._record(values, last_tokens, key, *steps)
            if recording is None:
                return None
            known[key] = recording
        else:
            recording.inputs.fill(values, last_tokens)
            self._fill(recording.adapters, batch, size)
        try:
            logits = recording.replay()
        except RuntimeError as error:
            return self._refuse(error, of_chains=bool(runs))
        if runs and self._chains is not None:
            self._chains.count(runs)
        self.num_replays += 1
        return logits[: len(batch)]

    def drop_gone(self) -> None:
        """Drop recordings with blocks that were given back: they would keep their memory."""
        num_gone = 0 if self._chains is None else self._chains.num_gone
        if self._num_gone != num_gone:
            self._num_gone = num_gone
            self._drop(self._of_chains)

    def forget(self) -> None:
        """Drop all recordings: addresses that they hold, of weights for one, will change."""
        self._recordings.clear()
        self._with_adapters.clear()
        self._of_chains.clear()
        self.recorder.forget()

    def _drop(self, recordings: dict[Any, Any]) -> None:
        """Drop some recordings; the memory that all share goes with the last, and is not had again
        by its old name."""
        recordings.clear()
        if not self.num_recordings:
            self.recorder.forget()

    def _known(self, batch: Batch, runs: Runs) -> _Known | None:
        """The recordings for batches of this kind; None if it is not recorded."""
        if self.refused is not None:
            return None
        if any(item.request.adapter is not None for item in batch.items):
            return self._with_adapters if self._records_adapters() else None
        return self._known_of(runs) if runs else self._recordings

    def _known_of(self, runs: Runs) -> _Known | None:
        """The recordings of steps of several models."""
        self._num_alike = self._num_alike + 1 if runs == self._last_runs else 1
        self._last_runs = runs
        if self._refused_chains or (
            runs not in self._of_chains and self._num_alike <= _LEAST_ALIKE
        ):
            return None
        found = self._of_chains[runs] = self._of_chains.pop(runs, {})
        if len(self._of_chains) > _MOST_OF_CHAINS:
            del self._of_chains[next(iter(self._of_chains))]
        return found

    def _records_adapters(self) -> bool:
        """Whether steps with adapters are recorded; those of before other modules had any go."""
        assert self._adapters is not None, "a request has an adapter"
        if self._num_installs != self._adapters.num_installs:
            self._num_installs = self._adapters.num_installs
            self._drop(self._with_adapters)
        return self._adapters.products.records

    def _fill(self, step: AdapterStep | None, batch: Batch, size: int) -> None:
        """Say whose the rows of a recorded step are now; padding is nobody's."""
        if step is not None:
            assert self._adapters is not None
            tables = [self._adapters.table(item.request.adapter) for item in batch.items]
            step.fill([*((table, 1) for table in tables), (None, size - len(batch))])

    def _adapter_step(self, batch: Batch, size: int) -> AdapterStep | None:
        if all(item.request.adapter is None for item in batch.items):
            return None
        assert self._adapters is not None, "a request has an adapter"
        step = self._adapters.step(size, is_recorded=True)
        self._fill(step, batch, size)
        return step

    def _record(
        self,
        values: StepValues,
        last_tokens: torch.Tensor | None,
        key: tuple[int, int],
        step: AdapterStep | None,
        chain_step: ChainStep | None,
    ) -> _Recording | None:
        size, length = key
        inputs = StepInputs(size, size, self._device)
        inputs.fill(values, last_tokens)

        def run() -> torch.Tensor:
            # A batch of its own for each run, for backends keep by its identity what they derive
            # from it, and a recording must contain how that is derived.
            bounds = inputs.batch([1] * size, [length] * size, [0] * size)
            with adapting(step), chaining(chain_step):
                return self._forward(inputs.ids, inputs.positions, bounds)

        try:
            return _Recording(inputs, self.recorder.record(run), step)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            return self._refuse(error, of_chains=chain_step is not None)

    def _chain_step(self, runs: Runs, size: int) -> ChainStep | None:
        """For rows of several models, and padding, which is nobody's; ready to be recorded."""
        if not runs:
            return None
        assert self._chains is not None, "a request is of another model"
        missing = size - sum(count for _, count in runs)
        return self._chains.step([*runs, (None, missing)], None, self._device, is_recorded=True)

    def _refuse(self, error: Exception, *, of_chains: bool = False) -> None:
        if of_chains:
            self._refused_chains = True
            self._drop(self._of_chains)
        else:
            self.refused = str(error)
            self.forget()
        _log.log(
            self.recorder.refusal_level,
            "decode steps are not recorded and run one kernel at a time: %s",
            error,
        )

    def _values(self, batch: Batch, size: int) -> StepValues:
        """The step's numbers, padded to `size` requests."""
        slots = [_slot(item) for item in batch.items]
        starts = [item.start for item in batch.items]
        ids = [item.request.ids(item.start, item.start + 1)[0] for item in batch.items]
        positions, kv_lens = list(starts), [start + 1 for start in starts]
        if missing := size - len(batch):
            position = 0  # the padding attends to the first token of its slot alone
            padding = batch.padding
            if padding is None:
                padding, position = _repeated(batch)
            slots += [padding.slot] * missing
            starts += [padding.write_at] * missing
            ids += [padding.token_id] * missing
            positions += [position] * missing
            kv_lens += [position + 1] * missing
        rows, offsets = self._cache.locate(slots, starts, [1] * size)
        return StepValues(
            ids=ids,
            positions=positions,
            write_rows=rows,
            write_offsets=offsets,
            query_lens=[1] * size,
            kv_lens=kv_lens,
            slots=[slot.index for slot in slots],
        )


def _repeated(batch: Batch) -> tuple[Padding, int]:
    """The shortest plain request once more, which writes what that writes; and its position."""
    shortest = min(_plain(batch), key=lambda item: item.start)
    (token,) = shortest.request.ids(shortest.start, shortest.start + 1)
    return Padding(_slot(shortest), shortest.start, token), shortest.start


def _plain(batch: Batch) -> list[ScheduledRequest]:
    """What the model alone computes."""
    return [i for i in batch.items if i.request.adapter is None and i.request.chain is None]


def _runs(batch: Batch) -> Runs:
    """Whose the rows are, in their order; nothing if all are the model's own."""
    if all(item.request.chain is None for item in batch.items):
        return ()
    grouped = groupby(batch.items, key=lambda item: item.request.chain)
    return tuple((chain, len(list(items))) for chain, items in grouped)


def _slot(item: ScheduledRequest) -> Slot:
    assert item.request.slot is not None, "a scheduled request has no slot"
    return item.request.slot


def _steps(first: int, factor: int, last: int) -> list[int]:
    """`first`, `first · factor`, … below `last`, and `last`."""
    steps = [first]
    while steps[-1] < last:
        steps.append(min(steps[-1] * factor, last))
    return steps


def _lengths(max_len: int) -> list[int]:
    """Tokens of context that recordings are for."""
    coarse = _steps(min(_SHORTEST, max_len), 4, min(_COARSE, max_len))
    return [*coarse[:-1], *_steps(coarse[-1], 2, max_len)]


def _at_least(steps: Sequence[int], value: int) -> int:
    return next(step for step in steps if step >= value)
