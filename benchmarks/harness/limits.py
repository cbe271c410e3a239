"""The machine's own limits, measured in the run that quotes them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

_READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # far beyond any cache
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What memory and matrix units give at best, with the threads in use.

    Attributes:
        read_bytes_per_s: reading memory once, in order.
        flops_per_s: a large product of square matrices, two operations a multiply-add.
        dtype: of those matrices.
        read_samples, flops_samples: the measurements whose medians these are, in order; none in
            records that measured once.
    """

    read_bytes_per_s: float
    flops_per_s: float
    dtype: str
    read_samples: tuple[float, ...] = ()
    flops_samples: tuple[float, ...] = ()

    @classmethod
    def from_record(cls, fields: Mapping[str, Any]) -> Self:
        """From the `limits` of a record, where JSON has made lists of tuples."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**plain)

    def __str__(self) -> str:
        times = len(self.read_samples)
        how = f", medians of {times} measurements across it" if times > 1 else ""
        reads = f"{self.read_bytes_per_s / 1e9:.1f} GB/s{_spread(self.read_samples, 1)}"
        flops = f"{self.flops_per_s / 1e9:.0f} GFLOP/s{_spread(self.flops_samples, 0)}"
        return (
            f"Limits of the machine in this run{how}: {reads} of memory read, {flops} of "
            f"{self.dtype} matrix product."
        )


class LimitsProbe:
    """Measures the limits across a run, whenever it is told to.

    Where machines share their memory with others, what it gives can halve within the hour: one
    measurement says little of the work before and after it.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, threads: int | None = None
    ) -> None:
        """
        Args:
            dtype: of the matrix product, or float32 on a processor for whose bfloat16 PyTorch
                has no kernel: it would say little of the machine. Reading is a sum over
                float32, which two cores do at memory speed.
            threads: of PyTorch, on a CPU, while it measures; None for those in use.
        """
        has_kernel = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self._dtype = dtype if has_kernel else torch.float32
        self._device, self._threads = device, threads
        self.can_measure = device.type == "cpu"  # a GPU's memory is others' once they run
        self._reads: list[float] = []
        self._flops: list[float] = []

    def measure(self) -> None:
        """Measure once more, the best of a few runs of each kind: about a second on two cores.

        What it allocates is given back.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            self._reads.append(self._read())
            self._flops.append(self._multiply())
        finally:
            torch.set_num_threads(before)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # blocks that PyTorch keeps are lost to virtual memory

    @property
    def latest_read(self) -> float:
        """Bytes a second, as measured last."""
        return self._reads[-1]

    def limits(self) -> Limits:
        """The medians so far, of one measurement at least."""
        return Limits(
            read_bytes_per_s=statistics.median(self._reads),
            flops_per_s=statistics.median(self._flops),
            dtype=str(self._dtype).removeprefix("torch."),
            read_samples=tuple(self._reads),
            flops_samples=tuple(self._flops),
        )

    def _read(self) -> float:
        values = torch.ones(_READ_BYTES[self._device.type] // 4, device=self._device)
        return values.nbytes / best_time(values.sum, self._device, repeats=_REPEATS)

    def _multiply(self) -> float:
        size = _MATRIX_SIZE[self._device.type]
        left, right = (
            torch.rand(size, size, device=self._device).to(self._dtype) for _ in range(2)
        )
        return 2 * size**3 / best_time(lambda: left @ right, self._device, repeats=_REPEATS)


def best_time(call: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one to warm up."""
    call()
    times: list[float] = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(samples: Sequence[float], digits: int) -> str:
    """From the lowest to the highest of several measurements, in thousand millions."""
    if len(samples) < 2:
        return ""
    return f" ({min(samples) / 1e9:.{digits}f} to {max(samples) / 1e9:.{digits}f})"
