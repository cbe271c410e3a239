"""Address space and physical pages: reserve, create, map, unmap, and tensors over it all.

Drivers are loaded when first used, so that the errors can be had without importing PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import janitor
from .at_exit import stop_at_exit
from .errors import InvalidConfig
from .process import OwnedLock, ProcessOwner

if TYPE_CHECKING:
    import torch

    from .base import Fence, VmemDriver
    from .cuda import CudaDriver
    from .host import HostDriver
    from .pages import (
        SEGMENT_PAGES,
        Page,
        PageRun,
        Segment,
        adjacent_runs,
        is_common,
        is_of_file,
        page_in,
        segment_of,
    )

_HOMES = {
    "CudaDriver": ".cuda",
    "Fence": ".base",
    "HostDriver": ".host",
    "SEGMENT_PAGES": ".pages",
    "Page": ".pages",
    "PageRun": ".pages",
    "Segment": ".pages",
    "VmemDriver": ".base",
    "adjacent_runs": ".pages",
    "is_common": ".pages",
    "is_of_file": ".pages",
    "page_in": ".pages",
    "segment_of": ".pages",
}

__all__ = [
    "SEGMENT_PAGES",
    "CudaDriver",
    "Fence",
    "HostDriver",
    "OwnedLock",
    "Page",
    "PageRun",
    "ProcessOwner",
    "Segment",
    "VmemDriver",
    "adjacent_runs",
    "is_common",
    "is_of_file",
    "janitor",
    "open_driver",
    "page_in",
    "segment_of",
    "stop_at_exit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def open_driver(
    device: "torch.device | str", page_bytes: int | None = None, *, readable_gaps: bool = False
) -> "VmemDriver":
    """A driver for `device`, `cpu` or `cuda[:index]`; `page_bytes` defaults to the device's best.

    With `readable_gaps`, unbacked addresses of the host read as zeros; a GPU faults all the same.
    Raises InvalidConfig for any other device, DriverUnavailable where CUDA is missing.
    """
    import torch

    from .cuda import CudaDriver
    from .host import HostDriver

    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise InvalidConfig(f"{device!r} is no device; use 'cpu' or 'cuda'") from error
    match device.type:
        case "cpu":
            if page_bytes is None:
                return HostDriver(readable_gaps=readable_gaps)
            return HostDriver(page_bytes, readable_gaps=readable_gaps)
        case "cuda":
            index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
            return CudaDriver(index if device.index is None else device.index, page_bytes)
        case other:
            raise InvalidConfig(f"device {other!r} has no virtual memory here; use 'cpu' or 'cuda'")
