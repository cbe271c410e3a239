"""Address space and physical pages: reserve, create, map, unmap, and tensors over it all."""

from .base import Fence, Page, VmemDriver
from .host import HostDriver

__all__ = ["Fence", "HostDriver", "Page", "VmemDriver"]
