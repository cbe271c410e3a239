"""All placements that a machine has room for.

Source: Zhong et al., DistServe (OSDI 2024), arXiv:2401.09670, algorithms 1 and 2.
"""

from collections.abc import Iterator
from math import gcd

import msgspec

from ..snapshot import Role
from .machine import CostTable, Machine


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Instances that are alike.

    Attributes:
        tensor, pipeline: devices of a stage, and stages.
    """

    role: Role
    count: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def num_gpus(self) -> int:
        """Of all of them."""
        return self.count * self.tensor * self.pipeline

    def __str__(self) -> str:
        size = f"tp {self.tensor}" + (f" pp {self.pipeline}" if self.pipeline > 1 else "")
        return f"{self.count} {self.role} ({size})"


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """A unit of instances, of which there may be as many as there is room for.

    Attributes:
        crossing: parts that each instance's stages are cut into, each on a node of its own.
        is_within: whether all of it, or each of these parts, is on one node.
    """

    groups: tuple[Group, ...]
    crossing: int = 1
    is_within: bool = True

    @property
    def num_gpus(self) -> int:
        """Of a unit."""
        return sum(group.num_gpus for group in self.groups)

    @property
    def is_apart(self) -> bool:
        """Whether prompts are computed by other instances than the tokens after them."""
        return len(self.groups) > 1

    def __str__(self) -> str:
        parts = " + ".join(map(str, self.groups))
        return parts + (f", over {self.crossing} nodes" if self.crossing > 1 else "")


def placements(
    machine: Machine,
    table: CostTable,
    *,
    most_instances: int = 1,
    apart: bool = True,
    together: bool = True,
) -> Iterator[Placement]:
    """Each of them once; a unit that is twice another is left out.

    Args:
        most_instances: of each role, in a unit.
        apart, together: whether to look at prompts and decodes apart, and on the same instances.
    """
    if together:
        for tensor, pipeline in _sizes(machine, table, machine.num_gpus):
            group = Group(role="both", tensor=tensor, pipeline=pipeline)
            is_within = group.num_gpus <= machine.gpus_per_node
            yield Placement(groups=(group,), is_within=is_within)
    if apart:
        yield from _apart(machine, table, most_instances)


def _apart(machine: Machine, table: CostTable, most_instances: int) -> Iterator[Placement]:
    is_low = machine.affinity == "low"
    room = machine.gpus_per_node if is_low else machine.num_gpus
    counts = [
        (p, d)
        for p in range(1, most_instances + 1)
        for d in range(1, most_instances + 1)
        if gcd(p, d) == 1
    ]
    for crossing in range(1, machine.nodes + 1) if is_low else (1,):
        sizes = list(_sizes(machine, table, room, crossing))
        for num_prefill, num_decode in counts:
            for tensor_p, pipeline_p in sizes:
                for tensor_d, pipeline_d in sizes:
                    groups = (
                        Group(
                            role="prefill",
                            count=num_prefill,
                            tensor=tensor_p,
                            pipeline=pipeline_p * crossing,
                        ),
                        Group(
                            role="decode",
                            count=num_decode,
                            tensor=tensor_d,
                            pipeline=pipeline_d * crossing,
                        ),
                    )
                    found = Placement(groups=groups, crossing=crossing)
                    if found.num_gpus > room * crossing:
                        continue
                    is_within = found.num_gpus <= machine.gpus_per_node * crossing
                    yield msgspec.structs.replace(found, is_within=is_within)


def _sizes(
    machine: Machine, table: CostTable, room: int, crossing: int = 1
) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline parallelism, the latter within one of `crossing` parts."""
    for tensor in sorted(table.costs):
        if tensor > machine.gpus_per_node:
            break  # a layer's devices talk too much for a network
        for pipeline in range(1, room // tensor + 1):
            stages = pipeline * crossing
            if not table.num_layers % stages and table.capacity(tensor, stages) is not None:
                yield tensor, pipeline
