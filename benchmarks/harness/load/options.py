"""What the benches over arriving requests can be told."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...runtime.cli.options import group, option
from ...vmem.errors import InvalidConfig
from ..options import (
    decimals,
    device_option,
    dtype_name_option,
    dtype_option,
    interpreters,
    label_option,
    max_seqs_option,
    seed_option,
    shape_option,
    whole_numbers,
    words,
)

if TYPE_CHECKING:
    import torch

POLICIES = ("splitfuse", "prefill_first")
ORDERS = ("fcfs", "priority", "fair")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a request must keep to count.

    Attributes:
        slo_ttft_ms, slo_tpot_ms: for goodput, as in vLLM; None asks nothing.
        prompt_rate: FastGen's for prompts: one of P tokens is answered within P / prompt_rate s.
        output_rates: FastGen's for outputs: the moving average never falls below so many tokens a
            second.
    """

    slo_ttft_ms: float | None = option(None, help="Goodput: longest time to the first token.")
    slo_tpot_ms: float | None = option(None, help="Goodput: longest mean time of a token after it.")
    prompt_rate: float = option(
        512.0,
        names=("--sla-prompt-rate",),
        help="FastGen: prompt tokens a second until the first token.",
    )
    output_rates: tuple[float, ...] = option(
        "2,4,6",
        names=("--sla-rates",),
        parse=decimals,
        help="FastGen: output tokens a second to keep up, with commas.",
    )


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `vkv bench serve` runs.

    Attributes:
        workloads: names of `workloads.TRAFFIC`, or "fastgen" for all four of its quadrants.
        clients: numbers of clients that wait for their answers, one load each.
        rates: requests a second, one load each; in place of `clients` where there are any.
        budgets: tokens of a step, one run each; none for the device's default.
        servers, peers: with any, the library and these are compared, and no policies.

    Raises InvalidConfig for an empty list, a number that is not positive, and an unknown policy.
    """

    shape: str = shape_option("llama-tiny")
    dtype: "torch.dtype" = dtype_option("float32")
    device: "torch.device" = device_option()
    workloads: tuple[str, ...] = option(
        "fastgen",
        names=("--workload",),
        parse=words,
        help="fastgen (its four quadrants), sharegpt, sharegpt-turns, burstgpt, arxiv, documents, "
        "skewed, powerlaw-256-256 and its like; with commas.",
    )
    num_requests: int = option(32, least=1, help="Requests of each workload.")
    scale: float = option(1.0, help="Multiplies all lengths.")
    clients: tuple[int, ...] = option(
        "8",
        parse=whole_numbers,
        help="Clients that wait for their answers; several with commas.",
    )
    rates: tuple[float, ...] = option(
        "",
        names=("--rate",),
        parse=decimals,
        help="Requests a second, in place of clients; several with commas.",
    )
    cv: float = option(1.0, help="Variation of the times between arrivals: 1 Poisson, else Gamma.")
    policies: tuple[str, ...] = option(
        ",".join(POLICIES), parse=words, help="Schedulers to compare, separated by commas."
    )
    max_seqs: int = max_seqs_option(32)
    budgets: tuple[int, ...] = option(
        "",
        names=("--max-batch-tokens",),
        parse=whole_numbers,
        help="Tokens of a step; several with commas. Default: the device's own.",
    )
    servers: tuple[str, ...] = option(
        (),
        names=("--server",),
        kind=list[str],
        parse=tuple,
        help="URL or NAME=URL of an OpenAI server to drive, beside the library. Repeatable.",
    )
    peers: dict[str, str] = option(
        (),
        names=("--peer",),
        kind=list[str],
        parse=interpreters,
        help="NAME=PYTHON: vkv, vkv-cluster (its server, with one instance) or vllm, whose server "
        "is started and driven over HTTP, and an interpreter that has it; or llama-cpp=PATH of its "
        "llama-server. Repeatable.",
    )
    repeats: int = option(1, least=1, help="Turns of each system, of --server and --peer.")
    targets: Targets = group(Targets)
    label: str = label_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        for name in ("workloads", "clients", "policies"):
            if not getattr(self, name):
                raise InvalidConfig(f"{name} is empty; give one at least")
        lists = (self.clients, self.rates, self.budgets)
        if min(self.num_requests, self.cv, self.scale, *itertools.chain(*lists)) <= 0:
            raise InvalidConfig(
                f"num_requests {self.num_requests}, cv {self.cv}, scale {self.scale}, clients "
                f"{self.clients}, rates {self.rates} and budgets {self.budgets} must all be "
                "positive"
            )
        if unknown := [policy for policy in self.policies if policy not in POLICIES]:
            raise InvalidConfig(f"policy is {unknown[0]!r}; use some of {', '.join(POLICIES)}")


CHANGES = ("random", "markov")
WAYS = ("recompute", "blocks", "whole", "whole-reuse", "beside", "beside-reuse", "vkv")


@dataclass(frozen=True, kw_only=True)
class SwitchOptions:
    """What `vkv bench switch` runs.

    Attributes:
        ways: systems to compare; `switch.WAYS` says what they are.
        changes: how priorities change.
        frequency: changes of all priorities, a step.

    Raises InvalidConfig for an unknown name, and for a number that is not positive.
    """

    shape: str = shape_option("llama-tiny")
    dtype: "torch.dtype" = dtype_option("float32")
    device: "torch.device" = device_option()
    num_conversations: int = option(24, least=1, help="Conversations.")
    mean_turns: float = option(5.5, help="Turns of a conversation, in the mean.")
    rate: float = option(1.0, help="Conversations that begin a second (Poisson).")
    pause_s: float = option(2.0, help="Seconds between an answer and the next turn, in the mean.")
    scale: float = option(0.25, help="Multiplies ShareGPT's lengths.")
    max_len: int = option(2048, least=2, help="Tokens of a conversation at most.")
    kv_memory: str = option("64MiB", help="Memory for keys and values.")
    swap_memory: str = option("4GiB", help="Host memory behind it.")
    changes: tuple[str, ...] = option(
        ",".join(CHANGES), parse=words, help="How priorities change: random, markov; with commas."
    )
    frequency: float = option(0.04, help="Changes of all priorities, a step.")
    ways: tuple[str, ...] = option(
        ",".join(WAYS),
        names=("--systems",),
        parse=words,
        help=f"Systems to compare, of {', '.join(WAYS)}; with commas.",
    )
    max_seqs: int = max_seqs_option(8)
    repeats: int = option(1, least=1, help="Turns of each system.")
    label: str = label_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        for name, known in (("changes", CHANGES), ("ways", WAYS)):
            chosen = getattr(self, name)
            unknown = [value for value in chosen if value not in known]
            if unknown or not chosen:
                raise InvalidConfig(f"{name} are {chosen!r}; use some of {', '.join(known)}")
        if min(self.mean_turns - 1, self.rate, self.pause_s, self.scale, self.frequency) <= 0:
            raise InvalidConfig(
                f"mean_turns {self.mean_turns} must be more than 1, and rate {self.rate}, pause_s "
                f"{self.pause_s}, scale {self.scale} and frequency {self.frequency} positive"
            )


@dataclass(frozen=True, kw_only=True)
class TenantsOptions:
    """What `vkv bench tenants` runs.

    Attributes:
        num_requests, rate: of the light tenant; the heavy one has `times` as many, as often.

    Raises InvalidConfig for a number that is not positive.
    """

    shape: str = shape_option("llama-tiny")
    dtype: "torch.dtype" = dtype_option("float32")
    device: "torch.device" = device_option()
    workload: str = option("sharegpt", help="sharegpt, burstgpt or arxiv.")
    num_requests: int = option(20, least=1, help="Requests of the light tenant.")
    rate: float = option(0.2, help="Requests a second of the light tenant (Poisson).")
    times: int = option(10, least=1, help="How many times as many the heavy tenant has.")
    scale: float = option(0.1, help="Multiplies all lengths.")
    max_seqs: int = max_seqs_option(8)
    max_batch_tokens: int | None = option(
        None,
        least=1,
        help="Tokens of a step: who comes waits for the step under way. Default: the device's.",
    )
    label: str = label_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        if min(self.rate, self.scale) <= 0:
            raise InvalidConfig(f"rate {self.rate} and scale {self.scale} must be positive")


@dataclass(frozen=True, kw_only=True)
class ChainsOptions:
    """What `vkv bench chains` runs.

    Attributes:
        layers: of each fine-tune, that differ from the base's; its head differs, too.

    Raises InvalidConfig for a number that is not positive.
    """

    shape: str = shape_option("llama-455m")
    dtype: str = dtype_name_option("bfloat16")
    tenants: int = option(4, least=1, help="Fine-tunes beside the base.")
    layers: int = option(4, least=0, help="Layers of each that are its own; its head is, too.")
    requests: int = option(30, least=1, help="Of all models together, in turn.")
    rate: float = option(0.6, help="Requests a second of all together (Poisson).")
    prompt_len: int = option(64, least=1, help="Tokens of each prompt.")
    output_len: int = option(32, least=1, help="Tokens that each generates.")
    repeats: int = option(2, least=1, help="Turns of all ways.")
    label: str = label_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise InvalidConfig(f"rate is {self.rate}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class TiersOptions:
    """What `vkv bench tiers` runs.

    Attributes:
        parts: what is measured: "steps" beside the worker, requests with a "shared" beginning.
        batch, context, num_steps: of the decode steps.
        prefix, suffix, output: tokens that requests share, have alone, and are answered with.
    """

    shape: str = shape_option("llama-tiny")
    dtype: "torch.dtype" = dtype_option("float32")
    device: "torch.device" = device_option()
    parts: tuple[str, ...] = option(
        "steps,shared", parse=words, help="What to measure: steps, shared; with commas."
    )
    batch: int = option(8, least=1, help="Requests that decode beside the worker.")
    context: int = option(512, least=1, help="Tokens of each of them.")
    num_steps: int = option(160, least=8, help="Decode steps that are timed, of each kind.")
    num_requests: int = option(50, least=1, help="Requests that share a beginning.")
    prefix: int = option(10_000, least=1, help="Tokens that they share.")
    suffix: int = option(64, least=1, help="Tokens of a prompt after those.")
    output: int = option(32, least=1, help="Tokens of an answer.")
    swap_memory: str = option("2GiB", help="Host memory behind the cache.")
    repeats: int = option(1, least=1, help="Turns of each.")
    label: str = label_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in ("steps", "shared")]
        if unknown or not self.parts:
            raise InvalidConfig(f"parts are {self.parts!r}; use some of steps, shared")


@dataclass(frozen=True, kw_only=True)
class MigrateOptions:
    """What `vkv bench migrate` runs.

    Attributes:
        contexts: tokens of the prompts.
        moves: of each stream.
    """

    shape: str = shape_option("llama-tiny")
    dtype: "torch.dtype" = dtype_option("float32")
    contexts: tuple[int, ...] = option(
        "256,1024,4096,8192", parse=whole_numbers, help="Tokens of the prompts; with commas."
    )
    moves: int = option(6, least=1, help="Times that each stream moves.")
    label: str = label_option()
    seed: int = seed_option()


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """What `vkv bench schedule` runs.

    Attributes:
        queued: lengths of the line, one load each.
        scheduling_policy: as of `EngineConfig`.

    Raises InvalidConfig for a line of no request, and an unknown policy.
    """

    queued: tuple[int, ...] = option(
        "100,1000,10000,100000",
        parse=whole_numbers,
        help="Requests that wait in line; several with commas.",
    )
    num_finished: int = option(1000, least=1, help="Requests that run to their end, of each line.")
    max_seqs: int = max_seqs_option(32)
    scheduling_policy: str = option(
        "fcfs", help="fcfs; or priority or fair, with a thousand priorities and tenants."
    )
    repeats: int = option(5, least=1, help="Turns of each line.")

    def __post_init__(self) -> None:
        if not self.queued or min(self.queued) < 1:
            raise InvalidConfig(f"queued is {self.queued}; give lines of one request at least")
        if self.scheduling_policy not in ORDERS:
            raise InvalidConfig(
                f"scheduling_policy is {self.scheduling_policy!r}; use one of {', '.join(ORDERS)}"
            )
