"""What `vkv bench long` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .....runtime.cli.options import option
from .....vmem.errors import InvalidConfig
from ...options import (
    dtype_option,
    label_option,
    max_seqs_option,
    seed_option,
    shape_option,
    whole_numbers,
    words,
)

if TYPE_CHECKING:
    import torch

PARTS = ("context", "decode", "lending", "simulated")
LINKS = ("unix", "tcp")
PART_TOKENS = 512  # what moves elsewhere is a multiple of it


@dataclass(frozen=True, kw_only=True)
class LongOptions:
    """What `vkv bench long` runs.

    Attributes:
        pool_tokens: what an instance's `kv_memory` holds.
        counts: of instances, for the longest context.
        creditors: how many engines have a request's first tokens, in `segments` segments.
        segments: of those tokens, at one creditor; the first is what `creditors` share.
        elsewhere_tokens: that lie elsewhere, of `elsewhere_tokens + at_home_tokens`.
        record: of this bench, whose link costs the simulator takes; None for this run's own.
    """

    parts: tuple[str, ...] = option(
        "context,decode,lending,simulated",
        names=("--part", "--parts"),
        parse=words,
        help=f"Of {', '.join(PARTS)}; with commas.",
    )
    shape: str = shape_option("llama-28m")
    dtype: "torch.dtype" = dtype_option("float32")
    pool_tokens: int = option(2112, least=2048, help="Tokens of an instance's kv_memory.")
    output_tokens: int = option(16, least=2, help="Generated after the longest contexts.")
    counts: tuple[int, ...] = option(
        "1,2,4,8", names=("--instances",), parse=whole_numbers, help="Instances; with commas."
    )
    creditors: tuple[int, ...] = option(
        "1,2,3", parse=whole_numbers, help="Engines that have a context's first tokens."
    )
    segments: tuple[int, ...] = option(
        "6,1,2,3", parse=whole_numbers, help="Segments of them at one engine; the first at several."
    )
    batches: tuple[int, ...] = option("1,4", parse=whole_numbers, help="Requests that decode.")
    links: tuple[str, ...] = option("unix,tcp", parse=words, help=f"Of {', '.join(LINKS)}.")
    elsewhere_tokens: int = option(3072, least=PART_TOKENS, help="Of a context, elsewhere.")
    at_home_tokens: int = option(256, least=1, help="And the rest of it.")
    num_steps: int = option(48, least=4, help="Decode steps of each cell.")
    repeats: int = option(1, least=1, help="Rounds of all cells of decodes.")
    max_seqs: int = max_seqs_option(32)
    record: Path | None = option(
        None, help="A record of this bench with decodes, for the simulator's link costs."
    )
    seed: int = seed_option()
    label: str = label_option()

    def __post_init__(self) -> None:
        for name, given, known in (("parts", self.parts, PARTS), ("links", self.links, LINKS)):
            if unknown := [word for word in given if word not in known]:
                raise InvalidConfig(f"{name} has {unknown[0]!r}; use some of {', '.join(known)}")
        if not all((self.parts, self.counts, self.segments, self.batches, self.links)):
            raise InvalidConfig("parts, instances, segments, batches and links need one each")
        if min(*self.counts, *self.creditors, *self.segments, *self.batches) < 1:
            raise InvalidConfig("instances, creditors, segments and batches are 1 or more")
        for count in self.segments:
            if self.elsewhere_tokens % (count * PART_TOKENS):
                raise InvalidConfig(
                    f"elsewhere_tokens {self.elsewhere_tokens} in {count} segments: use equal ones "
                    f"of a multiple of {PART_TOKENS}"
                )
        if bad := [count for count in self.creditors if self.segments[0] % count]:
            raise InvalidConfig(
                f"{self.segments[0]} segments do not go evenly to {bad[0]} creditors"
            )
