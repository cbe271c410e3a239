"""A trace on real instances: what becomes of each request, and what the steps of instances took."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import numpy as np

from ...runtime.cluster.cluster import Cluster
from ...runtime.cluster.policies import ClusterPolicy, LeastLoaded, Move
from ...runtime.cluster.simulator.costs import StepWork, pairs
from ...runtime.cluster.simulator.fitting import StepRecord
from ...runtime.cluster.simulator.trace import Report, Served, TraceRequest
from ...runtime.cluster.snapshot import ClusterSnapshot, Newcomer, Role
from ...runtime.engine.messages import Message
from ...runtime.request.sampling_params import SamplingParams
from ...runtime.request.spec import RequestSpec
from ...runtime.request.step_output import StepOutput
from ...vmem.errors import InvalidOperation, VkvError

_HEAD_S = 0.2  # from when a run begins to its time 0
_STUCK_S = 120.0  # without a token, after which a run is given up
_PULSES_S = 0.6  # for instances to say what they have done
_SAME_STEP_S = 5e-4  # between two tokens of a step; a step takes longer


class Exchange:
    """A policy that may be exchanged between two runs, so that one cluster serves all of them.

    Attributes:
        policy: that is asked.
        first: by request, the instance that it was given to.
    """

    name = "exchange"

    def __init__(self) -> None:
        self.policy: ClusterPolicy = LeastLoaded()
        self.first: dict[str, int] = {}

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        """As of `ClusterPolicy`."""
        chosen = self.policy.dispatch(snapshot, newcomer)
        if chosen is not None:
            self.first[newcomer.key[0]] = chosen
        return chosen

    def migrations(self, snapshot: ClusterSnapshot) -> list[Move]:
        """As of `ClusterPolicy`."""
        return self.policy.migrations(snapshot)

    def scale(self, snapshot: ClusterSnapshot) -> int:
        """As of `ClusterPolicy`."""
        return self.policy.scale(snapshot)

    def roles(self, snapshot: ClusterSnapshot) -> Mapping[int, Role]:
        """As of `ClusterPolicy`."""
        return self.policy.roles(snapshot)


@dataclass(eq=False)
class Client:
    """One that waits for an answer: a `Sink`.

    Attributes:
        seen_s, made_s: when each token was here, and when its step was over, on the system's
            monotonic clock.
    """

    spec: RequestSpec
    seen_s: list[float] = field(default_factory=list)
    made_s: list[float] = field(default_factory=list)
    failure: str = ""
    is_finished: bool = False

    def accept(self, output: StepOutput) -> Sequence[Message]:
        """As of `Sink`."""
        count = len(output.token_ids)
        self.seen_s += [time.monotonic()] * count
        self.made_s += [output.time_s] * count
        if output.failure is not None:
            self.failure = str(output.failure.error())
        self.is_finished = output.finish_reason is not None
        return ()

    def fail(self, error: VkvError) -> None:
        """As of `Sink`."""
        self.failure, self.is_finished = str(error), True


@dataclass(frozen=True)
class Run:
    """A run that is over.

    Attributes:
        report: as of the simulator, without what only that knows.
        clients, first: the requests, and the instance that each was given to.
    """

    report: Report
    clients: list[Client]
    first: Mapping[str, int]


def serve(
    cluster: Cluster,
    exchange: Exchange,
    policy: ClusterPolicy,
    trace: Sequence[TraceRequest],
    *,
    vocab_size: int,
    seed: int,
    tells_priority: bool = True,
) -> Run:
    """Serve a trace in real time, greedily, each answer to its full length.

    Prompts are random: no two runs have the same where `seed` differs, so that none finds what
    another left. Raises InvalidOperation if for minutes no token comes.
    """
    exchange.policy, exchange.first = policy, {}
    tokens = np.random.default_rng(seed)
    before = _counters(cluster)
    start_s = time.monotonic() + _HEAD_S
    clients: list[Client] = []
    for number, request in enumerate(trace):
        prompt = tokens.integers(0, vocab_size, request.prompt_tokens).tolist()
        due_s = start_s + request.arrival_s
        told = request if tells_priority else msgspec.structs.replace(request, priority=0)
        client = Client(_spec(f"{seed}-{number}", told, prompt, due_s))
        clients.append(client)
        time.sleep(max(0.0, due_s - time.monotonic()))
        cluster.router.submit([client])
    _wait(clients)
    time.sleep(_PULSES_S)
    after = _counters(cluster)
    served = [_served(one, client, start_s) for one, client in zip(trace, clients, strict=True)]
    duration_s = max(one.last_s for one in served)
    count = len(cluster.stats().instances)
    report = Report(
        served=served,
        duration_s=duration_s,
        num_steps=after[3] - before[3],
        num_scheduled=after[3] - before[3],
        num_preemptions=after[0] - before[0],
        num_moves=after[1] - before[1],
        num_refused=after[2] - before[2],
        bytes_moved=after[4] - before[4],
        num_held_back=0,
        instance_s=count * duration_s,
        most_instances=count,
        busy={},
        most_used={},
    )
    return Run(report, clients, exchange.first)


def _spec(name: str, request: TraceRequest, prompt: list[int], due_s: float) -> RequestSpec:
    params = SamplingParams(
        temperature=0, max_tokens=request.output_tokens, ignore_eos=True, detokenize=False
    )
    return RequestSpec(
        request_id=name,
        prompt_token_ids=prompt,
        params=params,
        priority=request.priority,
        arrival_time_s=due_s,
    )


def _wait(clients: Sequence[Client]) -> None:
    """Until all have ended."""
    num_tokens, came_s = -1, time.monotonic()
    while num_left := sum(not client.is_finished for client in clients):
        now = sum(len(client.seen_s) for client in clients)
        if now != num_tokens:
            num_tokens, came_s = now, time.monotonic()
        elif time.monotonic() - came_s > _STUCK_S:
            raise InvalidOperation(
                f"for {_STUCK_S:g} s no token came, and {num_left} requests are "
                "unfinished; is the machine busy, or kv_memory too small for the longest?"
            )
        time.sleep(0.05)


def _counters(cluster: Cluster) -> tuple[int, int, int, int, int]:
    """Preemptions, moves, moves that came to nothing, steps and copied bytes, so far."""
    stats = cluster.stats()
    engines = [member.stats for member in stats.instances if member.stats is not None]
    return (
        sum(engine.num_preemptions for engine in engines),
        stats.num_migrations,
        stats.num_stayed,
        sum(engine.num_steps for engine in engines),
        sum(member.carried_bytes for member in stats.instances),
    )


def _served(request: TraceRequest, client: Client, start_s: float) -> Served:
    times = [at - start_s for at in client.seen_s]
    is_whole = not client.failure and len(times) == request.output_tokens
    return Served(
        request=request,
        arrived_s=request.arrival_s,
        first_s=times[0] if times else 0.0,
        last_s=times[-1] if times else 0.0,
        num_tokens=len(times),
        longest_gap_s=max((b - a for a, b in pairwise(times)), default=0.0),
        failure="" if is_whole else client.failure or "it ended early",
    )


# -- what steps took -----------------------------------------------------------------------------


def observed_steps(run: Run, budget: int) -> tuple[list[StepRecord], list[float]]:
    """The steps of all instances, from when tokens were made; and of each how many instances
    computed during it in the mean, its own included.

    True of runs in which no request moved or lost its slot. A prompt is taken to be computed in the
    step that brought its first token; steps whose prompts have more than `budget` tokens, of which
    some must have been computed before, are left out.
    """
    every: list[list[tuple[float, StepRecord]]] = []
    for instance in sorted(set(run.first.values())):
        clients = [c for c in run.clients if run.first[c.spec.request_id] == instance]
        every.append(_steps_of(clients))
    steps: list[StepRecord] = []
    beside: list[float] = []
    for place, timed in enumerate(every):
        others = [_Busy(other) for number, other in enumerate(every) if number != place]
        for start_s, step in timed:
            if step.work.prompt_tokens <= budget:
                steps.append(step)
                end_s = start_s + step.time_s
                beside.append(1 + sum(one.share(start_s, end_s) for one in others))
    return steps, beside


class _Busy:
    """When an instance computed."""

    def __init__(self, timed: Sequence[tuple[float, StepRecord]]) -> None:
        self._edges = [edge for start_s, step in timed for edge in (start_s, start_s + step.time_s)]
        self._sums = np.cumsum([0.0, *(n % 2 * s for n, s in enumerate(np.diff(self._edges), 1))])

    def share(self, start_s: float, end_s: float) -> float:
        """Of a time, that it computed."""
        if not self._edges:
            return 0.0
        before, after = np.interp((start_s, end_s), self._edges, self._sums)
        return float((after - before) / (end_s - start_s))


def _steps_of(clients: Sequence[Client]) -> list[tuple[float, StepRecord]]:
    """Those of one instance, each with its beginning."""
    made = [(at, place, one) for one in clients for place, at in enumerate(one.made_s)]
    made.sort(key=lambda token: token[0])
    groups: list[list[tuple[float, int, Client]]] = []
    for token in made:
        if not groups or token[0] - groups[-1][-1][0] > _SAME_STEP_S:
            groups.append([])
        groups[-1].append(token)
    found: list[tuple[float, StepRecord]] = []
    before_s = 0.0
    for group in groups:
        end_s = group[-1][0]
        prompts = [len(c.spec.prompt_token_ids) for _, place, c in group if not place]
        contexts = [len(c.spec.prompt_token_ids) + place for _, place, c in group if place]
        came = [c.spec.arrival_time_s for _, place, c in group if not place]
        start_s = before_s if contexts else max(before_s, min(came))
        work = StepWork(
            sum(prompts), sum(pairs(0, n) for n in prompts), len(contexts), sum(contexts)
        )
        if before_s and end_s > start_s:
            found.append((start_s, StepRecord(work, end_s - start_s)))
        before_s = end_s
    return found
