"""The machine's own limits, measured in the run that quotes them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # far beyond any cache
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
_REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What memory and matrix units give at best, with the threads in use.

    Attributes:
        read_bytes_per_s: reading memory once, in order.
        flops_per_s: a large product of square matrices, two operations a multiply-add.
        dtype: of those matrices.
    """

    read_bytes_per_s: float
    flops_per_s: float
    dtype: str

    def joined(self, later: "Limits") -> "Limits":
        """The mean of what was measured before and after a run: memory speed drifts on some
        machines, those in a cloud above all."""
        return Limits(
            read_bytes_per_s=(self.read_bytes_per_s + later.read_bytes_per_s) / 2,
            flops_per_s=(self.flops_per_s + later.flops_per_s) / 2,
            dtype=self.dtype,
        )

    def __str__(self) -> str:
        return (
            f"Limits of the machine in this run: {self.read_bytes_per_s / 1e9:.1f} GB/s of memory "
            f"read, {self.flops_per_s / 1e9:.0f} GFLOP/s of {self.dtype} matrix product."
        )


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """The best of several runs of each; takes about two seconds.

    Reading is a sum over float32, which two cores do at memory speed; `dtype` is that of the
    matrix product.
    """
    values = torch.ones(_READ_BYTES[device.type] // 4, device=device)
    read_s = best_time(values.sum, device, repeats=_REPEATS)
    num_bytes = values.nbytes
    del values
    size = _MATRIX_SIZE[device.type]
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product_s = best_time(lambda: left @ right, device, repeats=_REPEATS)
    return Limits(
        read_bytes_per_s=num_bytes / read_s,
        flops_per_s=2 * size**3 / product_s,
        dtype=str(dtype).removeprefix("torch."),
    )


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
