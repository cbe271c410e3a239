"""Attention backends by name: created on demand, chosen automatically, described.

Only names are known here until one is asked for; a backend's module, and the package behind it,
is imported then.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, TypedDict

from ..vmem.errors import InvalidConfig, UnsupportedAttention
from .base import AttentionBackend, AttentionNeeds, Capabilities, missing_features
from .segments import ByLogSumExp, PartialAttention

_BACKENDS: Mapping[str, str] = {
    "reference": ".reference:ReferenceBackend",
    "sdpa": ".sdpa:SdpaBackend",
    "native": ".native:NativeBackend",
    "torch_flash": ".torch_flash:TorchFlashBackend",
    "flash_attn": ".flash_attn:FlashAttnBackend",
    "flash_attn_3": ".flash_attn:FlashAttn3Backend",
    "flashinfer": ".flashinfer:FlashInferBackend",
    "paged_sdpa": ".paged_sdpa:PagedSdpaBackend",
    "paged_flash": ".paged_flash:PagedFlashBackend",
    "paged_flash_attn": ".flash_attn:PagedFlashAttnBackend",
    "paged_flashinfer": ".paged_flashinfer:PagedFlashInferBackend",
}

# What "auto" tries, best first; `reference` is never chosen, only asked for, and so are the paged
# kernels that want larger blocks than a paged cache has unless told otherwise.
_PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "cpu": ("native", "sdpa", "paged_sdpa"),
    "cuda": ("torch_flash", "flash_attn", "flashinfer", "sdpa", "paged_flashinfer", "paged_sdpa"),
}


class BackendDescription(TypedDict):
    """One row of `vkv info`: plain data, ready for JSON."""

    name: str
    available: bool
    reason: str | None  # why it is not available
    devices: list[str]
    dtypes: list[str]
    max_head_dim: int | None
    head_dim_multiple: int
    features: list[str]
    over_read_tokens: int


class BackendChoice(NamedTuple):
    """What "auto" chooses: a name, if any backend will do, and why not the ones it prefers."""

    name: str | None
    passed_over: tuple[tuple[str, str], ...]  # (name, reason), best first
    graphs: bool  # whether its decodes can be recorded and replayed


def backend_names() -> tuple[str, ...]:
    return tuple(_BACKENDS)


def create_backend(name: str, needs: AttentionNeeds) -> AttentionBackend:
    """The backend called `name` ("auto" chooses one), if it can serve `needs` on this machine.

    Raises:
        InvalidConfig: no backend has that name.
        UnsupportedAttention: it cannot run here, or lacks something the model needs; the
            message says what, and which backends would do.
    """
    if name == "auto":
        return choose_backend(needs)
    if name not in _BACKENDS:
        names = ", ".join(["auto", *_BACKENDS])
        raise InvalidConfig(f"attention backend {name!r} is unknown; choose one of: {names}")
    backend = _load(name)
    obstacles = _obstacles(backend, needs)
    if obstacles:
        raise UnsupportedAttention(
            f"attention backend {name!r} cannot be used: {'; '.join(obstacles)}. "
            + _alternatives(needs)
        )
    return backend()


def choose_backend(needs: AttentionNeeds) -> AttentionBackend:
    """The best backend that can serve `needs` on this machine.

    Raises UnsupportedAttention, with the reason against each candidate, if none can.
    """
    choice = explain_choice(needs)
    if choice.name is not None:
        return _load(choice.name)()
    reasons = [f"{name}: {reason}" for name, reason in choice.passed_over]
    detail = " | ".join(reasons) or f"no backend runs on device {needs.device!r}"
    raise UnsupportedAttention(f"no attention backend serves this model here. {detail}")


def explain_choice(needs: AttentionNeeds) -> BackendChoice:
    """What "auto" chooses for `needs` on this machine, and why not better ones."""
    passed_over = []
    for name in _PREFERENCE.get(needs.device, ()):
        backend = _load(name)
        obstacles = _obstacles(backend, needs)
        if not obstacles:
            return BackendChoice(name, tuple(passed_over), backend.capabilities.graphs)
        passed_over.append((name, "; ".join(obstacles)))
    return BackendChoice(None, tuple(passed_over), graphs=False)


def partial_attention(backend: AttentionBackend) -> PartialAttention:
    """How `backend` attends to keys in several places: to the bit as in one, where it can.

    It shares the backend's state, so that both serve one thread. Raises UnsupportedAttention if
    the backend reads no contiguous slots, or does not return the log-sum-exp.
    """
    if not (backend.capabilities.contiguous and backend.capabilities.lse):
        raise UnsupportedAttention(
            f"attention backend {backend.name!r} cannot attend to keys in several places: it must "
            "read contiguous slots, and return the log-sum-exp"
        )
    if backend.name == "native":
        return _load_from(".native_segments:ByHalves")(backend)
    return ByLogSumExp(backend)


def describe_backends() -> list[BackendDescription]:
    """Every backend, whether it can run here, and what it can do."""
    return [_describe(name, _load(name)) for name in _BACKENDS]


def _load(name: str) -> type[AttentionBackend]:
    return _load_from(_BACKENDS[name])


def _load_from(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module, __package__), attribute)


def _obstacles(backend: type[AttentionBackend], needs: AttentionNeeds) -> list[str]:
    """Why `backend` cannot serve `needs` here, in words; empty if it can."""
    unavailable = backend.unavailable_reason()
    return [
        *([unavailable] if unavailable else []),
        *missing_features(backend.capabilities, needs),
    ]


def _alternatives(needs: AttentionNeeds) -> str:
    fitting = [name for name in _BACKENDS if not _obstacles(_load(name), needs)]
    if not fitting:
        return "No other backend can serve this model here."
    return f"These can: {', '.join(fitting)}"


def _describe(name: str, backend: type[AttentionBackend]) -> BackendDescription:
    capabilities = backend.capabilities
    reason = backend.unavailable_reason()
    return BackendDescription(
        name=name,
        available=reason is None,
        reason=reason,
        devices=sorted(capabilities.devices),
        dtypes=sorted(str(dtype).removeprefix("torch.") for dtype in capabilities.dtypes),
        max_head_dim=capabilities.max_head_dim,
        head_dim_multiple=capabilities.head_dim_multiple,
        features=_features(capabilities),
        over_read_tokens=capabilities.over_read_tokens,
    )


def _features(capabilities: Capabilities) -> list[str]:
    names = ("contiguous", "paged", "window", "softcap", "sinks", "lse", "graphs")
    names += ("unequal_head_dims",)
    return [name for name in names if getattr(capabilities, name)]
