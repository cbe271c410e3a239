"""What a cluster is asked to be, checked before anything is started."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...vmem import linux
from ...vmem.errors import InvalidConfig
from ..adapters.adapters import adapter_folder
from ..blocks.places import Source
from .policies import CLUSTER_POLICIES, ClusterPolicy, Disaggregated
from .snapshot import Role

_LIVENESS_S = (0.1, 86400.0)  # of three times as much the system keeps no TCP connection alive
_ROLES = ("prefill", "decode", "both")


def instance_options(options: Mapping[str, Any], sharing: int | None) -> dict[str, Any]:
    """Those of each instance: pages that can change hands, and where so many share this machine's
    memory a part of that."""
    found = dict(options)
    adapters = options.get("adapters") or {}
    found["adapters"] = {name: str(adapter_folder(path)) for name, path in adapters.items()}
    if options.get("kv", "virtual") == "virtual":
        found.setdefault("movable", True)
    if sharing is not None:
        half = linux.available_bytes() // 2  # the other for weights and steps
        found.setdefault("kv_memory", half // sharing)
    return found


def checked_roles(roles: Sequence[Role] | None, instances: int) -> list[Role]:
    """A role for each instance. Raises InvalidConfig."""
    if instances < 1:
        raise InvalidConfig(f"instances is {instances}; a cluster has one at least")
    if roles is None:
        return ["both"] * instances
    unknown = [role for role in roles if role not in _ROLES]
    if unknown:
        raise InvalidConfig(f"roles has {unknown[0]!r}; use some of {', '.join(_ROLES)}")
    if len(roles) != instances:
        raise InvalidConfig(f"{len(roles)} roles for {instances} instances; name one for each")
    for one in ("prefill", "decode"):
        if all(role not in (one, "both") for role in roles):
            raise InvalidConfig(f"roles {list(roles)} leave nobody to {one}; make one 'both'")
    return list(roles)


def check_processes(threads: int | None, liveness_s: float) -> None:
    """Raises InvalidConfig for what no instance could work with."""
    if threads is not None and threads < 1:
        raise InvalidConfig(
            f"threads is {threads}; give each instance one at least, or None to part the processors"
        )
    least, most = _LIVENESS_S
    if not least <= liveness_s <= most:
        raise InvalidConfig(
            f"liveness_s is {liveness_s}; use {least:g} to {most:g} s, and more than the longest "
            "step takes, or instances that work are taken for dead"
        )


def checked_policy(policy: str | ClusterPolicy | None, roles: Sequence[Role]) -> ClusterPolicy:
    """The policy that is named, or that suits the roles. Raises InvalidConfig."""
    if policy is None:
        policy = "llumnix" if all(role == "both" for role in roles) else "disaggregated"
    if not isinstance(policy, str):
        return policy
    if policy not in CLUSTER_POLICIES:
        raise InvalidConfig(
            f"policy is {policy!r}; use one of {', '.join(CLUSTER_POLICIES)}, or an object"
        )
    if policy != Disaggregated.name and any(role != "both" for role in roles):
        raise InvalidConfig(
            f"policy is {policy!r}, which moves no computed prompt to those that are to decode, "
            f"and roles are {list(roles)}; use {Disaggregated.name!r}, or leave one of the two out"
        )
    return CLUSTER_POLICIES[policy]()


def checked_model(model: Source) -> str | None:
    """What instances load the model from. Raises InvalidConfig."""
    if model is None:
        return None
    if isinstance(model, str | Path):  # a folder's name must not depend on where a process began
        return str(Path(model).resolve()) if Path(model).exists() else str(model)
    raise InvalidConfig(
        f"model is a {type(model).__name__}, which cannot be sent to other processes; save it "
        "(model.save_pretrained) and give the folder"
    )
