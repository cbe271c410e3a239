"""Virtual memory on NVIDIA GPUs, through the CUDA driver's virtual memory management calls.

Importing this module needs neither a GPU nor `cuda-python`; building a `CudaDriver` needs both.
The driver works in the device's primary context, the one PyTorch uses.
"""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from .base import Fence, VmemDriver
from .dlpack import tensor_from_address
from .errors import (
    DriverError,
    DriverUnavailable,
    InvalidConfig,
    InvalidOperation,
    OutOfMappings,
    OutOfPages,
)
from .pages import Page, PageRun
from .process import OwnedLock, ProcessOwner


class CudaDriver(VmemDriver):
    """Pinned device memory as pages, each an allocation of its own, mapped one by one.

    A mapping, in the sense of `num_mappings`, is one page at one address. Pages are numbered as
    they come: CUDA uses the values of handles again, and gives an import any. One class, since its
    methods are the calls that the contract names.
    """

    def __init__(
        self, device_index: int = 0, page_bytes: int | None = None, max_mappings: int = 400_000
    ) -> None:
        """Args: device_index, as in `cuda:0`; page_bytes (default: the device's granularity,
        2 MiB on current ones); max_mappings, to stay below the 520 thousand or so at which
        drivers have been seen to fail.

        Raises DriverUnavailable without `cuda-python`, an NVIDIA driver or a capable device.
        """
        if max_mappings < 1:
            raise InvalidConfig(f"max_mappings is {max_mappings}; it must be at least 1")
        self._cuda = cuda = _load_bindings()
        self._device = _open_device(cuda, device_index)
        self._properties = _page_properties(cuda, self._device, device_index)
        self._access = _access_descriptor(cuda, device_index)
        self.memory_name = f"GPU {bytes(_check(cuda, 'cuDeviceGetUuid', self._device).bytes).hex()}"
        flag = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = _check(cuda, "cuMemGetAllocationGranularity", self._properties, flag)
        super().__init__(
            device=torch.device("cuda", device_index),
            granularity=granularity,
            page_bytes=granularity if page_bytes is None else page_bytes,
        )
        self._max_mappings = max_mappings
        self._numbers = itertools.count()
        self._handles: dict[Page, int] = {}  # of live pages
        self._unwritten: set[Page] = set()  # created, never mapped, so not zeroed yet
        self._imported: set[Page] = set()  # made by another driver
        self._refused: set[Page] = set()  # that CUDA would not export, once
        self._events: set[Any] = set()  # of fences not waited for yet
        with ExitStack() as undo:
            self._context = _check(cuda, "cuDevicePrimaryCtxRetain", self._device)
            undo.callback(_check, cuda, "cuDevicePrimaryCtxRelease", self._device)
            with self._current_context():
                # A stream of our own, so that zeroing waits for no kernel and none for it; and
                # before whatever is queued, since a step waits for it, under the driver's lock.
                non_blocking = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
                _, greatest = _check_all(cuda, "cuCtxGetStreamPriorityRange")
                name = "cuStreamCreateWithPriority"
                self._stream = _check(cuda, name, non_blocking, greatest)
            undo.pop_all()

    @property
    def num_mappings(self) -> int:
        return len(self._page_table)

    @property
    def max_mappings(self) -> int:
        return self._max_mappings

    def record_fence(self) -> Fence:
        """Mark the work on PyTorch's current stream of this device; other streams are not seen.

        The fence may be waited for on any thread, without holding up the driver's other calls.
        """
        with self._guarded():
            disable_timing = self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
            event = self._call("record_fence", "cuEventCreate", disable_timing)
            with ExitStack() as undo:
                undo.callback(self._call, "record_fence", "cuEventDestroy", event)
                self._call("record_fence", "cuEventRecord", event, self._launch_stream())
                undo.pop_all()
            self._events.add(event)
            return _EventFence(self, event)

    # -- address space ---------------------------------------------------------------------

    def _reserve(self, size: int) -> int:
        return int(self._call("reserve", "cuMemAddressReserve", size, self._alignment, 0, 0))

    def _free(self, address: int, size: int) -> None:
        self._call("free", "cuMemAddressFree", address, size)

    # -- physical pages --------------------------------------------------------------------

    def _create(self, num_pages: int) -> list[Page]:
        handles: list[int] = []
        with self._current_context(), ExitStack() as undo:
            for _ in range(num_pages):
                handles.append(self._create_one())
                undo.callback(self._call, "create", "cuMemRelease", handles[-1])
            undo.pop_all()
        pages = self._number(handles)
        self._unwritten.update(pages)
        return pages

    def _create_one(self) -> int:
        """A new allocation; one that cannot be handed over where the other kind is refused."""
        arguments = "cuMemCreate", self.page_bytes, self._properties, 0
        try:
            return int(self._call("create", *arguments, shortage=OutOfPages))
        except _NotSupported:
            if not _is_exportable(self._properties):
                raise
        self._export_none()
        return int(self._call("create", *arguments, shortage=OutOfPages))

    def _export_none(self) -> None:
        """From now on pages cannot be handed over: this system does not have it."""
        kinds = self._cuda.CUmemAllocationHandleType
        self._properties.requestedHandleTypes = kinds.CU_MEM_HANDLE_TYPE_NONE

    def _number(self, handles: Sequence[int]) -> list[Page]:
        pages = [Page(next(self._numbers)) for _ in handles]
        self._handles.update(zip(pages, handles, strict=True))
        return pages

    def _release(self, pages: Sequence[Page]) -> None:
        self._unwritten.difference_update(pages)
        self._imported.difference_update(pages)
        self._refused.difference_update(pages)
        with ExitStack() as remaining:  # one refusal does not keep the others
            for page in pages:
                remaining.callback(self._call, "release", "cuMemRelease", self._handles.pop(page))

    # -- pages that change hands: each an allocation of its own, so each by itself -------------

    def _bundle_of(self, page: Page) -> int | None:
        can_go = _is_exportable(self._properties) and page not in self._refused
        return page if can_go else None

    def _bundle_size(self, bundle: int) -> int:
        return 1

    def _lend(self, pages: Sequence[Page]) -> tuple[list[int], list[PageRun]]:
        descriptors: list[int] = []
        with ExitStack() as undo:
            for page in pages:
                name = "cuMemExportToShareableHandle"
                try:
                    fd = int(self._call("lend", name, self._handles[page], self._handle_type, 0))
                except DriverError as error:
                    # Whoever asks again is told beforehand, and copies it. Of what was imported
                    # the reference does not say whether it can be exported.
                    self._refused.add(page)
                    if isinstance(error, _NotSupported) and page not in self._imported:
                        self._export_none()
                    raise
                descriptors.append(fd)
                undo.callback(os.close, fd)
            undo.pop_all()
        return descriptors, [PageRun(index, 0, 1) for index in range(len(pages))]

    def _borrow(self, descriptors: Sequence[int], runs: Sequence[PageRun]) -> list[Page]:
        if any(run[1:] != (0, 1) for run in runs):
            raise InvalidOperation("on a GPU each descriptor is one page; these are of a host")
        handles: list[int] = []
        with ExitStack() as undo:
            for run in runs:
                name = "cuMemImportFromShareableHandle"
                fd = descriptors[run.descriptor]
                handles.append(int(self._call("borrow", name, fd, self._handle_type)))
                undo.callback(self._call, "borrow", "cuMemRelease", handles[-1])
            undo.pop_all()
        pages = self._number(handles)
        self._imported.update(pages)
        return pages

    def _note_owned(self, pages: Sequence[Page], is_owned: bool) -> None:
        pass  # memory lives as long as any process has a handle, a mapping or a descriptor of it

    @property
    def _handle_type(self) -> Any:
        kinds = self._cuda.CUmemAllocationHandleType
        return kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    # -- mapping ---------------------------------------------------------------------------

    def _map(self, address: int, pages: Sequence[Page]) -> None:
        if self.num_mappings + len(pages) > self._max_mappings:
            raise OutOfMappings(
                f"{len(pages)} more mappings beside {self.num_mappings} would exceed the budget "
                f"of {self._max_mappings}; use larger pages"
            )
        self._map_all(address, pages)

    def _map_all(self, address: int, pages: Sequence[Page]) -> None:
        size = self.page_bytes
        with ExitStack() as undo:
            for index, page in enumerate(pages):
                position = address + index * size
                arguments = position, size, 0, self._handles[page], 0
                self._call("map", "cuMemMap", *arguments, shortage=OutOfMappings)
                undo.callback(self._call, "unmap", "cuMemUnmap", position, size)
            # The dearest call of all, so once for the run and not once a page.
            self._call(
                "set_access",
                "cuMemSetAccess",
                address,
                len(pages) * size,
                [self._access],
                1,
                shortage=OutOfMappings,
            )
            self._zero_unwritten(address, pages)
            undo.pop_all()

    def _zero_unwritten(self, address: int, pages: Sequence[Page]) -> None:
        """Clear the pages mapped for the first time: a new allocation holds what memory held.

        Done here and not in `create`, where it would take a mapping of its own.
        """
        unwritten = self._unwritten.intersection(pages)
        if not unwritten:
            return
        for index, page in enumerate(pages):
            if page in unwritten:
                position = address + index * self.page_bytes
                self._call("zero", "cuMemsetD8Async", position, 0, self.page_bytes, self._stream)
        self._call("zero", "cuStreamSynchronize", self._stream)
        self._unwritten -= unwritten

    def _unmap(self, address: int, num_pages: int) -> None:
        size = self.page_bytes
        with ExitStack() as undo:
            for position in range(address, address + num_pages * size, size):
                self._call("unmap", "cuMemUnmap", position, size)
                undo.callback(self._map_all, position, [self._page_table[position]])
            undo.pop_all()

    def _exchange(self, address: int, before: Page, page: Page) -> None:
        self._unmap(address, 1)
        with ExitStack() as undo:
            undo.callback(self._map_all, address, [before])
            self._map_all(address, [page])
            undo.pop_all()

    # -- use and end -----------------------------------------------------------------------

    def _tensor(
        self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        return tensor_from_address(address, shape, strides, dtype, self.device)

    def _launch_stream(self) -> int:
        """The stream that PyTorch launches on; the default one before it has launched at all."""
        if not torch.cuda.is_initialized():
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def _wait(self, event: Any) -> None:
        """Wait for `event`, without the lock, so that other threads may map meanwhile.

        Once for each: what CUDA records next may have the same handle.
        """
        with self._current_context():
            if event in self._events:  # or the driver is closed
                self._call("wait", "cuEventSynchronize", event)
                self._events.remove(event)
                self._call("wait", "cuEventDestroy", event)

    def close(self) -> None:
        if not self._closed:
            super().close()
            # Not in `_close`, where the context is current: this may be its end.
            _check(self._cuda, "cuDevicePrimaryCtxRelease", self._device)

    def _close(self) -> None:
        while self._events:
            self._call("close", "cuEventDestroy", self._events.pop())
        self._call("close", "cuStreamDestroy", self._stream)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with super()._guarded(), self._current_context():
            yield

    @contextmanager
    def _current_context(self) -> Iterator[None]:
        """Make the context current in the calling thread, and put back what was there."""
        cuda = self._cuda
        if int(_check(cuda, "cuCtxGetCurrent")) == int(self._context):
            yield
            return
        _check(cuda, "cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            _check(cuda, "cuCtxPopCurrent")

    def _call(
        self, kind: str, name: str, *args: Any, shortage: type[Exception] = DriverError
    ) -> Any:
        """One driver call, counted as `kind`, and checked. Out of memory raises `shortage`."""
        start_s = time.perf_counter()
        try:
            return _check(self._cuda, name, *args, shortage=shortage)
        finally:
            self._count(kind, start_s)


class _NotSupported(DriverError):
    """What was asked for is not to be had on this system, however often."""


class _EventFence:
    def __init__(self, driver: CudaDriver, event: Any) -> None:
        self._driver = driver
        self._event = event
        self._is_over = False
        # A second waiter finds the event gone, not half-destroyed.
        self._lock = OwnedLock(ProcessOwner("this fence"))

    def wait(self) -> None:
        with self._lock:
            if not self._is_over:
                self._driver._wait(self._event)
                self._is_over = True


def _load_bindings() -> ModuleType:
    """The initialised driver bindings, imported only when a CUDA device is asked for."""
    try:
        driver = import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DriverUnavailable(
            "cuda-python is not installed; install it with: pip install 'vkv[cuda]'"
        ) from error
    try:
        _check(driver, "cuInit", 0)
    except DriverError as error:
        raise DriverUnavailable(f"the NVIDIA driver found no usable GPU: {error}") from error
    except RuntimeError as error:  # the bindings raise it where there is no libcuda.so.1
        raise DriverUnavailable(
            "no NVIDIA driver (libcuda.so.1) on this machine; install one, or use the device 'cpu'"
        ) from error
    return driver


def _open_device(cuda: ModuleType, index: int) -> Any:
    count = _check(cuda, "cuDeviceGetCount")
    if not 0 <= index < count:
        raise InvalidConfig(f"there is no CUDA device {index}; this process sees {count}")
    device = _check(cuda, "cuDeviceGet", index)
    attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    if not _check(cuda, "cuDeviceGetAttribute", attribute, device):
        raise DriverUnavailable(f"CUDA device {index} cannot map memory page by page")
    return device


def _page_properties(cuda: ModuleType, device: Any, index: int) -> Any:
    """What kind of memory a page is: pinned on the device, exportable where that is possible."""
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location = _location(cuda, index)
    attribute = (
        cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
    )
    if _check(cuda, "cuDeviceGetAttribute", attribute, device):
        # Only at creation can a page be made shareable with other processes.
        handle_type = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        properties.requestedHandleTypes = handle_type
    return properties


def _is_exportable(properties: Any) -> bool:
    return bool(int(properties.requestedHandleTypes))


def _access_descriptor(cuda: ModuleType, index: int) -> Any:
    access = cuda.CUmemAccessDesc()
    access.location = _location(cuda, index)
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _location(cuda: ModuleType, index: int) -> Any:
    location = cuda.CUmemLocation()
    location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = index
    return location


def _check(cuda: ModuleType, name: str, *args: Any, shortage: type[Exception] = DriverError) -> Any:
    """Call the driver function `name`; return its one result, if any, or raise for its status."""
    results = _check_all(cuda, name, *args, shortage=shortage)
    return results[0] if results else None


def _check_all(
    cuda: ModuleType, name: str, *args: Any, shortage: type[Exception] = DriverError
) -> list[Any]:
    """The same for a function of several results."""
    status, *results = getattr(cuda, name)(*args)
    if status == cuda.CUresult.CUDA_SUCCESS:
        return results
    _, text = cuda.cuGetErrorString(status)
    message = f"{name} failed: {status.name}, {text.decode() if text else 'no description'}"
    if status == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise shortage(message)
    refusals = cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED, cuda.CUresult.CUDA_ERROR_NOT_PERMITTED
    if status in refusals:
        raise _NotSupported(message)
    raise DriverError(message)
