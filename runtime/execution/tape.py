"""Decode steps recorded on a CPU: the calls of kernels that a step made, made again.

A model's Python takes as long as a third of a small batch's step. What a step does hardly changes
from one to the next, and its numbers lie in tensors at fixed addresses (`recordings`). So a step is
watched once: every call of vkv's kernels is kept with its arguments, every other operation of
PyTorch with its tensors. A replay makes the calls again. Kernels that follow one another are one
call from Python; operations of PyTorch are a call each.

The model's code stays as it is. PyTorch's operations are watched by a dispatch mode below it,
kernels by an observer (`NativeFunction`). What a step allocates lies in a pool that all recordings
share, since one is played at a time. Memory is used again within a step as it was when the step
was watched.
"""

import ctypes
import gc
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...vmem.native_function import NativeFunction, Workspace, observed
from ..cpu_kernels import kernels as native_kernels
from ..cpu_kernels.kernels import Call
from .recordings import Unrecordable

_ALIGNMENT = 64
_NUM_COMPARED = 3  # recordings whose replay is compared with a run
_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)
# What a model may call that depends on numbers, without a tag or an operation to show for it.
_READS = ("tolist", "numpy", "__array__", "item", "__dlpack__")
_LOOKS = (
    "aten.where.default",
    "aten.nonzero_numpy.default",
    "aten.repeat_interleave.self_Tensor",
    "aten.tensor_split.tensor_indices_or_sections",
    "aten.narrow.Tensor",
)


