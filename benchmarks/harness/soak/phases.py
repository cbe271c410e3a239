"""The two clusters that take turns: what one cannot have at once with the other.

Roles of their own and lending exclude each other, and a cluster loads one model, or a zoo of models
that are stored alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.cluster.cluster import Cluster
from .asks import Mix
from .models import BASE, INT4, TUNED, Models
from .options import SoakOptions

KV_DIR = "kv"  # where instances save keys and values, in the soak's home
PAGE_BYTES = 8192  # 32 tokens of a layer
_POOL_TOKENS = 2080  # of an instance; a long request has 1,024 of them at home
_LAYERS = 4
_POOL_BYTES = _POOL_TOKENS // 32 * _LAYERS * PAGE_BYTES
LIVENESS_S = 10.0
_LONG_LENDERS = 3  # instances at least, of which one may die while others hold what is long

_KINDS = {"greedy": 5, "seeded": 5, "penalised": 2, "several": 1, "stop": 1}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A cluster, and what it is asked.

    Attributes:
        name, about: of it, in a word and in some.
        models: all there are.
        source, options: of the `Cluster`.
        voices: as of `Clients`.
    """

    name: str
    about: str
    models: Models
    source: Path
    options: Mapping[str, Any]
    mix: Mix
    voices: Mapping[str, Mapping[str, str]]

    @property
    def pool_bytes(self) -> int:
        """Of keys and values in an instance, at most."""
        return int(self.options["kv_memory"])

    def open(self, instances: int) -> Cluster:
        """Start it."""
        return Cluster(self.source, instances=instances, **self.options)


def phases(options: SoakOptions, models: Models, home: Path) -> list[Phase]:
    """Those that take turns."""
    found = []
    if options.has("mixed"):
        found.append(_mixed(options, models, home))
    if options.has("apart"):
        found.append(_apart(options, models))
    return found


def _mixed(options: SoakOptions, models: Models, home: Path) -> Phase:
    lends = options.has("lending") and options.instances > _LONG_LENDERS
    kinds = _kinds(options) | ({"long": 1} if lends else {})
    more: dict[str, Any] = {"lending": lends}
    if options.has("swaps"):
        more |= {"swap_memory": _POOL_BYTES // 2, "kv_dir": home / KV_DIR, "kv_dir_limit": "32MiB"}
    if options.has("speculation"):
        more["speculative"] = "ngram"
    voices = {BASE: {}, TUNED: {"model": TUNED}} | _adapters(options, models, BASE)
    return Phase(
        name="mixed",
        about="a model, a fine-tune and adapters of it; fair shares, lending",
        models=models,
        source=models.zoo,
        options=_common(options, models)
        | {
            "model": BASE,
            "max_len": 2 * _POOL_TOKENS,
            "scheduling_policy": "fair",
            "tenant_weights": {"light": 2.0},
            "shortage_wait_s": 30.0,
        }
        | more,
        mix=Mix(
            name="mixed",
            kinds=kinds,
            voices=tuple(voices),
            long_tokens=(_POOL_TOKENS + 40, _POOL_TOKENS + 600),
        ),
        voices=voices,
    )


def _apart(options: SoakOptions, models: Models) -> Phase:
    voices = {INT4: {}} | _adapters(options, models, INT4)
    more: dict[str, Any] = {}
    if options.has("swaps"):
        more["swap_memory"] = 2 * _POOL_BYTES
    if options.has("speculation"):
        more["speculative"] = "surrogate"
    num_prefill = max(1, options.instances // 2)
    roles = ["prefill"] * num_prefill + ["decode"] * (options.instances - num_prefill)
    return Phase(
        name="apart",
        about="a 4-bit model and adapters of it; prompts and tokens on instances of their own, "
        "priorities",
        models=models,
        source=models.int4,
        options=_common(options, models)
        | {
            "dtype": "bfloat16",
            "kv_memory": _POOL_BYTES // 2,  # of the same tokens
            "roles": roles,
            "lending": False,
            "max_len": _POOL_TOKENS // 2,
            "scheduling_policy": "priority",
            "priority_aging_s": 2.0,
        }
        | more,
        mix=Mix(name="apart", kinds=_kinds(options), voices=tuple(voices), has_priorities=True),
        voices=voices,
    )


def _common(options: SoakOptions, models: Models) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "repeatable": True,
        "threads": 1,
        "max_seqs": 6,
        "max_batch_tokens": 128,
        "page_bytes": PAGE_BYTES,
        "kv_memory": _POOL_BYTES,
        "liveness_s": LIVENESS_S,
    }
    if options.has("adapters"):
        found["adapters"] = models.adapters
    return found


def _kinds(options: SoakOptions) -> dict[str, int]:
    more = {
        "structured": ("structured", 2),
        "conversations": ("conversation", 4),
        "cancels": ("cancel", 2),
    }
    return _KINDS | {kind: often for part, (kind, often) in more.items() if options.has(part)}


def _adapters(options: SoakOptions, models: Models, base: str) -> dict[str, Mapping[str, str]]:
    names = models.adapters if options.has("adapters") else ()
    return {f"{base}/{name}": {"adapter": name} for name in names}
