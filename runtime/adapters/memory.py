"""Adapters' weights in memory: counted under a limit, and given back where it is short."""

from collections import OrderedDict
from collections.abc import Collection

import torch

from ...allocator import MemoryLimit
from ...vmem.errors import OutOfPages
from ..request.spec import AdapterKey
from .lora_file import LoraFile
from .steps import Products, Table


class AdapterMemory:
    """The tables of adapters that are in memory, the one used longest ago first.

    Counted under the limit of keys and values. Where that is short, adapters go that the newest
    step does not use; then what only finished requests hold of keys and values. Caches that run
    short have adapters go, too: by `reclaimable_bytes` and `give_up`, from any thread. All others
    are for the engine's.

    Args:
        limit: kept together with the engine's cache, and maybe with others.
        products: what tables are made for.
        dtype: what weights are rounded to.
    """

    def __init__(self, limit: MemoryLimit, products: Products, dtype: torch.dtype) -> None:
        self._limit = limit
        self._products = products
        self._dtype = dtype
        self._here: OrderedDict[AdapterKey, tuple[Table, int]] = OrderedDict()  # with their bytes
        self._pinned: Collection[AdapterKey] = ()
        limit.join(self)

    @property
    def limit_bytes(self) -> int:
        """The most that there may be, keys and values included."""
        return self._limit.num_bytes

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._here

    def table(self, key: AdapterKey) -> Table:
        """That of an adapter that is here."""
        return self._here[key][0]

    def pin(self, keys: Collection[AdapterKey]) -> None:
        """Of adapters that are here, or come, keep these until the next call."""
        with self._limit.lock:
            self._pinned = keys

    def bring(self, key: AdapterKey, file: LoraFile, num_sites: int) -> None:
        """Have an adapter in memory. Raises OutOfPages or BadAdapter, with nothing counted."""
        with self._limit.lock:
            if key in self._here:
                self._here.move_to_end(key)
                return
            num_bytes = self.num_bytes(file)
            self._take(key, num_bytes)
            try:
                weights = file.read(self._dtype, self._allocate)
                self._here[key] = self._products.table(num_sites, weights), num_bytes
            except BaseException as error:
                self._limit.take(-num_bytes)
                if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
                    raise OutOfPages(
                        f"the system has no {num_bytes} bytes for the adapter {key.name!r} "
                        f"({error}); lower kv_memory, or wait for others to finish"
                    ) from error
                raise

    def num_bytes(self, file: LoraFile) -> int:
        """What an adapter takes."""
        return file.num_elements() * self._dtype.itemsize

    def _allocate(self, num_elements: int) -> torch.Tensor:
        return self._products.allocate(num_elements, self._dtype)

    def _take(self, key: AdapterKey, num_bytes: int) -> None:
        while not self._limit.take(num_bytes):
            idle = next((one for one in self._here if one not in self._pinned), None)
            if idle is not None:
                self.put_away(idle)
                continue
            self._limit.make_room(self, num_bytes)
            if self._limit.take(num_bytes):
                return
            raise OutOfPages(
                f"the adapter {key.name!r} needs {num_bytes} bytes, and {self._limit.room_bytes} "
                f"of {self._limit.num_bytes} are left; wait for requests to finish, or raise "
                "kv_memory"
            )

    def put_away(self, key: AdapterKey) -> int:
        """Give an adapter's memory back, if it is here; returns the bytes."""
        with self._limit.lock:
            _, num_bytes = self._here.pop(key, (None, 0))
            self._limit.take(-num_bytes)
        return num_bytes

    def clear(self) -> int:
        """Give all of it back; returns the bytes."""
        return sum(self.put_away(key) for key in list(self._here))

    # -- as others under the limit see it ------------------------------------------------------

    def reclaimable_bytes(self) -> int:
        """As of `allocator.memory_limit.Member`."""
        with self._limit.lock:
            return sum(size for key, (_, size) in self._here.items() if key not in self._pinned)

    def give_up(self, num_bytes: int) -> None:
        """As of `allocator.memory_limit.Member`: those used longest ago go first."""
        with self._limit.lock:
            for key in list(self._here):
                if num_bytes > 0 and key not in self._pinned:
                    num_bytes -= self.put_away(key)
