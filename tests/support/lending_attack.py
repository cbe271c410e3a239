"""Requests longer than a pool on a cluster, and what happens to those that lend and borrow.

What comes of every request is compared with what one engine with a large pool says; what instances
hold, once nothing runs, with nothing.
"""

import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import left_over
import zoo
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.runtime.cluster.cluster import Cluster
from vkv.runtime.cluster.policies.simple import RoundRobin
from vkv.runtime.cluster.snapshot import ClusterSnapshot, Newcomer
from vkv.runtime.cluster.stats import ClusterStats, Member
from vkv.runtime.engine.memory.memory_map import MemoryMap
from vkv.runtime.engine.stats import Lent
from vkv.vmem.errors import EngineDied, OutOfPages, VkvError

PAGE_BYTES = 8192  # 32 tokens of the tiny llama
POOL = 65 * PAGE_BYTES  # 2,080 tokens: a long request has 1,024 of them at home
MAX_LEN = 9000
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_seqs": 8,
    "max_len": MAX_LEN,
    "page_bytes": PAGE_BYTES,
}
_LIVENESS_S = 6.0
_SAFE_TOKENS = 1024  # that each lends, whatever short requests it has
_LOCAL_TOKENS = 1024
_MOST_OPEN = 12  # descriptors beyond the first count and what each neighbour takes
_ENDS_S = 90.0
_CALL_BACK_S = 1.0  # within which a lender has its memory again; milliseconds, really

FAULTS = (
    *("kill creditor", "kill debtor", "kill both"),
    *("stop creditor", "stop debtor"),
    *("pause creditor", "pause debtor"),
    *("leave creditor", "leave debtor", "recall"),
)


def save_model(folder: Path) -> PreTrainedModel:
    """A model as tiny as possible, saved with its tokenizer."""
    model = zoo.tiny_model(
        "llama", eos_token_id=zoo.VOCAB_SIZE - 1, max_position_embeddings=MAX_LEN
    )
    model.save_pretrained(folder)
    zoo.letter_tokenizer().save_pretrained(folder)
    return model


@dataclass(frozen=True)
class Item:
    """A request, and the tokens that one engine with a large pool gives it."""

    prompt: list[int]
    params: SamplingParams
    right: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.right)

    @property
    def is_long(self) -> bool:
        return self.num_tokens * PAGE_BYTES > POOL * 32


@dataclass(frozen=True)
class Pool:
    """What is asked: longer than a pool, shorter, and as much as fills a lender."""

    long: Sequence[Item]
    short: Sequence[Item]
    filling: Sequence[Item]


def items(llm: LLM) -> Pool:
    """Greedy and seeded ones; `llm` has room for all."""
    lengths = [2130, 2300, 2450, 2500, 2650, 2760, 2800, 1900]
    counts = [160, 240, 90, 300, 120, 60, 200, 500]
    short = [3, 40, 90, 150, 200, 33, 64, 120]
    filling = [1860, 1900, 1930]
    every = [*lengths, *short, *filling]
    prompts = zoo.random_prompts(every, seed=11)
    params = [
        SamplingParams(
            temperature=0.8 if place % 3 == 1 else 0,
            seed=place,
            max_tokens=count,
            ignore_eos=True,
        )
        for place, count in enumerate([*counts, *[150, 60] * 4, 8, 8, 8])
    ]
    outputs = llm.generate(prompts, params)
    made = [
        Item(prompt, some, tuple(output.outputs[0].token_ids))
        for prompt, some, output in zip(prompts, params, outputs, strict=True)
    ]
    first, second = len(lengths), len(lengths) + len(short)
    return Pool(made[:first], made[first:second], made[second:])