class KernelClock:
    """Seconds of a replayed step by kernel, each call timed by itself.

    Attributes:
        seconds: by name: that of the `NativeFunction`, or "torch" for all operations of PyTorch.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def time(self, name: str, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        self.seconds[name] += time.perf_counter() - start


class TapeRecorder:
    """Records what runs on a CPU, where work ends before the call that starts it returns.

    Attributes:
        clock: if set, replays make one call at a time, and time it.
    """

    pads = False  # a recording is cheap to make, a padded decode costs as much as any other
    refusal_level = logging.INFO  # many a model decides in Python; it runs as it always did

    def __init__(self) -> None:
        self.clock: KernelClock | None = None
        self._pool = _Pool()
        self._num_recorded = 0

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        tape = _Tape(self._pool)
        with observed(tape.add_call), _Guard(), tape:
            out = run()
        self._pool.check_free(but=out)
        self._num_recorded += 1
        compared = run if self._num_recorded <= _NUM_COMPARED else None
        return _Replay(self, tape, out, compared)

    def forget(self) -> None:
        self._pool = _Pool()
        self._num_recorded = 0  # what is recorded next is compared again


class _Pool:
    """Memory that recordings share. A stretch is free once no tensor of the model lies in it."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._stretches: dict[int, list[torch.Tensor]] = {}  # by size
        self._owned: set[int] = set()  # addresses
        self._uses_when_free = _uses(torch.empty(_ALIGNMENT, dtype=torch.uint8))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without gaps, in memory that no other tensor lies in."""
        num_bytes = math.prod(shape) * dtype.itemsize
        stretch = self._free(_rounded(num_bytes))
        return stretch[:num_bytes].view(dtype).view(shape)

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._owned

    def check_free(self, *, but: torch.Tensor) -> None:
        """Raises Unrecordable if the model keeps a tensor, which replays would overwrite."""
        mine = but.untyped_storage().data_ptr()
        for collect in (True, False):
            stretches = (stretch for group in self._stretches.values() for stretch in group)
            if all(s.data_ptr() == mine or _uses(s) == self._uses_when_free for s in stretches):
                return
            if collect:
                gc.collect()
        raise Unrecordable("a tensor of the step is kept for the next")

    def _free(self, num_bytes: int) -> torch.Tensor:
        stretches = self._stretches.setdefault(num_bytes, [])
        for stretch in stretches:
            if _uses(stretch) == self._uses_when_free:
                return stretch
        stretches.append(torch.empty(num_bytes, dtype=torch.uint8))
        self._owned.add(stretches[-1].untyped_storage().data_ptr())
        return stretches[-1]


class _Guard(TorchFunctionMode):
    """Refuses what reads a tensor's numbers unseen by the tape."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _READS:
            raise Unrecordable(f"Tensor.{func.__name__} depends on what tensors hold")
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    """What one thread does meanwhile, in order."""

    def __init__(self, pool: _Pool) -> None:
        super().__init__()
        self.pool = pool
        self.steps: list[Callable[[], None] | list[_NativeCall]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tags = getattr(func, "tags", ())
        looks = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        if looks or str(func) in _LOOKS:
            raise Unrecordable(f"{func} depends on what tensors hold")
        idle_dropout = func is torch.ops.aten.dropout.default and not args[2]
        if torch.Tag.nondeterministic_seeded in tags and not idle_dropout:
            raise Unrecordable(f"{func} draws random numbers")
        if func in _EMPTY and _is_on_cpu(kwargs):
            return self._empty(func, args, kwargs)
        if func is torch.ops.aten.add.Tensor and self._adds_plainly(args, kwargs):
            out = self.pool.take(args[0].shape, args[0].dtype)
            native_kernels.add(args[0], args[1], out)  # watched as all kernels are
            return out
        known = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._again(func, args, kwargs, ())
            return result
        values, layout = tree_flatten(result)
        outs = [None if value is None else self._fresh(func, value, known) for value in values]
        if any(out is not None for out in outs):
            self._again(func, args, kwargs, outs)
        kept = (value if out is None else out for value, out in zip(values, outs, strict=True))
        return tree_unflatten(list(kept), layout)

    def _fresh(self, func: Any, value: Any, known: set[int]) -> torch.Tensor | None:
        """A result moved to the pool; None if it is a view of what went in."""
        if not isinstance(value, torch.Tensor):
            raise Unrecordable(f"{func} returns {type(value).__name__}, not a tensor")
        if not _is_strided(value) or not value.is_cpu:
            raise Unrecordable(f"{func} returns a tensor of another kind")
        if _memory(value) in known:
            return None
        return self.pool.take(value.shape, value.dtype).copy_(value)

    def add_call(self, kernel: NativeFunction, args: Sequence[ctypes.Structure]) -> None:
        """Keep a call of a kernel."""
        if not self.steps or not isinstance(self.steps[-1], list):
            self.steps.append([])
        assert isinstance(self.steps[-1], list)
        self.steps[-1].append(_NativeCall(kernel, args))

    def _adds_plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether vkv's kernel can add these, which stay where they are."""
        left, right = args[:2]
        return (
            not kwargs
            and isinstance(right, torch.Tensor)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and all(x.is_contiguous() and self.pool.owns(x) for x in (left, right))
            and native_kernels.available(left.dtype)
        )

    def _empty(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        like = args[0] if isinstance(args[0], torch.Tensor) else None
        shape: Any = args[0] if like is None else args[1]
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
        return self.pool.take(shape, dtype)

    def _again(
        self, func: Any, args: Any, kwargs: dict[str, Any], outs: Sequence[torch.Tensor | None]
    ) -> None:
        """Keep an operation, on tensors that do not hold on to the pool's memory."""
        args, kwargs, outs = tree_map(self._detached, (args, kwargs, list(outs)))

        def again() -> None:
            results = func(*args, **kwargs)
            for out, found in zip(outs, tree_flatten(results)[0] if outs else (), strict=True):
                if out is None:
                    continue
                if out.shape != found.shape:
                    raise Unrecordable(f"{func} came to another shape")
                out.copy_(found)

        self.steps.append(again)

    def _detached(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not _is_strided(value):
            return value
        return _unowned(value) if self.pool.owns(value) else value


class _NativeCall:
    """A kernel, and arguments of the recording's own."""

    def __init__(self, kernel: NativeFunction, args: Sequence[ctypes.Structure]) -> None:
        self.kernel = kernel
        self.args = [type(struct).from_buffer_copy(struct) for struct in args]

    def in_c(self) -> Call:
        first, second = (*map(ctypes.addressof, self.args), None)[:2]
        return Call(function=self.kernel.address, first=first, second=second)


class _Replay:
    """Plays a tape. The first time, that has been done: it was watched.

    With `run`, what comes out the second time, of other numbers, must be what the model computes.
    """

    def __init__(
        self,
        recorder: TapeRecorder,
        tape: _Tape,
        out: torch.Tensor,
        run: Callable[[], torch.Tensor] | None,
    ) -> None:
        if not tape.pool.owns(out):
            raise Unrecordable("the logits are no result of what was recorded")
        self._recorder = recorder
        self._out = _unowned(out)
        self._pool = tape.pool  # whose memory the arguments point to
        self._run = run
        self._is_done = True
        self._parts: list[Callable[[], None]] = [
            _Calls(step, tape.pool.workspace) if isinstance(step, list) else step
            for step in tape.steps
        ]

    def __call__(self) -> torch.Tensor:
        if self._is_done:
            self._is_done = False
            return self._out
        expected = None if self._run is None else self._run()
        clock = self._recorder.clock
        for part in self._parts:
            if clock is None:
                part()
            elif isinstance(part, _Calls):
                part.timed(clock)
            else:
                clock.time("torch", part)
        if expected is not None:
            self._run = None
            found, expected = (x.contiguous().flatten() for x in (self._out, expected))
            if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
                raise Unrecordable("a replayed step came to other logits")
        return self._out


class _Calls:
    """Calls of kernels, one after the other, in one call from Python."""

    def __init__(self, calls: Sequence[_NativeCall], workspace: Workspace) -> None:
        self._names = [call.kernel.name for call in calls]
        self._structs = [struct for call in calls for struct in call.args]
        self._calls = (Call * len(calls))(*(call.in_c() for call in calls))
        self._needed = ctypes.c_int64()
        self._workspace = workspace
        self._settings: dict[str, int] = {}  # that the arguments have now

    def __call__(self) -> None:
        self._make(0, len(self._calls))

    def timed(self, clock: KernelClock) -> None:
        """The same, in as many calls as there are."""
        for index, name in enumerate(self._names):
            clock.time(name, lambda index=index: self._make(index, index + 1))

    def _make(self, done: int, last: int) -> None:
        self._set("num_threads", torch.get_num_threads())
        self._set_workspace()
        library = native_kernels.library()
        while True:
            done = library.vkv_replay(self._calls, done, last, ctypes.byref(self._needed))
            if done == last:
                return
            assert self._needed.value > 0, "kernels that run once run again"
            self._workspace.grow(self._needed.value)
            self._set_workspace()

    def _set_workspace(self) -> None:
        self._set("workspace", self._workspace.address)
        self._set("workspace_bytes", self._workspace.num_bytes)

    def _set(self, name: str, value: int) -> None:
        """Set an argument of all kernels that have it, unless it is set."""
        if self._settings.get(name) == value:
            return
        self._settings[name] = value
        for struct in self._structs:
            if hasattr(struct, name):
                setattr(struct, name, value)


def _is_on_cpu(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") in (None, torch.device("cpu"))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_mkldnn


def _memory(tensor: torch.Tensor) -> int:
    """What tells a tensor's memory from that of others."""
    return tensor.untyped_storage().data_ptr() if _is_strided(tensor) else id(tensor)


def _uses(tensor: torch.Tensor) -> int:
    """Tensors and the like that hold on to the tensor's memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, not holding on to its memory, which the pool keeps."""
    storage = tensor.untyped_storage()
    memory = (ctypes.c_char * int(storage.nbytes())).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _rounded(num_bytes: int) -> int:
    """A power of two, so that batches of about one size share memory."""
    return max(_ALIGNMENT, 1 << (num_bytes - 1).bit_length()) if num_bytes else _ALIGNMENT
