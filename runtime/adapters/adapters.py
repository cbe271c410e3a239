"""The adapters that an engine has: by name, and those among them that are in memory now."""

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...allocator import MemoryLimit
from ...vmem.errors import BadAdapter, UnknownAdapter, UsageError, VkvError
from ..model.extras.kept_weights import bring_each
from ..request.spec import AdapterKey
from .lora_file import Digests, LoraFile
from .memory import AdapterMemory
from .sites import Sites
from .steps import AdapterStep, Products, Table

_LONGEST_NAME = 256  # characters

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdapterStats:
    """One adapter, a moment ago.

    Attributes:
        name, digest: as of `AdapterKey`.
        path: the folder that it is read from.
        num_bytes: what its weights take while they are in memory.
        is_here: whether they are.
        load_s: that reading them took, the last time; 0 before.
        num_requests: unfinished ones that use it.
        is_leaving: it was unloaded, and stays until those have ended.
    """

    name: str
    digest: str
    path: str
    num_bytes: int
    is_here: bool
    num_requests: int
    is_leaving: bool
    load_s: float = 0.0

    @property
    def key(self) -> AdapterKey:
        """What it is called by."""
        return AdapterKey(self.name, self.digest)


class _Adapter:
    """What is known of an adapter that was loaded."""

    def __init__(self, key: AdapterKey, file: LoraFile) -> None:
        self.key = key
        self.file = file
        self.num_requests = 0
        self.is_leaving = False
        self.load_s = 0.0
        self.problem: VkvError | None = None  # why it does not fit the model any more