class Directed(RoundRobin):
    """Whoever has so many tokens goes to the instance that `goals` names; others in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.goals: dict[int, int] = {}

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        goal = self.goals.get(newcomer.num_tokens)
        able = {instance.id for instance in snapshot.instances if instance.is_for_prompts}
        return goal if goal in able else super().dispatch(snapshot, newcomer)


class Stream:
    """One request's tokens as they come, on a thread of its own."""

    def __init__(self, cluster: Cluster, item: Item) -> None:
        self.item = item
        self.tokens: list[int] = []
        self.came_s: list[float] = []  # tokens, and then the end
        self.error: VkvError | None = None
        self.begun_s = time.monotonic()
        self._cluster = cluster
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for delta in self._cluster.stream(
                {"prompt_token_ids": self.item.prompt}, self.item.params
            ):
                self.tokens += delta.token_ids
                self.came_s += [time.monotonic()] * len(delta.token_ids)
        except VkvError as error:
            self.error = error
        self.came_s.append(time.monotonic())

    def ends(self, within_s: float) -> bool:
        """Wait for its end."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def longest_wait_s(self, since_s: float) -> float:
        """Of those that end after some moment, from then on; 0 of one that had ended before."""
        moments = [self.begun_s, *self.came_s]
        return max(
            (
                after - max(before, since_s)
                for before, after in itertools.pairwise(moments)
                if after > since_s
            ),
            default=0.0,
        )

    @property
    def first_s(self) -> float:
        """Until the first token."""
        return self.came_s[0] - self.begun_s


@dataclass
class Run:
    """What happened in one run.

    Attributes:
        fault: one of `FAULTS`.
        moment: "loans" if the victim lent or borrowed when it was struck, else "none".
        waits_s: how long the streams that were open stood still, at most.
        num_called_back: loans that lenders ended for want of memory.
        errors: that requests ended with.
    """

    fault: str
    moment: str = ""
    waits_s: float = 0.0
    num_called_back: int = 0
    errors: list[str] = field(default_factory=list)


class LendingAttack:
    """A cluster whose instances lend each other memory, and whoever hits them.

    Attributes:
        runs: that are over.
        wrong: what must not be.
        first_s: time to the first token of what fills a pool, where memory is free and where it is
            lent.
        slowest_call_back_s: in an engine, so far.
        held: descriptors and threads of each process, run by run.
    """

    def __init__(
        self, cluster: Cluster, policy: Directed, pool: Pool, *, size: int, seed: int
    ) -> None:
        self.cluster = cluster
        self.pool = pool
        self.size = size
        self.draw = random.Random(seed)
        self.runs: list[Run] = []
        self.wrong: list[str] = []
        self.first_s: dict[str, list[float]] = {"free": [], "lent": []}
        self.slowest_call_back_s = 0.0
        self.held: dict[int, list[tuple[int, int]]] = {}
        self.num_dead = 0
        self._policy = policy
        self._num_called_back: dict[int, int] = {}

    # -- a run -----------------------------------------------------------------------------------

    def run(self, fault: str) -> Run:
        """Long requests and their neighbours, and one fault at a random moment."""
        run = Run(fault)
        if len(self._working()) < (5 if fault == "kill both" else 4):  # one long request fits then
            self.cluster.scale(self.size)
        streams = self._begin(fault)
        time.sleep(self.draw.uniform(0.0, 1.2))
        victims = self._victims(run)
        struck_s = time.monotonic()
        if fault == "recall":
            streams += self._recall(victims)
        else:
            self._strike(run, victims)
        self._end(run, streams, struck_s)
        self._bury(run, victims)
        self._check(run)
        self.runs.append(run)
        return run

    def _begin(self, fault: str) -> list[Stream]:
        long = self.draw.sample(
            self.pool.long, 1 if fault == "recall" else self.draw.choice([1, 1, 2])
        )
        if sum(map(_num_elsewhere, long)) > _SAFE_TOKENS * (len(self._working()) - 2):
            long = long[:1]
        short = self.draw.sample(self.pool.short, self.draw.randint(1, 4))
        asked = [*long, *short]
        self.draw.shuffle(asked)
        return [Stream(self.cluster, item) for item in asked]

    def _victims(self, run: Run) -> list[Member]:
        """Whom the fault is for: of those that lend or borrow, if anybody does."""
        for _ in range(20):
            stats = self.cluster.stats()
            by_id = {m.id: m for m in stats.instances if m.face is not None}
            pairs = [pair for pair in _loans(stats) if set(pair) <= set(by_id)]
            if pairs or run.fault != "recall":
                break
            time.sleep(0.05)
        run.moment = "loans" if pairs else "none"
        everyone = sorted(by_id)
        debtor, creditor = self.draw.choice(pairs) if pairs else self.draw.sample(everyone, 2)
        which = {"creditor": [creditor], "debtor": [debtor], "both": [creditor, debtor]}
        return [by_id[one] for one in which.get(run.fault.split()[-1], [creditor])]

    def _strike(self, run: Run, victims: Sequence[Member]) -> None:
        how = run.fault.split()[0]
        if how == "leave":
            os.kill(victims[0].pid, signal.SIGTERM)
            return
        kind = signal.SIGKILL if how == "kill" else signal.SIGSTOP
        for victim in victims:
            os.kill(victim.pid, kind)
        if how == "pause":  # shorter than silence counts, or longer
            time.sleep(self.draw.choice([0.1, 0.5, 1.0, 3.0]))
            for victim in victims:
                os.kill(victim.pid, signal.SIGCONT)

    def _recall(self, victims: Sequence[Member]) -> list[Stream]:
        """A lender gets a request of its own that needs most of its pool."""
        item = self.draw.choice(self.pool.filling)
        self._policy.goals[len(item.prompt)] = victims[0].id
        return [Stream(self.cluster, item)]

    def _end(self, run: Run, streams: Sequence[Stream], struck_s: float) -> None:
        deadline = time.monotonic() + _ENDS_S
        for stream in streams:
            if not stream.ends(max(0.0, deadline - time.monotonic())):
                self.wrong.append(f"{run}: {len(stream.tokens)} tokens, and it never ends")
                return
            item, error = stream.item, stream.error
            if stream.tokens != list(item.right)[: len(stream.tokens)]:
                self.wrong.append(f"{run}: wrong tokens of {len(item.prompt)} prompt tokens")
            if error is not None:
                run.errors.append(f"{type(error).__name__}: {error}")
                if not (isinstance(error, OutOfPages) and self._cannot_hold(streams)):
                    self.wrong.append(f"{run}: {len(item.prompt)} prompt tokens end with {error!r}")
            elif len(stream.tokens) != len(item.right):
                self.wrong.append(f"{run}: {len(stream.tokens)} tokens of {len(item.right)}")
        run.waits_s = max(stream.longest_wait_s(struck_s) for stream in streams)
        if run.fault == "recall":
            self.first_s["lent" if run.moment == "loans" else "free"].append(streams[-1].first_s)

    def _cannot_hold(self, streams: Sequence[Stream]) -> bool:
        """Whether the instances that are left have no room for all that was asked."""
        wanted = sum(_num_elsewhere(s.item) for s in streams if s.item.is_long)
        return wanted > _SAFE_TOKENS * (len(self._working()) - 1)

    # -- afterwards ------------------------------------------------------------------------------

    def _working(self) -> list[Member]:
        return [m for m in self.cluster.router.members_now() if not m.is_draining]

    def _bury(self, run: Run, victims: Sequence[Member]) -> None:
        """Wait for the end of those that were to end."""
        how = run.fault.split()[0]
        if how not in ("kill", "stop", "leave"):
            return
        gone = {victim.id for victim in victims}
        self.num_dead += len(gone)
        left_over.until(lambda: not gone & self._ids(), f"{run}: {gone} are there still")
        for victim in victims:
            there = Path(f"/proc/{victim.pid}")
            left_over.until(lambda there=there: not there.exists(), f"{run}: {there} is left")

    def _ids(self) -> set[int]:
        return {member.id for member in self.cluster.router.members_now()}

    def _check(self, run: Run) -> None:
        """Nothing is left of the run."""
        try:
            left_over.until(lambda: not self.cluster.stats().requests, "requests are left")
            left_over.until(
                lambda: all(map(left_over.holds_nothing, self._maps())),
                lambda: f"held: {[one.totals for one in self._maps()]}",
                10.0,
            )
            if len(self.runs) % 4 == 3:
                self.cluster.router.ask("trim")
                left_over.until(
                    lambda: not any(one.totals.parked for one in self._maps()), "parked after trim"
                )
        except AssertionError as error:
            self.wrong.append(f"{run}: {error}")
            return
        self._count(run)

    def _maps(self) -> list[MemoryMap]:
        for _ in range(50):
            try:
                maps = self.cluster.router.ask("memory_map")
                return [one for one in maps if isinstance(one, MemoryMap)]
            except EngineDied:
                time.sleep(0.2)
        raise AssertionError("instances come and go")

    def _count(self, run: Run) -> None:
        all_given = self._given()
        run.num_called_back = sum(
            given.num_called_back - self._num_called_back.get(number, 0)
            for number, given in all_given.items()
        )
        self._num_called_back = {n: given.num_called_back for n, given in all_given.items()}
        slowest = [given.slowest_call_back_s for given in all_given.values()]
        self.slowest_call_back_s = max([self.slowest_call_back_s, *slowest])
        if self.slowest_call_back_s > _CALL_BACK_S:
            self.wrong.append(f"{run}: memory took {self.slowest_call_back_s} s to call back")
        pids = [os.getpid(), *(m.pid for m in self.cluster.router.members_now())]
        for pid in pids:
            counts = self.held.setdefault(pid, [])
            counts.append(left_over.num_open(pid))
            if counts[-1][0] > counts[0][0] + _MOST_OPEN + 4 * self.size:
                self.wrong.append(f"{run}: descriptors of {pid}: {counts}")
        if zombies := left_over.zombies():
            self.wrong.append(f"{run}: zombies {zombies}")
        if strange := left_over.strange_sockets(self.cluster, self._ids()):
            self.wrong.append(f"{run}: sockets are left: {strange}")

    def _given(self) -> dict[int, Lent]:
        """What each instance has lent, by its last pulse."""
        return {
            member.id: member.stats.segments.given
            for member in self.cluster.router.members_now()
            if member.stats is not None
            and member.stats.segments is not None
            and member.stats.segments.given is not None
        }

    # -- what came of it -------------------------------------------------------------------------

    def told(self) -> list[str]:
        """A line a fault, and what was measured."""
        lines = [f"{'fault':<16}{'loans':>6}{'none':>6}{'waits: median':>15}{'longest':>9} errors"]
        for fault in FAULTS:
            of_one = [run for run in self.runs if run.fault == fault]
            if of_one:
                moments = Counter(run.moment for run in of_one)
                waits = sorted(run.waits_s for run in of_one)
                lines.append(
                    f"{fault:<16}{moments['loans']:>6}{moments['none']:>6}"
                    f"{waits[len(waits) // 2]:>13.2f} s{waits[-1]:>7.2f} s "
                    f"{sum(len(run.errors) for run in of_one):>6}"
                )
        for kind, first_s in self.first_s.items():
            if first_s:
                told = (
                    f"{sorted(first_s)[len(first_s) // 2]:.3f} s in the median, {max(first_s):.3f}"
                )
                lines.append(f"first token of what fills a pool whose memory is {kind}: {told} s")
        num_called_back = sum(run.num_called_back for run in self.runs)
        lines.append(
            f"loans called back: {num_called_back}; until the memory of one was there, in its "
            f"engine: {self.slowest_call_back_s:.4f} s at most"
        )
        done = self.cluster.stats().done
        lines.append(
            f"computed again as others had lost them: {done.mended_tokens} tokens of loans, and "
            f"{done.redone_tokens} of requests from their start"
        )
        errors = Counter(error for run in self.runs for error in run.errors)
        lines.append(f"errors: {dict(errors) or 'none'}")
        for pid, counts in self.held.items():
            most = max(count for count, _ in counts)
            lines.append(
                f"process {pid}: descriptors, threads {counts[0]} to {counts[-1]}, most {most}"
            )
        return lines


def _num_elsewhere(item: Item) -> int:
    return max(0, item.num_tokens - _LOCAL_TOKENS + 511) // 512 * 512 if item.is_long else 0


def _loans(stats: ClusterStats) -> list[tuple[int, int]]:
    """Who borrows from whom."""
    return [(one.debtor, one.creditor) for one in stats.loans if one.num_tokens]


@contextmanager
def attacked(
    folder: Path, pool: Pool, *, seed: int, size: int = 5, **options: Any
) -> Iterator[LendingAttack]:
    """A cluster of instances that lend."""
    policy = Directed()
    with Cluster(
        folder,
        instances=size,
        policy=policy,
        threads=1,
        kv_memory=POOL,
        **{"liveness_s": _LIVENESS_S, "shortage_wait_s": 20.0, **OPTIONS, **options},
    ) as cluster:
        yield LendingAttack(cluster, policy, pool, size=size, seed=seed)
