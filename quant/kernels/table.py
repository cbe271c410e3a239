"""What multiplies by a 4-bit weight: the common contract, the table of kernels, and the choice."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch

from ...vmem.errors import QuantError
from ..weight import Int4Weight

MANY_ROWS = 256  # kernels treat all larger batches alike

# In order of preference: the first that is available and accepts a product computes it.
_TABLE: dict[str, str] = {
    "humming": "humming:HummingKernel",
    "triton": "triton_linear:TritonKernel",
    "native": "native:NativeKernel",
    "int4pack": "int4pack:Int4PackKernel",
    "dequantize": "dequantize:DequantizeKernel",
}
# Whose results are not quite the others': only who names one has it.
_BY_NAME: dict[str, str] = {"native-int8": "native:NativeInt8Kernel"}


class Int4Kernel(ABC):
    """One way to compute `inputs @ weight.T`.

    A kernel lays a weight out once (`prepare`) and multiplies by that layout ever after. It is
    given weights without a permutation: `Int4Linear` permutes the inputs.
    """

    name: ClassVar[str]

    @property
    def layout_name(self) -> str:
        """Kernels of one such name read the same layouts, those of the kernel that is called so."""
        return self.name

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why this kernel cannot run on this machine, or None. Cheap, and never raises."""
        return None

    @abstractmethod
    def accepts(
        self, weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
    ) -> bool:
        """Whether it should compute [num_rows, K] of `dtype` on `device` by this weight.

        A kernel refuses not only what it cannot do, but also batches at which a later kernel of
        the table is faster. Only shapes, types and the group size of `weight` count.
        """

    @abstractmethod
    def prepare(self, weight: Int4Weight) -> Any:
        """The weight, already on its device, laid out for this kernel."""

    @abstractmethod
    def multiply(self, layout: Any, inputs: torch.Tensor) -> torch.Tensor:
        """[M, K] by a layout of `prepare`: [M, N] of the inputs' dtype."""

    def restores(self, outline: Int4Weight) -> bool:
        """Whether a layout of such a weight, here on "meta", has all of it: see `restore`."""
        return False

    def restore(self, layout: Any, outline: Int4Weight) -> Int4Weight:
        """The weight that `prepare` was given, bit for bit, from a layout that has all of it."""
        raise NotImplementedError

    def num_bytes(self, layout: Any) -> int:
        """Bytes that a layout occupies."""
        if isinstance(layout, torch.Tensor):
            return layout.nbytes
        if isinstance(layout, Int4Weight):
            return layout.num_bytes
        return sum(self.num_bytes(part) for part in layout if part is not None)


def kernel_names() -> tuple[str, ...]:
    """All kernels, in order of preference, whether or not they can run here."""
    return tuple(_TABLE)


def kernel_class(name: str) -> type[Int4Kernel]:
    """The kernel of that name; raises QuantError with the names there are."""
    every = {**_TABLE, **_BY_NAME}
    if name not in every:
        raise QuantError(f"no int4 kernel is called {name!r}; there are {', '.join(every)}")
    module, attribute = every[name].split(":")
    return getattr(import_module(f".{module}", __package__), attribute)


@cache
def kernel(name: str) -> Int4Kernel:
    """The kernel of that name, made once; raises QuantError if it cannot run here."""
    chosen = kernel_class(name)
    if why := chosen.unavailable_reason():
        raise QuantError(f"int4 kernel {name!r} cannot run here: {why}")
    return chosen()


def available_kernels() -> Iterator[Int4Kernel]:
    """The kernels that can run here, in order of preference; none is made before its turn."""
    return (kernel(name) for name in _TABLE if _is_available(name))


@cache
def _is_available(name: str) -> bool:
    return kernel_class(name).unavailable_reason() is None


def choose_kernel(
    weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
) -> Int4Kernel:
    """The preferred kernel for [num_rows, K] of `dtype` by `weight`.

    The last of the table, which dequantises, accepts everything.
    """
    return next(k for k in available_kernels() if k.accepts(weight, device, dtype, num_rows))
