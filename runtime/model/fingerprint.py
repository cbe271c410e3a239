"""What tells a model from all others: a digest of its config and its weights."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PretrainedConfig

from ...quant.gguf_files import parts_of
from ..cpu_kernels.packing import PackedExperts, PackedGatedLayer, PackedLinear, int4_products

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")
_CHAIN = "chain.json"  # which has the digests of weights that are in other folders
_PART_BYTES = 32 << 20  # of a file, that one thread reads at a time
_MOST_THREADS = 4
_OF_NO_ACCOUNT = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")


@dataclass(frozen=True)
class FileMark:
    """A file of a model, and what of it changes when it is written to."""

    path: Path
    num_bytes: int
    mark: tuple[int, int]


def model_files(home: str | Path, config: PretrainedConfig | None = None) -> tuple[FileMark, ...]:
    """The files that a checkpoint's numbers come from, as they are now; none if they are elsewhere.

    `home` is a folder, a GGUF file, or the hub id that a model of this `config` was loaded by.
    """
    path = Path(home).absolute()  # they are read later, wherever the process is by then
    if path.is_file():
        return tuple(_mark(part) for part in parts_of(path) if part.is_file())
    if not path.is_dir():
        revision = getattr(config, "_commit_hash", None)
        found = try_to_load_from_cache(str(home), "config.json", revision=revision)
        if not isinstance(found, str):
            return ()
        path = Path(found).parent
    names = {file for pattern in (*_CONFIGS, _CHAIN, *_WEIGHTS) for file in path.glob(pattern)}
    return tuple(_mark(file) for file in sorted(names))


def _mark(path: Path) -> FileMark:
    found = path.stat()
    return FileMark(path, found.st_size, (found.st_mtime_ns, found.st_ino))


class ModelFingerprint:
    """Names a model by its numbers: two that have the same give the same keys and values.

    It is computed when it is asked for: of the files that the model was loaded from, or, for one
    that was handed over or changed since, of its parameters and buffers. Where neither tells all of
    it, it is a name that nothing else has: files that changed since they were loaded; hooks;
    weights in 4 bits, or of packed experts, under a change.

    Args:
        model: the model.
        files: what it was loaded from (`model_files`, taken then); none for one handed over.
        options: what else its numbers depend on.
    """

    def __init__(
        self, model: nn.Module, files: Sequence[FileMark], options: Iterable[object]
    ) -> None:
        self._model = model
        self._files = tuple(files)
        self._options = [str(option) for option in options]
        self._value: str | None = None

    def value(self) -> str:
        """The fingerprint, in hexadecimal digits."""
        if self._value is None:
            parts = _of_files(self._files) if self._files else _of_parameters(self._model)
            digest = xxhash.xxh3_128()
            for part in (*self._options, *(parts or [secrets.token_bytes(16)])):
                data = part.encode() if isinstance(part, str) else part
                digest.update(len(data).to_bytes(8, "little") + data)
            self._value = digest.hexdigest()
        return self._value

    @property
    def known(self) -> str:
        """The fingerprint if it was computed, at no cost; "" if nobody has asked for it yet."""
        return self._value or ""

    def renew(self) -> None:
        """Somebody changed the model: from now on it is known by its parameters."""
        self._files, self._value = (), None


def _of_files(files: Sequence[FileMark]) -> list[str | bytes] | None:
    """Names and contents; None if they have changed since."""
    for file in files:
        try:
            if _mark(file.path) != file:
                return None
        except OSError:
            return None
    places = [
        (file.path, offset) for file in files for offset in range(0, file.num_bytes, _PART_BYTES)
    ]
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        digests = list(pool.map(_digest_part, places))
    return ["files", *(file.path.name for file in files), *digests]


def _digest_part(place: tuple[Path, int]) -> bytes:
    path, offset = place
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        buffer = bytearray(min(_PART_BYTES, os.fstat(file.fileno()).st_size - offset))
        view = memoryview(buffer)
        while len(view) and (count := file.readinto(view)):
            view = view[count:]
    return xxhash.xxh3_128_digest(buffer)


def _of_parameters(model: nn.Module) -> list[str | bytes] | None:
    """Config, modules and tensors; None if they do not tell all of it."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return None
    if any(isinstance(m, PackedExperts) for m in model.modules()) or any(int4_products(model)):
        return None
    config: Any = getattr(model, "config", None)
    said = {} if config is None else config.to_dict()
    plain = {name: value for name, value in said.items() if name not in _OF_NO_ACCOUNT}
    parts: list[str | bytes] = [json.dumps(plain, sort_keys=True, default=str)]
    parts += [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    for module in model.modules():
        parts.append(str([value for value in adapters_of(module) if not callable(value)]))
    for name, tensor in _tensors(model):
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", _digest_tensor(tensor)]
    return parts


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All that the model computes with, packed weights as they were."""
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            yield name, value
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.part:
            continue  # with the first that its product serves
        if isinstance(module, PackedLinear | PackedGatedLayer):
            for index, linear in enumerate(module.product.unpack()):
                for part, value in linear.state_dict().items():
                    yield f"{name}.{index}.{part}", value


def _digest_tensor(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().reshape(-1)
    size = max(1, _PART_BYTES // max(1, flat.element_size()))
    digest = xxhash.xxh3_128()
    for part in flat.split(size):
        digest.update(memoryview(cast(Any, part.cpu().view(torch.uint8).numpy())))
    return digest.digest()


def adapters_of(tuner: nn.Module) -> tuple[Any, ...]:
    """What decides which of a layer's adapters count, under PEFT's names; of others nothing."""
    names = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    values: list[Any] = [getattr(tuner, name, None) for name in names]
    return tuple(value.copy() if hasattr(value, "copy") else value for value in values)
