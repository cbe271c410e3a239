"""An adapter's folder: checked against a model when it is loaded, read when it is needed."""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...vmem.errors import BadAdapter
from .lora_config import CONFIG_NAME, LoraConfig, read_config
from .sites import Site, Sites
from .steps import SiteWeights

WEIGHTS_NAME = "adapter_model.safetensors"

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_DTYPES = ("F16", "F32", "BF16")
_PART_BYTES = 1 << 22
_MOST_DIGESTS = 256

Shapes = Mapping[str, tuple[int, ...]]
_Marks = tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """An adapter at one site, and what its file calls its two weights."""

    site: Site
    down: str
    up: str
    rank: int
    scale: float


class Digests:
    """What adapters' folders hold, in short, for as long as nobody writes to their files.

    To read a folder takes a second a gigabyte: whoever is about to load one may have it done
    before, on a thread that holds nobody up. Any number of threads may use it.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[_Marks, str]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: Path) -> tuple[_Marks, str]:
        """The marks of a folder's files, and their digest. Raises BadAdapter."""
        marks = _marks(folder)  # before they are read: what is written meanwhile is noticed later
        with self._lock:
            known = self._known.get(folder)
        if known is None or known[0] != marks:
            known = marks, _digest(folder)
            with self._lock:
                self._known[folder] = known
                if len(self._known) > _MOST_DIGESTS:
                    self._known.popitem(last=False)
        return known


class LoraFile:
    """A LoRA adapter as PEFT's `save_pretrained` leaves it, for one model.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        sites: of the model.
        most_rank: the largest rank that is taken.
        digests: knows the folder already, or will from now on.

    Attributes:
        folder: as given.
        digest: of config and weights, in hexadecimal digits.

    Raises BadAdapter for what is not there, is not understood or does not fit.
    """

    def __init__(self, folder: Path, sites: Sites, most_rank: int, digests: Digests) -> None:
        self.folder = folder
        self._digests = digests
        self._weights = folder / WEIGHTS_NAME
        config = read_config(folder)
        shapes = _shapes(self._weights)
        self._parts = _parts(config, shapes, sites)
        for part in self._parts:
            if part.rank > most_rank:
                raise BadAdapter(
                    f"{folder} has rank {part.rank} at {part.site.name}, and {most_rank} is the "
                    "most; merge it into the model"
                )
        self.digest = digests.of(folder)[1]

    @property
    def site_names(self) -> list[str]:
        """Where it acts."""
        return [part.site.name for part in self._parts]

    def num_elements(self) -> int:
        """Of all its weights together."""
        return sum(p.rank * (p.site.in_features + p.site.out_features) for p in self._parts)

    def read(
        self, dtype: torch.dtype, allocate: Callable[[int], torch.Tensor]
    ) -> dict[int, SiteWeights]:
        """Its weights by site, rounded to `dtype`, in one stretch that `allocate(num_elements)`
        gives.

        Raises BadAdapter if the file is not what it was, or gone.
        """
        if self._digests.of(self.folder)[1] != self.digest:
            raise BadAdapter(
                f"{self.folder} has changed since it was loaded; unload the adapter, and load it "
                "again"
            )
        left = allocate(self.num_elements())

        def place(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal left
            goal, left = left[: tensor.numel()].view(tensor.shape), left[tensor.numel() :]
            return goal.copy_(tensor)

        weights: dict[int, SiteWeights] = {}
        try:
            with safe_open(self._weights, framework="pt") as file:
                for part in self._parts:
                    down = place(file.get_tensor(part.down).to(dtype))
                    up = place(file.get_tensor(part.up).to(dtype).T)
                    weights[part.site.index] = SiteWeights(down, up, part.scale)
        except (OSError, SafetensorError) as error:
            raise BadAdapter(f"{self._weights} cannot be read: {error}") from error
        return weights


def _shapes(path: Path) -> Shapes:
    """By name, of all tensors of a file. Raises BadAdapter."""
    if not os.path.exists(path):
        pickled = os.path.exists(path.with_suffix(".bin"))
        remedy = "its .bin may run code when it is read: save it with safe_serialization=True"
        raise BadAdapter(
            f"there is no {path}; "
            + (remedy if pickled else "give the folder of an adapter as save_pretrained writes it")
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 - which is no dictionary
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise BadAdapter(
                        f"{path} has {name} in {part.get_dtype()}, and adapters are read in "
                        f"{', '.join(_DTYPES)}; save it in one of these"
                    )
                found[name] = tuple(part.get_shape())
            return found
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} cannot be read ({error}); save the adapter again") from error


def _parts(config: LoraConfig, shapes: Shapes, sites: Sites) -> list[_Part]:
    """An adapter at each of its sites. Raises BadAdapter."""
    folder = config.folder
    keys: dict[str, dict[str, str]] = {}  # by module, and by side
    for key in shapes:
        found = _KEY.fullmatch(key)
        if found is None:
            raise BadAdapter(
                f"{folder} holds {key}, and of an adapter lora_A.weight and lora_B.weight of "
                "linear modules are read; merge it into the model"
            )
        keys.setdefault(found["module"], {})[found["side"]] = key
    if not keys:
        raise BadAdapter(f"{folder} holds no weights; save the adapter again")
    parts = [_part(config, shapes, sites.find(module, folder), keys[module]) for module in keys]
    if config.target_modules != "all-linear":
        wanted = [s.name for s in sites if config.targets(s.name, is_head=s.is_head)]
        if missing := [name for name in wanted if name not in keys]:
            raise BadAdapter(
                f"{folder} acts on {missing[0]} by its target_modules, and has no weights for it, "
                f"nor for {len(missing) - 1} others; save the adapter again"
            )
    return sorted(parts, key=lambda part: part.site.index)


def _part(config: LoraConfig, shapes: Shapes, site: Site, keys: Mapping[str, str]) -> _Part:
    folder, rank = config.folder, config.rank_of(site.name)
    if not config.targets(site.name, is_head=site.is_head):
        raise BadAdapter(
            f"{folder} holds weights of {site.name}, which its target_modules leave out; use the "
            "config that it was saved with"
        )
    if len(keys) != 2:
        raise BadAdapter(f"{folder} has one of two weights of {site.name}; save it again")
    down, up = shapes[keys["A"]], shapes[keys["B"]]
    if down != (rank, site.in_features) or up != (site.out_features, rank):
        raise BadAdapter(
            f"{folder} has {list(down)} and {list(up)} for {site.name}, which in this model is "
            f"[{site.out_features}, {site.in_features}] and by its config of rank {rank}; use an "
            "adapter that was trained on this model"
        )
    return _Part(site, keys["A"], keys["B"], rank, config.scale_of(site.name))


def _marks(folder: Path) -> _Marks:
    """What of a folder's files changes when they are written to. Raises BadAdapter."""
    marks = []
    for path in (folder / CONFIG_NAME, folder / WEIGHTS_NAME):
        try:
            found = path.stat()
        except OSError as error:
            raise BadAdapter(
                f"{path} is gone ({error.strerror}); load it from elsewhere"
            ) from error
        marks += [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return tuple(marks)


def _digest(folder: Path) -> str:
    """Of config and weights: nobody can make another adapter of the same. Raises BadAdapter."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = folder / name
            digest.update(path.stat().st_size.to_bytes(8, "little"))
            with path.open("rb") as file:
                while part := file.read(_PART_BYTES):
                    digest.update(part)
    except OSError as error:
        raise BadAdapter(f"{folder} cannot be read ({error}); load it from elsewhere") from error
    return digest.hexdigest()