class Adapters:
    """Adapters by name, whose weights come into memory when a step needs them.

    Args:
        model: as it computes. Its modules stay; some get a `forward` of their own (`sites`).
        dtype: what it computes in.
        limit: what adapters' memory counts under.
        products: how what they add is computed.

    Attributes:
        products: as given.
        num_installs: times that adapters began to act on further modules of the model, so that
            what was recorded with adapters does not hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        limit: MemoryLimit,
        products: Products,
    ) -> None:
        self.products = products
        self._model = model
        self._dtype = dtype
        self._memory = AdapterMemory(limit, products, dtype)
        self._digests = Digests()
        self._sites: Sites | None = None  # None until an adapter was loaded
        self._names: dict[str, AdapterKey] = {}
        self._known: dict[AdapterKey, _Adapter] = {}
        self.num_installs = 0

    # -- by name -----------------------------------------------------------------------------

    def prepare(self, path: str | Path) -> None:
        """Read a folder that is about to be loaded, so that `load` need not: from any thread, while
        steps run. What is wrong with it `load` says."""
        with suppress(BadAdapter, ValueError):
            self._digests.of(adapter_folder(path))

    def load(self, name: str, path: str | Path) -> AdapterKey:
        """Have requests use the adapter in a folder by `name`; its weights come later.

        To load the same again is harmless. Raises BadAdapter if it cannot be read or does not fit
        the model, a `UsageError` for a name that another has.
        """
        _check_name(name)
        folder = adapter_folder(path)
        if not os.path.isdir(folder):  # a `Path` raises for names that are too long
            raise BadAdapter(
                f"there is no folder {folder}; give that of a LoRA adapter as PEFT's "
                "save_pretrained writes it"
            )
        sites = self._sites = self._sites or Sites(self._model, self._dtype)
        file = LoraFile(folder, sites, self.products.most_rank, self._digests)
        key = AdapterKey(name, file.digest)
        if self._names.get(name, key) != key:
            raise UsageError(
                f"another adapter has the name {name!r}; unload that first, or use another name"
            )
        num_bytes = self._memory.bytes_of(file)
        if num_bytes > self._memory.limit_bytes:
            raise BadAdapter(
                f"{folder} takes {num_bytes} bytes, and kv_memory, which adapters count under, is "
                f"{self._memory.limit_bytes}; raise it"
            )
        self._install(sites, file)
        adapter = self._known.setdefault(key, _Adapter(key, file))
        adapter.file, adapter.problem, adapter.is_leaving = file, None, False
        self._names[name] = key
        return key

    def unload(self, name: str) -> None:
        """Take no more requests for a name; its memory goes when those that use it have ended.

        Raises UnknownAdapter.
        """
        adapter = self._known[self.find(name)]
        del self._names[name]
        adapter.is_leaving = True
        self._drop_if_unused(adapter)

    @property
    def names(self) -> Mapping[str, AdapterKey]:
        """What new requests may use."""
        return self._names

    def find(self, name: str) -> AdapterKey:
        """The adapter of a name. Raises UnknownAdapter, naming those that there are."""
        return find_adapter(self._names, name)

    def check(self, key: AdapterKey, *, goes_on: bool = False) -> None:
        """Raises UnknownAdapter unless new requests may use this adapter; or one that goes on, as
        long as it is not gone."""
        if goes_on and key in self._known:
            return
        if self.find(key.name) != key:
            raise UnknownAdapter(
                f"the adapter {key.name!r} is another here than where it was asked for; load the "
                "same folder in both places"
            )

    # -- requests that use one -----------------------------------------------------------------

    def hold(self, key: AdapterKey) -> None:
        """Keep an adapter, were it unloaded, until `let_go`."""
        if key in self._known:
            self._known[key].num_requests += 1

    def let_go(self, key: AdapterKey) -> None:
        """End a `hold`."""
        adapter = self._known.get(key)
        if adapter is not None and adapter.num_requests:
            adapter.num_requests -= 1
            self._drop_if_unused(adapter)

    def _drop_if_unused(self, adapter: _Adapter) -> None:
        if adapter.is_leaving and not adapter.num_requests:
            self._memory.put_away(adapter.key)
            del self._known[adapter.key]

    # -- in memory -----------------------------------------------------------------------------

    def provide(self, keys: Iterable[AdapterKey]) -> dict[AdapterKey, VkvError]:
        """Have the adapters of a step in memory; returns those that are not, each with why.

        OutOfPages for those that lack memory now, another error for those that cannot be read.
        Adapters that come first get memory first. All stay until the next call.
        """
        wanted = dict.fromkeys(keys)
        self._memory.pin(wanted)
        return bring_each(wanted, self._bring)

    def _bring(self, key: AdapterKey) -> None:
        adapter = self._known.get(key)
        if adapter is None:
            raise UnknownAdapter(f"the adapter {key.name!r} was unloaded; load it again")
        if adapter.problem is not None:
            raise adapter.problem
        assert self._sites is not None, "something was loaded"
        if key in self._memory:
            self._memory.load(key, adapter.file, len(self._sites))
            return
        begin_s = time.perf_counter()
        self._memory.load(key, adapter.file, len(self._sites))
        adapter.load_s = time.perf_counter() - begin_s

    def step(
        self, num_rows: int, num_kept: int | None = None, *, is_recorded: bool = False
    ) -> AdapterStep:
        """For a step of so many tokens (`AdapterStep`), to be filled with `table`s."""
        return AdapterStep(self.products, num_rows, num_kept, is_recorded=is_recorded)

    def table(self, key: AdapterKey | None) -> Table | None:
        """What a step is filled with for a row of an adapter that is in memory; None for none."""
        return None if key is None else self._memory[key]

    def forget(self) -> int:
        """Give the memory of all adapters back, until a step needs them; returns the bytes."""
        return self._memory.clear()

    # -- the model -----------------------------------------------------------------------------

    def _install(self, sites: Sites, file: LoraFile) -> None:
        if sites.install(file.site_names):
            self.num_installs += 1

    def model_changed(self) -> None:
        """Somebody changed the model: act on the modules that it has now.

        Requests for an adapter that does not fit any more end with the reason.
        """
        if self._sites is None:
            return
        self.forget()
        self._sites.uninstall()
        self._sites = Sites(self._model, self._dtype)
        for adapter in self._known.values():
            try:
                folder, most_rank = adapter.file.folder, self.products.most_rank
                file = LoraFile(folder, self._sites, most_rank, self._digests)
                if file.digest != adapter.key.digest:
                    raise BadAdapter(
                        f"{file.folder} has changed since it was loaded; unload the adapter, and "
                        "load it again"
                    )
                self._install(self._sites, file)
                adapter.file, adapter.problem = file, None
            except BadAdapter as error:
                _log.warning("the adapter %s cannot be used: %s", adapter.key.name, error)
                adapter.problem = error

    def stats(self) -> tuple[AdapterStats, ...]:
        """Each of them, in the order in which they were loaded."""
        return tuple(
            AdapterStats(
                name=one.key.name,
                digest=one.key.digest,
                path=str(one.file.folder),
                num_bytes=self._memory.bytes_of(one.file),
                is_here=one.key in self._memory,
                num_requests=one.num_requests,
                is_leaving=one.is_leaving,
                load_s=one.load_s,
            )
            for one in self._known.values()
        )

    def close(self) -> None:
        """Leave the model as it was, and give all memory back. Closing twice is harmless."""
        self.forget()
        if self._sites is not None:
            self._sites.uninstall()
        self._names.clear()
        self._known.clear()


def find_adapter(names: Mapping[str, AdapterKey], name: str) -> AdapterKey:
    """The adapter of a name. Raises UnknownAdapter, naming those that there are."""
    if isinstance(name, str) and name in names:
        return names[name]
    there = f"there are {', '.join(sorted(names))}" if names else "none is loaded"
    raise UnknownAdapter(
        f"there is no adapter {name!r} ({there}); load it first, by load_adapter(name, path)"
    )


def known_names(stats: Sequence[AdapterStats]) -> dict[str, AdapterKey]:
    """By name, what new requests may use."""
    return {one.name: AdapterKey(one.name, one.digest) for one in stats if not one.is_leaving}


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that is meant now: it is read again later, wherever the process is by then."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise UsageError(
            f"an adapter's name is {name!r}; use a text of at most {_LONGEST_NAME} printable "
            "characters"
        )
