"""What was measured of steps and of asking creditors, for the simulator."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ....runtime.cluster.simulator.costs import LoanCost, StepCost
from ....vmem.errors import InvalidConfig
from ...record import read_record


@dataclass(frozen=True)
class Costs:
    """Of one model.

    Attributes:
        token_bytes: keys and values of a token.
    """

    step: StepCost
    loan: LoanCost
    token_bytes: int


def recorded_step_cost(path: Path) -> StepCost:
    """Of a record of `vkv bench long`. Raises InvalidConfig where it has none."""
    found = _results(path).get("lending", {}).get("step_cost")
    if not found:
        raise InvalidConfig(
            f"{path} has no costs of steps: give a record of `vkv bench long` with the part lending"
        )
    return msgspec.convert(found, StepCost)


def recorded_loan_cost(path: Path, link: str = "unix") -> LoanCost:
    """The same of asking creditors over `link`."""
    found = dict(_results(path).get("loan_costs", {}).get(link, {}))
    if not found:
        raise InvalidConfig(
            f"{path} has no costs of {link}: give a record of `vkv bench long` with the part decode"
        )
    del found["error"]
    return msgspec.convert(found, LoanCost)


def _results(path: Path) -> dict[str, Any]:
    return read_record(path).get("results", {})
