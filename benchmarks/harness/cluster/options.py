"""What `vkv simulate`, `vkv place` and `vkv bench cluster` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.cli.options import group, option
from ...vmem.errors import InvalidConfig
from ..options import (
    decimals,
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

POLICIES = ("round_robin", "least_loaded", "least_time", "llumnix", "disaggregated")
ROLES = ("prefill", "decode", "both")
DEFAULT_TABLE = "opt-13b-a100-distserve"


def table_option() -> Any:
    return option(
        DEFAULT_TABLE, help="What steps take: a table that comes with vkv, or a file of that form."
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests, and when they come.

    Attributes:
        most_tokens: of a prompt with its output, which is cut; None for no limit.
    """

    workload: str = option("sharegpt", help="As of `vkv bench serve`.")
    num_requests: int = option(1000, least=1, help="How many.")
    cv: float = option(1.0, help="Variation of the times between arrivals: 1 Poisson, else Gamma.")
    scale: float = option(1.0, help="Multiplies all lengths.")
    most_tokens: int | None = option(
        None, least=2, help="Of a prompt with its output, which is cut to that."
    )
    swing: float = option(0.0, help="Of its mean, by which the rate rises and falls like a sine.")
    period_s: float = option(600.0, help="Of that sine.")
    urgent: float = option(0.0, help="Share of the requests that are urgent.")
    seed: int = seed_option()

    def __post_init__(self) -> None:
        if min(self.cv, self.scale) <= 0:
            raise InvalidConfig(f"cv {self.cv} and scale {self.scale} must be positive")
        if not 0 <= self.swing <= 1 or self.period_s <= 0:
            raise InvalidConfig(
                f"swing {self.swing} and period_s {self.period_s}: use a share from 0 to 1, and a "
                "time"
            )
        if not 0 <= self.urgent <= 1:
            raise InvalidConfig(f"urgent is {self.urgent}; use a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What `vkv simulate` runs.

    Attributes:
        record: of `vkv bench serve`: its steps are what costs are fitted to, and its runs what is
            simulated, beside what was measured.
        steps: measured steps, one a line, to fit costs to in place of the table's.
        roles: of the instances; in place of `instances` if there are any.
        policies: compared, on the same requests.
    """

    load: Load = group(Load)
    rates: tuple[float, ...] = option(
        "2",
        names=("--rate",),
        parse=decimals,
        help="Requests a second, of all instances together; several with commas.",
    )
    seeds: tuple[int, ...] = option(
        "", parse=whole_numbers, help="In place of --seed: several with commas, of which medians."
    )
    record: Path | None = option(
        None, help="A record of `vkv bench serve` to simulate again, with costs fitted to it."
    )
    table: str = table_option()
    steps: Path | None = option(None, help="A file of measured steps, to fit costs to.")
    tensor: int = option(1, least=1, help="Devices of a stage, of the table's.")
    pipeline: int = option(1, least=1, help="Stages of an instance.")
    instances: int = option(4, least=1, help="Instances that do all.")
    roles: tuple[str, ...] = option(
        "", parse=words, help="In place of that: prefill, decode, both; one each, with commas."
    )
    policies: tuple[str, ...] = option(
        "round_robin,llumnix",
        names=("--policy", "--policies"),
        parse=words,
        help=f"Policies to compare, of {', '.join(POLICIES)}; with commas. What is other about one "
        "follows its name: llumnix:source_below=60:moves=2.",
    )
    capacity_tokens: int | None = option(
        None, least=16, help="Tokens of keys and values of an instance. Default: the table's."
    )
    max_seqs: int = max_seqs_option(256)
    max_batch_tokens: int = option(2048, least=1, help="Tokens of a step.")
    step_policy: str = option("splitfuse", help="splitfuse or prefill_first.")
    scheduling_policy: str = option("fcfs", help="fcfs, priority or fair.")
    link_gbit: float = option(200.0, help="Gbit/s between instances; 0: pages change hands.")
    link_latency_ms: float = option(1.0, help="Of a handshake between instances.")
    report_ms: float = option(0.0, help="How old what is known of an instance may be.")
    round_ms: float = option(500.0, least=1, help="Between two rounds of moves, at most.")
    lending: bool = option(
        False, help="Each policy once more with instances that lend each other memory."
    )
    loan_record: Path | None = option(
        None,
        help="A record of `vkv bench long`: what asking creditors takes. Default: a round trip a "
        "layer, and the link's rate.",
    )
    loan_latency_us: float = option(20.0, help="Of that round trip.")
    most_instances: int | None = option(
        None, least=1, help="Scale between --instances and so many; with llumnix."
    )
    scale_below: float = option(400.0, help="More below so many free steps.")
    scale_above: float = option(1200.0, help="Fewer above so many.")
    startup_s: float = option(30.0, help="Until an instance that is added takes requests.")
    slo_ttft_ms: float = option(1000.0, help="Goodput: longest time to the first token.")
    slo_tpot_ms: float = option(100.0, help="Goodput: longest mean time of a token after it.")
    out: Path | None = option(None, help="A folder for a record, a table and a plot.")
    label: str = label_option()

    def __post_init__(self) -> None:
        if unknown := [role for role in self.roles if role not in ROLES]:
            raise InvalidConfig(f"roles has {unknown[0]!r}; use some of {', '.join(ROLES)}")
        if not self.policies:
            raise InvalidConfig(f"policies is empty; use some of {', '.join(POLICIES)}")
        _check_policies(self.policies, self.roles)
        if not self.rates or min(self.rates) <= 0:
            raise InvalidConfig(f"rates are {self.rates}; give one at least, and none that is 0")
        least = min(self.link_gbit, self.link_latency_ms, self.report_ms, self.loan_latency_us)
        if least < 0:
            raise InvalidConfig(
                f"link_gbit {self.link_gbit}, link_latency_ms {self.link_latency_ms}, report_ms "
                f"{self.report_ms} and loan_latency_us {self.loan_latency_us} must be 0 or more"
            )


def _check_policies(texts: tuple[str, ...], roles: tuple[str, ...] = ()) -> None:
    """Raise InvalidConfig for what is no policy, or one that knows nothing of roles."""
    from .contenders import contender  # here, as the list of commands needs no policies

    is_apart = any(role != "both" for role in roles)
    for text in texts:
        if contender(text).name != "disaggregated" and is_apart:
            raise InvalidConfig(
                f"policy is {text!r}, which moves no computed prompt to those that are to decode, "
                f"and roles are {','.join(roles)}; use disaggregated, or leave the roles out"
            )


def _promises(listed: str) -> tuple[tuple[float, float], ...]:
    """Pairs of milliseconds, to a first token and for each after it."""
    try:
        found = [item.split(":") for item in words(listed)]
        return tuple((float(first), float(each)) for first, each in found)
    except ValueError as error:
        raise ValueError("give TTFT:TPOT in milliseconds, such as 500:50,1000:100") from error


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """What `vkv bench cluster` runs.

    Attributes:
        roles: with any, the same number of instances that do all is compared with these, at rising
            rates; and no policies.
        loads: workloads and the requests a second of each.
        calibrating: requests that the costs of the simulator are fitted to; 0 for no simulator.
        promises: in milliseconds, to a first token and for each after it.
    """

    shape: str = shape_option("llama-28m")
    dtype: "torch.dtype" = dtype_option("float32")
    instances: int = option(4, least=1, help="How many; each a process.")
    threads: int = option(1, least=1, help="Of each instance.")
    policies: tuple[str, ...] = option(
        "round_robin,least_loaded,llumnix",
        names=("--policy", "--policies"),
        parse=words,
        help=f"Policies to compare, of {', '.join(POLICIES)}; with commas. What is other about one "
        "follows its name: llumnix:source_below=60:moves=2.",
    )
    roles: tuple[str, ...] = option(
        "", parse=words, help="In place of policies: prefill, decode, both; one each, with commas."
    )
    loads: tuple[str, ...] = option(
        "powerlaw-256-256@16",
        names=("--workload",),
        parse=words,
        help="Workloads and their requests a second, NAME@RATE; several with commas.",
    )
    num_requests: int = option(300, least=8, help="Of each run.")
    scale: float = option(0.125, help="Multiplies all lengths.")
    most_tokens: int = option(960, least=2, help="Of a prompt with its output, which is cut.")
    cv: float = option(1.0, help="Variation of the times between arrivals: 1 Poisson, else Gamma.")
    urgent: float = option(0.0, help="Share of the requests that are urgent.")
    seeds: tuple[int, ...] = option("0", parse=whole_numbers, help="Traces, one each; with commas.")
    kv_memory: str = option("16MiB", help="For keys and values, of each instance.")
    max_seqs: int = max_seqs_option(32)
    max_batch_tokens: int = option(1024, least=1, help="Tokens of a step.")
    calibrating: int = option(120, least=0, help="Requests to fit the simulator's costs to.")
    promises: tuple[tuple[float, float], ...] = option(
        "500:50,1000:100,2000:200",
        names=("--slo",),
        parse=_promises,
        help="Milliseconds to a first token, and for each after it: TTFT:TPOT, with commas.",
    )
    label: str = label_option()

    def __post_init__(self) -> None:
        if unknown := [role for role in self.roles if role not in ROLES]:
            raise InvalidConfig(f"roles has {unknown[0]!r}; use some of {', '.join(ROLES)}")
        if not (self.loads and self.seeds and self.promises and (self.policies or self.roles)):
            raise InvalidConfig("workload, seeds, slo and policies need one entry at least")
        _check_policies(self.policies)


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """What `vkv place` searches.

    Attributes:
        machine: a description of the machines in TOML; what else is given goes before it.
        is_joint: whether the same requests must keep both promises.
    """

    load: Load = group(Load)
    table: str = table_option()
    machine: Path | None = option(None, help="A description of the machines, in TOML.")
    nodes: int | None = option(None, least=1, help="Nodes. Default: 1.")
    gpus_per_node: int | None = option(None, least=1, help="Devices of a node. Default: 4.")
    affinity: str | None = option(
        None, help="high: KV may cross the network; low: it stays within a node. Default: high."
    )
    slo_ttft_ms: float = option(200.0, help="Longest time to the first token.")
    slo_tpot_ms: float = option(100.0, help="Longest mean time of a token after it.")
    share: float = option(0.9, help="Of requests that must be served so.")
    is_joint: bool = option(
        True,
        names=("--joint/--each",),
        help="Both promises to the same requests, or each to so many.",
    )
    most_rate: float = option(5.0, help="Requests a second and device, at most.")
    tolerance: float = option(0.25, help="Of a rate, at which bisecting ends.")
    most_instances: int = option(1, least=1, help="Instances of each role, in a unit.")
    kinds: str = option("both", help="apart, together or both: prompts and decodes.")
    prompt_tokens: int = option(2048, least=1, help="Of a step that computes prompts alone.")
    mixed_tokens: int = option(512, least=1, help="Of a step of an instance that does both.")
    top: int = option(8, least=1, help="Placements to show.")
    plot: Path | None = option(None, help="A file for a plot of all of them.")

    def __post_init__(self) -> None:
        for name, known in (
            ("kinds", ("apart", "together", "both")),
            ("affinity", (None, "high", "low")),
        ):
            if getattr(self, name) not in known:
                allowed = ", ".join(word for word in known if word)
                raise InvalidConfig(f"{name} is {getattr(self, name)!r}; use one of {allowed}")
