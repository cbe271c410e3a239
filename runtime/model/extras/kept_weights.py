"""Weights in memory beside the model's: counted under a limit, and given back where it is short."""

import errno
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

import torch

from ....allocator import MemoryLimit
from ....vmem.errors import DriverError, OutOfPages, StepFailed, VkvError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_log = logging.getLogger(__name__)


class KeptWeights(Generic[K, V]):
    """What was made of weights, by key, the one used longest ago first.

    Counted under the limit of keys and values. Where that is short, those go that the newest step
    does not use; then what only finished requests hold of keys and values. Caches that run short
    have some go, too: by `reclaimable_bytes` and `give_up`, from any thread. All others are for the
    engine's.

    Args:
        limit: kept together with the engine's cache, and maybe with others.
        gone: told the key of each that goes, with the limit's lock held.
    """

    def __init__(self, limit: MemoryLimit, gone: Callable[[K], None] | None = None) -> None:
        self._limit = limit
        self._gone = gone
        self._here: OrderedDict[K, tuple[V, int]] = OrderedDict()  # with their bytes
        self._pinned: Collection[K] = ()
        limit.join(self)

    @property
    def limit_bytes(self) -> int:
        """The most that there may be, keys and values included."""
        return self._limit.num_bytes

    def __contains__(self, key: K) -> bool:
        return key in self._here

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._here))

    def __getitem__(self, key: K) -> V:
        """What is here."""
        return self._here[key][0]

    def num_bytes(self, key: K) -> int:
        """What it takes; 0 if it is not here."""
        return self._here[key][1] if key in self._here else 0

    def pin(self, keys: Collection[K]) -> None:
        """Of what is here, or comes, keep these until the next call."""
        with self._limit.lock:
            self._pinned = keys

    def bring(self, key: K, num_bytes: int, make: Callable[[], tuple[V, int]], what: str) -> None:
        """Have what `make` returns in memory; it says what that takes, about `num_bytes`.

        It may take its time, as for reading files: memory is promised before, and nothing locked.
        Raises OutOfPages, or what `make` raises, with nothing counted; `what` is for people.
        """
        with self._limit.lock:
            if key in self._here:
                self._here.move_to_end(key)
                return
            self._take(what, num_bytes)
        taken = num_bytes
        try:
            value, needed = make()
            if needed != taken:
                with self._limit.lock:
                    self._take(what, needed - taken)
                taken = needed
        except BaseException as error:
            self._limit.take(-taken)
            if _lacks_memory(error):
                raise OutOfPages(
                    f"the system has no {num_bytes} bytes for {what} ({error}); lower "
                    "kv_memory, or wait for others to finish"
                ) from error
            raise
        with self._limit.lock:
            self._here[key] = value, taken

    def _take(self, what: str, num_bytes: int) -> None:
        while not self._limit.take(num_bytes):
            idle = next((one for one in self._here if one not in self._pinned), None)
            if idle is not None:
                self.put_away(idle)
                continue
            self._limit.make_room(self, num_bytes)
            if self._limit.take(num_bytes):
                return
            raise OutOfPages(
                f"{what} needs {num_bytes} bytes, and {self._limit.room_bytes} of "
                f"{self._limit.num_bytes} are left; wait for requests to finish, or raise kv_memory"
            )

    def put_away(self, key: K) -> int:
        """Give what a key has back, if it is here; returns the bytes."""
        with self._limit.lock:
            if key not in self._here:
                return 0
            _, num_bytes = self._here.pop(key)
            self._limit.take(-num_bytes)
            if self._gone is not None:
                self._gone(key)
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


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether it says that the system has no memory; PyTorch, of a CPU's, in words alone."""
    if error is None:
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return "can't allocate memory" in str(error) or _lacks_memory(error.__cause__)


def bring_each(keys: Iterable[K], bring: Callable[[K], None]) -> dict[K, VkvError]:
    """Bring each, the first ones first; returns those that cannot be here, each with why.

    OutOfPages for those that lack memory now, another error for those that cannot be read. Nothing
    is raised: whoever asks for the others has them.
    """
    lacking: dict[K, VkvError] = {}
    for key in keys:
        try:
            bring(key)
        except DriverError as error:  # of a cache that was to give memory up
            lacking[key] = OutOfPages(str(error))
        except VkvError as error:
            lacking[key] = error
        except Exception as error:  # noqa: BLE001 - told to those that ask for it, and logged
            _log.exception("weights beside the model's cannot be had")
            failed = StepFailed(
                f"weights beside the model's cannot be had: {type(error).__name__}: {error}"
            )
            failed.__cause__ = error
            lacking[key] = failed
    return lacking
