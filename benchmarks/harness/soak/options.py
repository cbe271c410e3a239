"""What `vkv soak` can be told."""

from dataclasses import dataclass
from pathlib import Path

from ...runtime.cli.options import option
from ...vmem.errors import InvalidConfig
from ..options import words

PARTS = (
    "mixed",
    "apart",
    "adapters",
    "structured",
    "speculation",
    "swaps",
    "conversations",
    "sessions",
    "lending",
    "cancels",
    "moves",
    "pauses",
    "kills",
    "scaling",
    "limits",
)


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """What `vkv soak` runs.

    Attributes:
        without: parts that are left out.
    """

    minutes: float = option(2.0, help="How long, the starting of instances included.")
    instances: int = option(4, least=2, help="Engines of a cluster, each in a process of its own.")
    clients: int = option(8, least=1, help="Clients that ask one request after another.")
    seed: int = option(0, help="Of weights, requests and faults: the same plan for the same seed.")
    without: tuple[str, ...] = option(
        "", parse=words, help=f"Parts to leave out, with commas: {', '.join(PARTS)}."
    )
    out: Path | None = option(None, help="Folder for a record and its tables. Default: none.")

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise InvalidConfig(f"minutes is {self.minutes}; use a positive number")
        for name in self.without:
            if name not in PARTS:
                raise InvalidConfig(f"without has {name!r}; use some of {', '.join(PARTS)}")
        if not (self.has("mixed") or self.has("apart")):
            raise InvalidConfig("without has both mixed and apart, so that no cluster is left")

    def has(self, part: str) -> bool:
        """Whether a part runs."""
        return part not in self.without
