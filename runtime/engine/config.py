"""Options of an engine, resolved once."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from ...allocator import MemoryLimit, Sanitize, parse_bytes
from ...vmem.errors import InvalidConfig

KVKind = Literal["virtual", "paged"]
PolicyName = Literal["splitfuse", "prefill_first"]
OrderName = Literal["fcfs", "priority", "fair"]

_SURROGATE_SHARE = 0.5
_GUESSES = "use 'ngram', 'surrogate' or 'surrogate:0.5', or the folder of a draft model"
_LEAST = {
    "max_seqs": 1,
    "max_len": 1,
    "max_batch_tokens": 1,
    "page_bytes": 1,
    "block_tokens": 1,
    "layers_per_range": 1,
    "max_parked": 0,
    "look_ahead_tokens": 0,
    "speculative_tokens": 1,
}
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "lm_head_bits": (None, 4, 8),
    "activation_bits": (8, 16),
    "kv": ("virtual", "paged"),
    "policy": ("splitfuse", "prefill_first"),
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine uses its memory and its steps.

    Attributes:
        max_seqs: requests that run at once.
        max_len: tokens of a request, prompt and output; by default what the model was made for.
        kv_memory: the most bytes that keys and values may take: an integer, a text such as
            "64MiB", a `MemoryLimit` that several engines share, or "auto": half of a machine's
            free memory, or what the largest step leaves on a GPU (measured, `memory_profile`).
            Never more than the slots could use or the machine has. Nothing is taken in advance.
        swap_memory: the most bytes of host memory for keys and values that leave `kv_memory`, those
            of preempted and of finished requests, and come back by a copy where that is faster
            than computing them; None for no such memory. Nothing is taken in advance. Requests
            longer than all of `kv_memory` have their first tokens there, where they are attended.
        kv_dir: a folder that keys and values of finished and preempted requests are saved to, and
            come back from in any process that uses it with this model; None for none.
        kv_dir_limit: the most bytes that its files may take, of those that were there at first and
            those that this process writes; those used least recently go.
        max_batch_tokens: tokens of one step; by default 256 on a CPU, 2048 on a GPU.
        kv: contiguous slots in virtual memory, or the paged baseline.
        attention: a backend's name, or "auto".
        page_bytes: size of a physical page; None for a size that suits the model.
        block_tokens: tokens of a block of the paged baseline.
        layers_per_range: layers that share a stretch of a slot (`KVLayout`); None for one on a
            CPU, whose kernels then read memory in order, and all on a GPU.
        split_kv: keys and values in stretches of their own.
        max_parked: finished requests whose memory is kept for the next; None for `max_seqs`.
        look_ahead_tokens: tokens mapped ahead of a decoding request in the background; 0 for none.
        prefix_reuse: begin a request with keys and values computed for the same tokens before.
        pack_weights: lay linear weights out anew for the CPU's kernels; None does so for models
            that vkv loaded itself, and leaves one that it was given as it is.
        repeatable: a request's tokens depend on nothing but the request, to the bit: not on its
            neighbours, on chunks, prefixes or preemption, nor on the number of threads; on a CPU.
            False takes what is fastest, which is the same kernels but for processors with a
            matrix unit. True refuses a model of which it does not hold.
        lm_head_bits: 4 or 8 to quantise the output layer at load; by default it stays as it is.
        activation_bits: 8 to round inputs of 4- and 8-bit layers to 8 bits, on a CPU: faster for
            many rows, and less exact; `vkv quantize` measures by how much. 16 rounds none.
        generation_config: where sampling parameters come from if a call gives none: "auto" for the
            model's own generation config, "vllm" for the defaults of `SamplingParams`, or a folder
            or file that has one, whose end tokens count, too.
        sanitize: "tenants" clears memory that goes from one owner to another, before who comes next
            may see it: from one `cache_salt`, adapter or `tenant` to another. So it costs nothing
            where there is one. "zero" clears it for each request, "never" for none. No kernel
            reads what it did not write, cleared or not.
        record_decodes: record decode steps and replay them, as CUDA graphs (`recordings`) or on
            a CPU as a list of calls (`tape`); None does so where the attention backend and the
            model can be recorded.
        overlap: prepare a step on the host while the device computes the one before, so that a
            request's end is seen one step late; None does so on a GPU. The tokens are the same.
        speculative: guess tokens that a step then verifies beside the next one, for which the
            weights are read once: "ngram" guesses that a text goes on as it did before;
            "surrogate", or "surrogate:0.5", that half of the model's layers say what all do; a
            checkpoint folder, a hub id or a `transformers` model, that this smaller model of the
            same vocabulary does. None does not guess. The tokens are the same, those that are drawn
            too. Not for hybrids.
        speculative_tokens: the most tokens of a request that are guessed at once.
        policy: "splitfuse", or "prefill_first", a baseline to compare with (`policies`).
        scheduling_policy: who comes first, and who gives way: "fcfs", by arrival; "priority", by
            the `priority` of requests, the lower first; "fair", the `tenant` that got least.
        priority_aging_s: with "priority", seconds of waiting that count as one priority better, so
            that nobody waits for ever; None for never.
        tenant_weights: with "fair", the parts of tenants for whom it is not 1: one of weight 2 gets
            twice as much.
        movable: give each slot pages of its own, which can be handed to an engine in another
            process, so that its requests move there without a byte being copied.
        models: of a zoo that has the model, others that run beside it, by name: requests name the
            one that they are for. `LLM` takes all that can, if it is given the zoo.
        adapters: LoRA adapters to begin with, by name the folder of each (`LLM.load_adapter`).
        idle_trim_s: seconds without a request after which memory of finished ones is given back by
            itself; by default never.
        shortage_wait_s: how long a request may wait for memory that nobody of this engine can
            give back, before it fails; neighbours under a common `MemoryLimit` may.
    """

    max_seqs: int = 32
    max_len: int | None = None
    kv_memory: int | str | MemoryLimit = "auto"
    swap_memory: int | str | None = None
    kv_dir: str | Path | None = None
    kv_dir_limit: int | str = "50GiB"
    max_batch_tokens: int | None = None
    kv: KVKind = "virtual"
    attention: str = "auto"
    page_bytes: int | None = None
    block_tokens: int = 16
    layers_per_range: int | None = None
    split_kv: bool = False
    max_parked: int | None = None
    look_ahead_tokens: int = 16
    prefix_reuse: bool = True
    pack_weights: bool | None = None
    repeatable: bool = False
    lm_head_bits: int | None = None
    activation_bits: int = 16
    generation_config: str | Path = "auto"
    sanitize: Sanitize = "tenants"
    record_decodes: bool | None = None
    overlap: bool | None = None
    speculative: str | Path | nn.Module | None = None
    speculative_tokens: int = 8
    policy: PolicyName = "splitfuse"
    scheduling_policy: OrderName = "fcfs"
    priority_aging_s: float | None = 60.0
    tenant_weights: Mapping[str, float] | None = None
    movable: bool = False
    models: Sequence[str] = ()
    adapters: Mapping[str, str | Path] | None = None
    idle_trim_s: float | None = None
    shortage_wait_s: float = 5.0

    def __new__(cls, **options: Any) -> Self:
        # Before `__init__`, whose TypeError could not suggest the name that was meant.
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise InvalidConfig(f"unknown option {name!r}: {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value is None and default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidConfig(
                    f"{name} is {value!r}; it must be an integer of at least {least}"
                )
        for name in ("split_kv", "prefix_reuse", "repeatable"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidConfig(f"{name} is {getattr(self, name)!r}; use True or False")
        for name in ("pack_weights", "record_decodes", "overlap"):
            if getattr(self, name) not in (None, True, False):
                raise InvalidConfig(f"{name} is {getattr(self, name)!r}; use None, True or False")
        if self.repeatable and self.pack_weights is False:
            raise InvalidConfig(
                "repeatable is True and pack_weights False, but only packed weights are multiplied "
                "the same in any batch; leave pack_weights None"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                use = " or ".join(map(repr, choices))
                raise InvalidConfig(f"{name} is {getattr(self, name)!r}; use {use}")
        self._check_speculative()
        self._check_order()
        if not isinstance(self.generation_config, str | Path):
            raise InvalidConfig(
                f"generation_config is {self.generation_config!r}; use 'auto', 'vllm' or a folder"
            )
        if self.idle_trim_s is not None:
            _check_seconds("idle_trim_s", self.idle_trim_s)
        _check_seconds("shortage_wait_s", self.shortage_wait_s)
        if isinstance(self.kv_memory, MemoryLimit):
            if self.kv == "paged":
                raise InvalidConfig(
                    "kv_memory is a MemoryLimit, and the paged baseline takes its memory in "
                    "advance; give it bytes, or use kv='virtual'"
                )
        elif self.kv_memory != "auto":
            parse_bytes(self.kv_memory)
        if isinstance(self.models, str) or not isinstance(self.models, Sequence):
            raise InvalidConfig(f"models is {self.models!r}; use a list of names in the zoo")
        if self.adapters is not None and not isinstance(self.adapters, Mapping):
            raise InvalidConfig(
                f"adapters is {self.adapters!r}; use a dictionary of names and folders"
            )
        if self.swap_memory is not None:
            parse_bytes(self.swap_memory)
        parse_bytes(self.kv_dir_limit)
        if self.kv_dir is not None:
            if not isinstance(self.kv_dir, str | Path) or not str(self.kv_dir):
                raise InvalidConfig(f"kv_dir is {self.kv_dir!r}; give the path of a folder")
            if not self.prefix_reuse:
                raise InvalidConfig(
                    "kv_dir is given, and prefix_reuse is False, so that no prompt would begin "
                    "with what it has; leave prefix_reuse True"
                )

    @property
    def surrogate_share(self) -> float | None:
        """The part of its layers that a model guesses for itself by; None if it does not."""
        if not isinstance(self.speculative, str):
            return None
        name, _, share = self.speculative.partition(":")
        if name != "surrogate":
            return None
        try:
            number = float(share or _SURROGATE_SHARE)
        except ValueError:
            number = 0.0
        if not 0 < number < 1:
            raise InvalidConfig(
                f"speculative is {self.speculative!r}; after 'surrogate:' write the part of the "
                "layers that guess, between 0 and 1"
            )
        return number

    @property
    def has_draft_model(self) -> bool:
        """True if another model guesses."""
        return self.speculative not in (None, "ngram") and self.surrogate_share is None

    def _check_speculative(self) -> None:
        given = self.speculative
        if given is not None and not isinstance(given, str | Path | nn.Module):
            raise InvalidConfig(f"speculative is {given!r}; {_GUESSES}")
        if isinstance(given, str) and self.has_draft_model and not _may_be_model(given):
            raise InvalidConfig(f"speculative is {given!r}, which is no folder; {_GUESSES}")
        if given is not None and self.overlap:
            raise InvalidConfig(
                "overlap is True, but a step that verifies guesses must be over before the next "
                "one is made; leave it None, or speculative"
            )

    def _check_order(self) -> None:
        if self.scheduling_policy not in ("fcfs", "priority", "fair"):
            raise InvalidConfig(
                f"scheduling_policy is {self.scheduling_policy!r}; use 'fcfs', 'priority' or 'fair'"
            )
        if self.priority_aging_s is not None:
            _check_seconds("priority_aging_s", self.priority_aging_s)
            if not self.priority_aging_s:
                raise InvalidConfig("priority_aging_s is 0; use None for no aging, or more seconds")
        weights = self.tenant_weights
        if weights is None:
            return
        if not isinstance(weights, Mapping):
            raise InvalidConfig(f"tenant_weights is {weights!r}; use a dictionary of numbers")
        for tenant, weight in weights.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not isinstance(tenant, str) or not is_number or not 0 < weight < math.inf:
                raise InvalidConfig(
                    f"tenant_weights has {tenant!r}: {weight!r}; use names, and finite numbers "
                    "above 0"
                )
        if self.scheduling_policy != "fair":
            raise InvalidConfig(
                f"tenant_weights are given, and scheduling_policy is {self.scheduling_policy!r}; "
                "use 'fair', or leave them out"
            )


def _check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InvalidConfig(f"{name} is {value!r}; use a finite number of seconds, or None")


def _may_be_model(place: str) -> bool:
    """Whether it reads like a hub id, or is a path that is there."""
    return "/" in place or Path(place).exists()
