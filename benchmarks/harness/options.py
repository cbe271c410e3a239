"""Options that benches share, and what is made of the words given for them.

Modules of options import nothing that is slow: `vkv bench` lists its commands from them.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..runtime.cli.options import computed, option

if TYPE_CHECKING:
    import torch

RECORDS = Path("benchmarks/records")
_Number = TypeVar("_Number", int, float)


# -- words -------------------------------------------------------------------------------------


def words(listed: str) -> tuple[str, ...]:
    """What a list with commas names."""
    return tuple(item.strip() for item in listed.split(",") if item.strip())


def whole_numbers(listed: str) -> tuple[int, ...]:
    """The integers in a list with commas."""
    return _numbers(listed, int)


def decimals(listed: str) -> tuple[float, ...]:
    """The numbers in a list with commas."""
    return _numbers(listed, float)


def interpreters(given: list[str]) -> dict[str, str]:
    """Interpreters by the names of peers, from NAME=PYTHON."""
    peers: dict[str, str] = {}
    for text in given:
        name, separator, interpreter = text.partition("=")
        if not separator:
            raise ValueError(f"{text!r}: write NAME=PYTHON, such as vllm=/opt/vllm/bin/python")
        peers[name] = interpreter
    return peers


def num_bytes(text: str) -> int:
    """Bytes from a text such as "64MiB"."""
    from ..allocator import parse_bytes

    return parse_bytes(text)


def sizes(listed: str) -> tuple[int, ...]:
    """The sizes in a list with commas, in bytes."""
    return tuple(num_bytes(text) for text in words(listed))


def torch_dtype(name: str) -> "torch.dtype":
    """A type of numbers by its name."""
    from ..runtime.model.loading import parse_dtype

    found = parse_dtype(name)
    if found is None:
        raise ValueError("a benchmark needs a type: use float32, bfloat16 or float16")
    return found


def dtype_name(name: str) -> str:
    """The name of a type of numbers, if there is one of that name."""
    return str(torch_dtype(name)).removeprefix("torch.")


def torch_device(name: str) -> "torch.device":
    """A device by its name; "auto" is a GPU where there is one."""
    from ..runtime.engine.devices import resolve_device

    return resolve_device(name)


def _numbers(listed: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(item) for item in words(listed))
    except ValueError as error:
        raise ValueError("give numbers, with commas") from error


# -- of every bench, and of those that have no folder -------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a bench writes."""

    out: Path = option(RECORDS, help="Folder for record, table and plot.")


@dataclass(frozen=True, kw_only=True)
class StartupOptions:
    """What `vkv bench startup` runs.

    Attributes:
        peers: interpreters by name, each with a vkv of its own.
    """

    repeats: int = option(7, least=1, help="Starts of each command.")
    peers: Mapping[str, str] = option(
        (),
        names=("--peer",),
        kind=list[str],
        parse=interpreters,
        help="NAME=PYTHON: an interpreter with another vkv, to compare with. Repeatable.",
    )


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where records are."""

    folder: Path = option(RECORDS, help="Where the records are and the page goes.")


# -- fields ------------------------------------------------------------------------------------


def shape_option(default: str) -> Any:
    """A named shape of `models.shapes`."""
    return option(
        default,
        help="llama-tiny, llama-28m, llama-455m, qwen2-0.5b or llama3-8b; random weights.",
    )


def dtype_option(default: str) -> Any:
    """A `torch.dtype`."""
    return option(default, parse=torch_dtype, help="float32, bfloat16 or float16.")


def dtype_name_option(default: str) -> Any:
    """The name of a `torch.dtype`, for another process."""
    return option(default, parse=dtype_name, help="float32, bfloat16 or float16.")


def device_option() -> Any:
    """A `torch.device`."""
    return option("auto", parse=torch_device, help="auto, cpu or cuda.")


def model_option() -> Any:
    """A folder, or None."""
    return option(None, help="A checkpoint folder, in place of a shape.")


def max_seqs_option(default: int) -> Any:
    return option(default, least=1, help="Requests that run at once.")


def peers_option() -> Any:
    """Interpreters by name."""
    return option(
        (),
        names=("--peer",),
        kind=list[str],
        parse=interpreters,
        help="NAME=PYTHON: vllm (or, of whole systems, llama-cpp, openvino and vkv-other, another "
        "version of vkv), and an interpreter that has it. Repeatable.",
    )


def threads_option(help: str) -> Any:
    """Threads of processes; as many as there are usable cores where none are given."""
    return computed(lambda: len(os.sched_getaffinity(0)), kind=int, least=1, help=help)


def label_option() -> Any:
    return option("", help="A word to add to the record's name.")


def seed_option() -> Any:
    return option(0, help="Of lengths, prompts and weights.")
