"""The machines that instances are placed on, and what a model's steps take on them."""

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from ....vmem.errors import InvalidConfig
from ..simulator.costs import StepCost, TransferCost

_TABLES = Path(__file__).parent / "tables"

Affinity = Literal["high", "low"]
"""Whether keys and values may go from one node to another, or must stay within one."""


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """What devices are joined by: its latency, and bytes a second between two of them."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.bytes_per_s <= 0:
            raise InvalidConfig(
                f"latency_s {self.latency_s} and bytes_per_s {self.bytes_per_s}: use a time from 0 "
                "on, and a rate above 0"
            )


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A description of all nodes, which are alike.

    Attributes:
        nodes, gpus_per_node: how many.
        affinity: "high" where the network is fast enough for keys and values; with "low" a prompt's
            instance and that of the tokens after it share a node, stage by stage.
        within: between devices of a node. NVLink of an A100 by default.
        network: between nodes. 25 Gbit/s by default, as in DistServe's evaluation.
    """

    nodes: int = 1
    gpus_per_node: int = 4
    affinity: Affinity = "high"
    within: Wire = Wire(latency_s=2e-5, bytes_per_s=2e11)
    network: Wire = Wire(latency_s=1e-4, bytes_per_s=25e9 / 8)

    def __post_init__(self) -> None:
        if min(self.nodes, self.gpus_per_node) < 1:
            raise InvalidConfig(
                f"nodes {self.nodes} and gpus_per_node {self.gpus_per_node}: use one at least"
            )

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.nodes * self.gpus_per_node


class CostTable(msgspec.Struct, frozen=True, kw_only=True):
    """What steps of one model on one kind of device take.

    Attributes:
        source: where the figures come from.
        token_bytes: keys and values of a token, over all layers.
        value_bytes: of an activation that goes from one stage to the next.
        costs: by tensor parallelism.
        capacities: tokens of keys and values beside the weights, by (tensor, pipeline) parallelism.
    """

    name: str
    source: str
    device: str
    model: str
    num_layers: int
    num_heads: int
    hidden_size: int
    value_bytes: int
    token_bytes: int
    costs: dict[int, StepCost]
    capacities: list[tuple[int, int, int]]

    def capacity(self, tensor: int, pipeline: int) -> int | None:
        """Tokens that an instance of that size holds; None if the model does not fit."""
        known = {(t, p): tokens for t, p, tokens in self.capacities}
        return known.get((tensor, pipeline)) if tensor in self.costs else None

    def cost(self, tensor: int, pipeline: int, wire: Wire) -> StepCost:
        """Of an instance of that size, whose stages are joined by `wire`."""
        return self.costs[tensor].in_stages(
            pipeline,
            hop_s=wire.latency_s,
            hop_token_s=self.hidden_size * self.value_bytes / wire.bytes_per_s,
        )

    def transfer(self, wire: Wire) -> TransferCost:
        """Of keys and values, one stream over `wire`."""
        return TransferCost(
            latency_s=wire.latency_s, bytes_per_s=wire.bytes_per_s, token_bytes=self.token_bytes
        )


def table_names() -> list[str]:
    """The tables that come with it."""
    return sorted(path.stem for path in _TABLES.glob("*.json"))


def read_table(name_or_path: str) -> CostTable:
    """A table that comes with it, or one in a file. Raises InvalidConfig, with the remedy."""
    path = Path(name_or_path)
    if name_or_path in table_names():
        text = (_TABLES / f"{name_or_path}.json").read_bytes()
    elif path.is_file():
        text = path.read_bytes()
    else:
        raise InvalidConfig(
            f"there is no table {name_or_path!r}: give a file, or one of {', '.join(table_names())}"
        )
    try:
        return msgspec.json.decode(text, type=CostTable)
    except msgspec.DecodeError as error:
        raise InvalidConfig(f"{name_or_path} is no table of costs: {error}") from error


def read_machine(path: Path) -> Machine:
    """A description in TOML. Raises InvalidConfig that names what is wrong in it."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Machine)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        known = ", ".join(Machine.__struct_fields__)
        raise InvalidConfig(f"{path} describes no machine: {error}; fields are {known}") from error
