"""The systems that are compared as a whole: how the worker of each is started."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...vmem.errors import InvalidConfig
from ..peers.peer import WORKERS, interpreter_of


class Command(NamedTuple):
    """How a system's worker is started.

    Attributes:
        words: interpreter and script.
        own: the options that are its alone.
    """

    words: list[str]
    own: dict[str, Any]


SYSTEMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vkv": ("vkv_worker.py", {"kv": "virtual"}),
    "vkv-paged": ("vkv_worker.py", {"kv": "paged"}),
    "transformers": ("transformers_worker.py", {"cache": "dynamic"}),
    "transformers-static": ("transformers_worker.py", {"cache": "static"}),
    "transformers-compiled": ("transformers_worker.py", {"cache": "static", "compile": True}),
    "transformers-continuous": ("transformers_worker.py", {"cache": "continuous"}),
}
# On the same weights in 4 bits.
INT4_SYSTEMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vkv-int4": ("vkv_worker.py", {"kv": "virtual"}),
    "vkv-int4-head": ("vkv_worker.py", {"kv": "virtual", "lm_head_bits": 4}),
    "vkv-int4-int8": (
        "vkv_worker.py",
        {"kv": "virtual", "lm_head_bits": 4, "activation_bits": 8},
    ),
}
PEERS: Mapping[str, str] = {
    "vllm": "vllm_worker.py",
    "llama-cpp": "llama_cpp_worker.py",
    "openvino": "openvino_worker.py",
    "vkv-other": "vkv_worker.py",  # another version, before a change for one
}
# Of peers, the forms with 4-bit weights that each makes itself, or the checkpoint's in 4 bits.
INT4_PEERS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama-cpp": {
        "llama-cpp-q4_0": {"weights": "q4_0"},
        "llama-cpp-q4_k_m": {"weights": "q4_k_m"},
    },
    "openvino": {"openvino-int4": {"weights": "int4"}},
    "vkv-other": {"vkv-other-int4": {"kv": "virtual"}},
}
# Those that are given the checkpoint in 4 bits.
READ_INT4 = (*INT4_SYSTEMS, "vkv-other-int4")
# Those whose numbers are those of the dense weights, so that their tokens can be compared.
_ROUNDED = (*READ_INT4, *(name for forms in INT4_PEERS.values() for name in forms))


def commands(
    systems: Sequence[str],
    peers: Mapping[str, str],
    *,
    quant: bool,
    eager: bool = False,
    rounds_inputs: bool = True,
) -> dict[str, Command]:
    """Of each system, by name, how its worker is started; the first is what others are compared to.

    `rounds_inputs`: the device and dtype can have 8-bit activations, so a system with these is
    among those in 4 bits.

    Raises InvalidConfig if a system or a peer is unknown, or an interpreter is not there.
    """
    found: dict[str, Command] = {}
    for name in systems:
        if name not in SYSTEMS:
            raise InvalidConfig(f"system {name!r} is unknown; use some of {', '.join(SYSTEMS)}")
        found[name] = _ours(*SYSTEMS[name])
    for name, (script, own) in INT4_SYSTEMS.items() if quant else ():
        if rounds_inputs or "activation_bits" not in own:
            found[name] = _ours(script, own)
    for name, path in peers.items():
        words = [interpreter_of(name, path, PEERS), str(WORKERS / PEERS[name])]
        found[name] = Command(words, {"eager": eager, "kv": "virtual"})
        for int4, own in INT4_PEERS.get(name, {}).items() if quant else ():
            found[int4] = Command(words, own)
    return found


def has_dense_weights(name: str) -> bool:
    """Whether a system computes with the weights as they are, and so has everybody's tokens."""
    return name not in _ROUNDED


def compiles_by_shape(command: Command) -> bool:
    """Whether a system is slow when a shape is new to it, beyond what its users would measure."""
    return bool(command.own.get("compile"))


def _ours(script: str, own: dict[str, Any]) -> Command:
    return Command([sys.executable, str(WORKERS / script)], own)
