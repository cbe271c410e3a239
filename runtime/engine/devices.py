"""What an engine does one way on a CPU and another on a GPU: all of it, in one place."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from ...allocator import LayerGeometry
from ...vmem import VmemDriver, linux
from ...vmem.errors import DriverUnavailable, InvalidConfig
from ..adapters.products import cpu_products, cuda_products
from ..adapters.steps import Products
from ..execution.recordings import CudaRecorder, Recorder
from ..execution.tape import TapeRecorder
from ..model.loading import LoadedModel
from .memory.memory_profile import memory_for_kv

_AUTO_SHARE = 0.5  # of a machine's memory that is free when the engine is built
_GROWTH_TOKENS = 64  # about what a page should cover where the page size is ours to choose
_MIN_PAGE_BYTES, _MAX_PAGE_BYTES = 16 << 10, 2 << 20
_MAX_PAGES = 24_000  # each may need a mapping of its own, and a process has 65,530 by default


class DeviceProfile(ABC):
    """Defaults and ways of a kind of device.

    Attributes:
        max_batch_tokens: tokens of one step.
        layers_per_range: layers that share a stretch of a slot; None for all.
        overlaps: the host can prepare a step while the device computes the one before.
        moves_weights: weights can leave the device for a while.
        shares_attention: the device and host memory can attend to one request together.
    """

    max_batch_tokens: ClassVar[int]
    layers_per_range: ClassVar[int | None]
    overlaps: ClassVar[bool]
    moves_weights: ClassVar[bool]
    shares_attention: ClassVar[bool]

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def available_bytes(self) -> int:
        """Memory that could be taken now without harming others."""

    @abstractmethod
    def auto_kv_bytes(
        self, loaded: LoadedModel, *, max_batch_tokens: int, max_seqs: int, num_slots: int
    ) -> int:
        """What keys and values may take where nobody said."""

    @abstractmethod
    def page_bytes(
        self,
        geometry: Sequence[LayerGeometry],
        dtype: torch.dtype,
        layers_per_range: int | None,
        limit_bytes: int,
    ) -> int | None:
        """A size for pages that suits a model; None for the driver's own."""

    @abstractmethod
    def recorder(self, driver: VmemDriver) -> Recorder:
        """What records decode steps, and holds `driver` still meanwhile."""

    @abstractmethod
    def products(self, dtype: torch.dtype) -> Products:
        """How what adapters add to a model of `dtype` is computed."""

    @abstractmethod
    def release_cached(self) -> None:
        """Return to the system what activations left with PyTorch's own allocator."""


class CpuProfile(DeviceProfile):
    """A plain Linux CPU. Kernels read memory in order, so each layer has a stretch of its own."""

    max_batch_tokens = 256
    layers_per_range = 1
    overlaps = False
    moves_weights = False
    shares_attention = True

    def available_bytes(self) -> int:
        return linux.available_bytes()

    def auto_kv_bytes(
        self, loaded: LoadedModel, *, max_batch_tokens: int, max_seqs: int, num_slots: int
    ) -> int:
        """Half of what the machine has free."""
        return int(_AUTO_SHARE * self.available_bytes())

    def page_bytes(
        self,
        geometry: Sequence[LayerGeometry],
        dtype: torch.dtype,
        layers_per_range: int | None,
        limit_bytes: int,
    ) -> int | None:
        """A power of two that covers about `_GROWTH_TOKENS` tokens of a range.

        More, where the pool's limit would otherwise mean more pages than can be mapped one by one.
        """
        widest = max(g.num_kv_heads * (g.key_dim + g.value_dim) for g in geometry)
        layers = min(layers_per_range or len(geometry), len(geometry))
        wanted = min(layers * widest * dtype.itemsize * _GROWTH_TOKENS, _MAX_PAGE_BYTES)
        wanted = max(wanted, _MIN_PAGE_BYTES, limit_bytes // _MAX_PAGES)
        return 1 << (wanted - 1).bit_length()

    def recorder(self, driver: VmemDriver) -> Recorder:
        return TapeRecorder()

    def products(self, dtype: torch.dtype) -> Products:
        return cpu_products(dtype)

    def release_cached(self) -> None:
        """Nothing: PyTorch keeps no memory of a CPU's."""


class CudaProfile(DeviceProfile):
    """An NVIDIA GPU. Its pages are megabytes, so all layers of a token share one stretch."""

    max_batch_tokens = 2048
    layers_per_range = None
    overlaps = True
    moves_weights = True
    shares_attention = False  # it has run on none

    def available_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free

    def auto_kv_bytes(
        self, loaded: LoadedModel, *, max_batch_tokens: int, max_seqs: int, num_slots: int
    ) -> int:
        """What the largest step leaves, measured (`memory_profile`)."""
        return memory_for_kv(
            loaded, max_batch_tokens=max_batch_tokens, max_seqs=max_seqs, num_slots=num_slots
        )

    def page_bytes(
        self,
        geometry: Sequence[LayerGeometry],
        dtype: torch.dtype,
        layers_per_range: int | None,
        limit_bytes: int,
    ) -> int | None:
        return None

    def recorder(self, driver: VmemDriver) -> Recorder:
        return CudaRecorder(self.device, driver.still)

    def products(self, dtype: torch.dtype) -> Products:
        return cuda_products(self.device)

    def release_cached(self) -> None:
        torch.cuda.empty_cache()


def device_profile(device: torch.device) -> DeviceProfile:
    """The profile of a device."""
    return CudaProfile(device) if device.type == "cuda" else CpuProfile(device)


def resolve_device(device: str | torch.device) -> torch.device:
    """A device from its name; "auto" is a GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InvalidConfig(f"device is {device!r}; use 'auto', 'cpu' or 'cuda'") from error
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidConfig(f"device is {device!r}; use 'auto', 'cpu' or 'cuda'")
    if resolved.type == "cpu":
        return resolved
    index = resolved.index or 0
    if index >= torch.cuda.device_count():
        raise DriverUnavailable(
            f"device is {str(device)!r}, and PyTorch sees {torch.cuda.device_count()} GPUs here; "
            "use device='cpu', or install a PyTorch built for CUDA and its driver"
        )
    return torch.device("cuda", index)
