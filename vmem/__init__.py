"""Address space and physical pages: reserve, create, map, unmap, and tensors over it all."""

from .base import Fence, Page, VmemDriver

__all__ = ["Fence", "Page", "VmemDriver"]
