"""What `vkv bench long` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....runtime.cli.options import option
from ....vmem.errors import InvalidConfig
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
        workload, scale, most_tokens: of the requests that are served with lending and without; all
            of them fit into one pool.
        policies: that give them to instances.
        rate: of requests, more than can be served: what counts is how soon all have ended.
        record: of this bench, whose costs the simulator takes where this run measures none.
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
    batches: tuple[int, ...] = option("1,2", parse=whole_numbers, help="Requests that decode.")
    links: tuple[str, ...] = option("unix,tcp", parse=words, help=f"Of {', '.join(LINKS)}.")
    elsewhere_tokens: int = option(3072, least=4 * PART_TOKENS, help="Of a context, elsewhere.")
    at_home_tokens: int = option(256, least=1, help="And the rest of it.")
    num_steps: int = option(48, least=4, help="Decode steps of each cell.")
    repeats: int = option(1, least=1, help="Rounds of all cells of decodes.")
    lenders: int = option(4, least=2, help="Instances that serve with lending and without.")
    max_seqs: int = max_seqs_option(32)
    max_batch_tokens: int = option(512, least=1, help="Tokens of a step.")
    policies: tuple[str, ...] = option(
        "least_loaded",
        names=("--policy", "--policies"),
        parse=words,
        help="That give requests to instances, as of `vkv bench cluster`; with commas.",
    )
    workload: str = option("skewed", help="As of `vkv bench serve`, and skewed: a few long ones.")
    num_requests: int = option(96, least=8, help="Of each run.")
    scale: float = option(0.125, help="Multiplies all lengths.")
    most_tokens: int = option(2048, least=2, help="Of a prompt with its output, which is cut.")
    rate: float = option(32.0, help="Requests a second.")
    pairs: int = option(3, least=1, help="Runs with lending and without, in turns.")
    simulated: int = option(32, least=2, help="Simulated instances; requests and rate grow alike.")
    seeds: tuple[int, ...] = option(
        "0,1,2", parse=whole_numbers, help="Of simulated traces; with commas."
    )
    link: str = option("unix", help="Whose measured costs simulated instances have.")
    record: Path | None = option(
        None, help="A record of this bench, for costs of the simulator that are not measured."
    )
    seed: int = seed_option()
    label: str = label_option()

    def __post_init__(self) -> None:
        for name, given, known in (("parts", self.parts, PARTS), ("links", self.links, LINKS)):
            if unknown := [word for word in given if word not in known]:
                raise InvalidConfig(f"{name} has {unknown[0]!r}; use some of {', '.join(known)}")
        lists = (self.parts, self.counts, self.segments, self.batches, self.links, self.policies)
        if not all((*lists, self.seeds)):
            raise InvalidConfig(
                "parts, instances, segments, batches, links, policies and seeds need one each"
            )
        if self.link not in LINKS or min(self.scale, self.rate) <= 0:
            raise InvalidConfig(
                f"link {self.link!r}, scale {self.scale} and rate {self.rate}: use one of "
                f"{', '.join(LINKS)}, and numbers above 0"
            )
        lacking = [part for part in ("decode", "lending") if part not in self.parts]
        if "simulated" in self.parts and self.record is None and lacking:
            raise InvalidConfig(
                f"the part simulated takes what {lacking[0]} measures: run it too, or give a "
                "record that has it"
            )
        if self.most_tokens > self.pool_tokens:
            raise InvalidConfig(
                f"most_tokens is {self.most_tokens}, and a pool holds {self.pool_tokens}: without "
                "lending none of these could run; use less"
            )
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
