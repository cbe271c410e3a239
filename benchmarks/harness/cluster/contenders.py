"""Policies of a cluster as they are typed: a name, and what is other about it than by default.

- `round_robin`
- `llumnix:source_below=60:moves=2`
- `llumnix:headroom=11000:order=priority`: urgent requests count as more, and go first
- `llumnix:least=4:most=64:below=160`: so many instances, by their average freeness
- `llumnix:instances=24`: beginning with so many, in the simulator
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.cluster.policies import (
    CLUSTER_POLICIES,
    ClusterPolicy,
    Freeness,
    Llumnix,
    Scaling,
)
from ...vmem.errors import InvalidConfig

URGENT = -1  # the priority of urgent requests; others have 0
_ORDERS = ("fcfs", "priority")
_SCALING = ("least", "most", "below", "above", "pause_s")
_OBJECTS = ("freeness", "scaling", "switching")  # that are not given as numbers


@dataclass(frozen=True)
class Contender:
    """A policy to compare.

    Attributes:
        text: as it was typed.
        order: of the requests of an instance, as of `EngineConfig.scheduling_policy`; None for the
            one that is given elsewhere.
        instances: to begin with; None for as many as are given elsewhere.
    """

    text: str
    name: str
    order: str | None
    instances: int | None
    arguments: Mapping[str, Any]

    def policy(self) -> ClusterPolicy:
        """A new object, which remembers nothing."""
        make: Callable[..., ClusterPolicy] = CLUSTER_POLICIES[self.name]
        return make(**self.arguments)


def contender(text: str) -> Contender:
    """Raises InvalidConfig that names what is wrong, and what could be there."""
    name, *given = text.split(":")
    name = name.replace("-", "_")
    if name not in CLUSTER_POLICIES:
        raise InvalidConfig(f"policy is {name!r}; use one of {', '.join(CLUSTER_POLICIES)}")
    values = dict(_pair(text, item) for item in given)
    order = values.pop("order", None)
    if order is not None and order not in _ORDERS:
        raise InvalidConfig(f"{text!r} has the order {order!r}; use one of {', '.join(_ORDERS)}")
    numbers = {key: _number(text, key, value) for key, value in values.items()}
    instances = numbers.pop("instances", None)
    if instances is not None and (instances < 1 or instances != int(instances)):
        raise InvalidConfig(f"{text!r} has {instances} instances; use a whole number, from 1 on")
    count = None if instances is None else int(instances)
    return Contender(text, name, order, count, _arguments(text, name, numbers))


def _arguments(text: str, name: str, numbers: dict[str, float]) -> dict[str, Any]:
    """What the policy is made with."""
    own = [p for p in inspect.signature(CLUSTER_POLICIES[name]).parameters if p not in _OBJECTS]
    headroom = ["headroom"] if name == Llumnix.name else []
    known = [*own, *headroom, *_SCALING]
    if unknown := [key for key in numbers if key not in known]:
        raise InvalidConfig(f"{text!r} has {unknown[0]!r}; use some of {', '.join(known)}")
    arguments: dict[str, Any] = {key: numbers[key] for key in own if key in numbers}
    if "headroom" in numbers:
        arguments["freeness"] = Freeness({URGENT: int(numbers["headroom"])})
    scaling: dict[str, Any] = {key: numbers[key] for key in _SCALING if key in numbers}
    if scaling:
        if not {"least", "most"} <= scaling.keys():
            raise InvalidConfig(f"{text!r} scales: give the least and the most instances, too")
        if "freeness" in arguments:
            scaling["freeness"] = arguments["freeness"]
        arguments["scaling"] = Scaling(**scaling)
    return arguments


def _pair(text: str, item: str) -> tuple[str, str]:
    key, separator, value = item.partition("=")
    if not separator:
        raise InvalidConfig(f"{text!r}: write NAME:KEY=VALUE, such as llumnix:moves=2")
    return key, value


def _number(text: str, key: str, value: str) -> float:
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise InvalidConfig(f"{text!r}: {key} is {value!r}; give a number") from None
