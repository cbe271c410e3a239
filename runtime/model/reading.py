"""Where a model is, and what is wrong with it if it cannot be read, each case with its remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from ...quant import UnsupportedQuantization
from ...vmem.errors import BadCheckpoint, InvalidConfig, UnsupportedModel, UsageError

# What transformers raises for missing, damaged and contradicting files, and for missing packages.
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    ZeroDivisionError,
    SafetensorError,
    StrictDataclassError,
)
# What such an error says, in lower case; what it is, and what to do. The first that fits counts.
_Case = tuple[tuple[str, ...], type[UsageError], str]
_CASES: tuple[_Case, ...] = (
    (
        ("trust_remote_code", "custom code"),
        UnsupportedModel,
        "it brings Python code of its own, which is not run here; use a model whose architecture "
        "is in transformers, or load it yourself and pass the model in place of its folder",
    ),
    (
        ("does not recognize this architecture",),
        BadCheckpoint,
        "use a newer version of transformers, or a model that this one knows",
    ),
    (
        ("requires a gpu", "only supported on gpu", "no gpu found", "a gpu is needed"),
        UnsupportedModel,
        "run it on a machine with such a device, or use a GPTQ, AWQ or compressed-tensors "
        "checkpoint of 4 or 8 bits, which needs none",
    ),
    (
        ("couldn't connect", "offline mode", "not a valid model identifier"),
        BadCheckpoint,
        "check the hub id and the network, or give a model folder",
    ),
)
_PACKAGE = (
    "install what it asks for, or use a dense checkpoint, or one in GPTQ, AWQ, "
    "compressed-tensors or bitsandbytes, which need nothing"
)
_T = TypeVar("_T")


def resolve(source: str | Path | None) -> str | Path:
    """The folder or GGUF file of a model, or its hub id; raises what fits if it can be neither."""
    if source is None:
        from ...tiny_chat import model_path  # pyright: ignore[reportMissingImports] - examples/

        return model_path()
    if not isinstance(source, str | Path):
        raise _no_source(source)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return path
    if path.is_dir():
        _check_folder(path)
        return path
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise BadCheckpoint(f"{text} is not a folder; give a model folder or a hub id")
    return text


def reading(what: str, home: str | Path, read: Callable[[], _T]) -> _T:
    """What `read` returns; its errors become typed ones that name `what`, `home` and a remedy."""
    try:
        return read()
    except UnsupportedQuantization as error:
        raise UnsupportedModel(f"{home} cannot be loaded: {error}") from error
    except _UNREADABLE as error:
        kind, remedy = _remedy(error)
        said = str(error).strip()
        raise kind(f"cannot read the {what} of {home}: {said}; {remedy}") from error


def _remedy(error: Exception) -> tuple[type[UsageError], str]:
    said = str(error).lower()
    for phrases, kind, remedy in _CASES:
        if any(phrase in said for phrase in phrases):
            return kind, remedy
    if isinstance(error, ImportError):
        return UnsupportedModel, _PACKAGE
    return BadCheckpoint, "check that the checkpoint is complete"


def _check_folder(path: Path) -> None:
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        raise UnsupportedModel(
            f"{path} holds an adapter{_base_of(adapter)}; give its model's folder, and this one to "
            "LLM.load_adapter, or to vkv serve as --adapter NAME=FOLDER"
        )
    if (path / "config.json").is_file():
        return
    if files := sorted(path.glob("*.gguf")):
        raise BadCheckpoint(
            f"{path} has no config.json, and GGUF files are models by themselves; give the file, "
            f"{files[0]}"
        )
    raise BadCheckpoint(
        f"{path} has no config.json, so it is not a model folder; point at the folder "
        "that holds config.json and *.safetensors"
    )


def _base_of(adapter: Path) -> str:
    """Which model an adapter is for, if its config says so."""
    try:
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return f" for {base}"


def _no_source(source: object) -> InvalidConfig | UnsupportedModel:
    """The error for what is neither a name nor a model of transformers."""
    kind = type(source).__name__
    if hasattr(source, "merge_and_unload"):  # of PEFT, which need not be installed
        remedy = "apply its adapters for good and pass model.merge_and_unload()"
    elif hasattr(source, "_orig_mod"):
        remedy = "pass the model itself, before torch.compile"
    elif isinstance(source, nn.Module):
        remedy = "pass a causal language model of transformers"
    else:
        return InvalidConfig(
            f"model is {source!r}; give a model folder, a hub id or a model of transformers"
        )
    return UnsupportedModel(f"{kind} is no model of transformers; {remedy}")
