"""Requests of all kinds on a cluster, moves between its instances, and one fault for each move.

What comes of every request is compared with what a single engine says; what instances hold, once
nothing runs, with nothing.
"""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import left_over
import middle
from vkv import LLM, SamplingParams, StructuredOutputsParams
from vkv.runtime.cluster.cluster import Cluster
from vkv.runtime.engine.memory.memory_map import MemoryMap
from vkv.runtime.engine.messages import Abort
from vkv.runtime.engine.migration.handshake import Handshake, Stages
from vkv.runtime.request.outputs import RequestOutput
from vkv.runtime.request.spec import SequenceKey
from vkv.vmem.errors import EngineDied, InvalidOperation, VkvError

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seqs": 8, "max_len": 2048}
STAGES = Stages(small_tokens=4, spare_tokens=16)
_LENGTHS = (5, 30, 120, 400, 1500)
_VOCABULARY = 250
_LIVENESS_S = 6.0
_NAME = 12  # characters of a request's name in a memory map

# -- what is asked, and what is right ------------------------------------------------------------

_KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.3, "logprobs": 2},
    {"temperature": 0.8, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.9, "seed": 3, "n": 3},
    {"temperature": 0.7, "seed": 9, "min_tokens": 9, "logprobs": 0},
    {"temperature": 0.9, "seed": 4, "structured_outputs": {"regex": "[a-f ]{60,200}x"}},
    {"temperature": 0, "stop": True},
]


@dataclass(frozen=True)
class Item:
    """A request, and what a single engine says to it."""

    prompt: dict[str, list[int]]
    params: SamplingParams
    right: RequestOutput
    streams: bool


def items(*, most_tokens: int, max_len: int, lengths: Sequence[int] = _LENGTHS) -> list[Item]:
    """Of each kind one of each length, with a stop string that comes where there is to be one."""
    draw = random.Random(1)
    kinds = [kind for kind in _KINDS for _ in lengths]
    prompts = [
        {"prompt_token_ids": [draw.randrange(_VOCABULARY) for _ in range(length)]}
        for _ in _KINDS
        for length in lengths
    ]
    params = [_params(kind, draw.randint(most_tokens // 3, most_tokens)) for kind in kinds]
    with LLM(**{**OPTIONS, "max_len": max_len}) as llm:
        endless = [place for place, kind in enumerate(kinds) if "stop" in kind]
        whole = llm.generate([prompts[p] for p in endless], [params[p] for p in endless])
        for place, output in zip(endless, whole, strict=True):
            text = output.outputs[0].text
            params[place] = _params(
                {"temperature": 0, "stop": [text[len(text) // 2 :][:6]]}, most_tokens
            )
        right = llm.generate(prompts, params)
    return [
        Item(prompts[place], params[place], right[place], params[place].n == 1 and place % 3 == 0)
        for place in range(len(kinds))
    ]


def _params(kind: dict[str, Any], max_tokens: int) -> SamplingParams:
    given = {"max_tokens": max_tokens, "ignore_eos": True, **kind}
    if given.get("stop") is True:
        del given["stop"]
    if outputs := given.pop("structured_outputs", None):
        given["structured_outputs"] = StructuredOutputsParams(**outputs)
        given["ignore_eos"] = False
    return SamplingParams(**given)


# -- what goes wrong -----------------------------------------------------------------------------

SOFT = ["lose", "double", "again", "late", "long", "abort", "pause source", "pause target"]
HARD = ["kill source", "kill target", "kill both", "stop source", "stop target"]
_RETURNING = {"GoOn", "WentOn", "Cancel", "Cancelled", "Ended"}
_FATES: dict[str, middle.Fate] = {
    "lose": (),
    "double": (0, 0),
    "again": (0, 0.4),  # once more, when others have passed
    "late": (0.25,),
    "long": (2.0,),  # a request may end meanwhile
}


@dataclass
class Plan:
    """What is to happen to one move.

    Attributes:
        kind: of the message that it happens at.
        fault: one of `SOFT` or `HARD`, "cut" or "none".
        state: the handshake's when it happened; empty if it did not.
        outcome: "moved", "stayed" or "recomputed".
        why: it stayed.
    """

    kind: str
    fault: str
    source: int = -1
    target: int = -1
    num_bytes: int = 0
    begun_s: float = 0.0
    state: str = ""
    outcome: str = ""
    why: str = ""

    @property
    def is_hard(self) -> bool:
        """Whether an instance dies of it."""
        return self.fault in HARD

    @property
    def is_cut(self) -> bool:
        return self.fault == "cut" or self.kind in _RETURNING

    @property
    def victims(self) -> list[int]:
        which = self.fault.rpartition(" ")[2]
        return {"source": [self.source], "target": [self.target]}.get(
            which, [self.source, self.target]
        )


def comes(kind: str, by: str) -> bool:
    """Whether moves by a channel have such messages, where memory is not short."""
    return kind != "Refused" and (kind, by) != ("Carry", "pages")  # all goes with `Pause`


def all_plans(by: str) -> Iterator[Plan]:
    """Every fault at every message that a channel's moves have."""
    for kind in middle.KINDS:
        if comes(kind, by):
            for fault in (*SOFT, *HARD):
                yield Plan(kind, fault)
    for _ in range(4):
        yield Plan("Ready", "cut")


# -- the cluster -----------------------------------------------------------------------------------


@dataclass
class Attack:
    """A cluster under attack.

    Args:
        by: which channel, "pages" or "copies".
        cluster: with `middle` between it and its instances.
        pool: what is asked.
        size: how many instances there are to be.
        heals_at: so many are left when others are started in place of those that died; None for
            at once.
        draw: all that is random.

    Attributes:
        runs: plans whose fault came, in order.
        wrong: what must not be.
        errors: of requests that ended with one, by what it says.
        checks: of what instances held in the end.
    """

    by: str
    cluster: Cluster
    between: middle.Middle
    pool: Sequence[Item]
    size: int
    draw: random.Random
    heals_at: int | None = None
    runs: list[Plan] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_dead: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    held: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plans: dict[SequenceKey, Plan] = {}
        self._aborted: set[str] = set()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._healing: threading.Thread | None = None
        self._doomed: set[int] = set()
        self._ended: set[int] = set()
        self.between.decide = self._decide
        self.between.cut_at = self._cut_at
        self._hook_outcomes()

    # -- the fate of messages ------------------------------------------------------------------

    def _decide(self, passing: middle.Passing) -> middle.Fate:
        plan = self._plans.get(passing.message.key)
        if plan is None or plan.state or plan.fault in ("none", "cut"):
            return middle.ON
        if plan.kind in ("Extend", "Carried") and passing.kind == "Pause":
            plan.begun_s = plan.begun_s or time.monotonic()
            if time.monotonic() - plan.begun_s < 0.3:  # it outgrows its room
                return ()
        if passing.kind != plan.kind:
            return middle.ON
        self._note_state(plan, passing.message.key)
        if plan.kind == "Extend" and plan.state != "extending":  # it says that the move lives
            plan.state = ""
            return middle.ON
        return self._strike(plan, passing)

    def _note_state(self, plan: Plan, key: SequenceKey) -> None:
        handshake = self.cluster.router._arbiter.handshake(key)
        plan.state = "over" if handshake is None else handshake.state.value

    def _strike(self, plan: Plan, passing: middle.Passing) -> middle.Fate:
        if plan.fault in _FATES:
            return _FATES[plan.fault]
        if plan.fault == "abort":
            request_id = passing.message.key[0]
            self._aborted.add(request_id)
            self.cluster.router.post(Abort(request_id))
            return middle.ON
        kind = {"kill": "KILL", "stop": "STOP", "pause": "STOP"}[plan.fault.split()[0]]
        for victim in plan.victims:
            self.between.kill(victim, _SIGNALS[kind])
            if plan.fault.startswith("pause"):
                threading.Timer(0.7, self._go_on, (victim,)).start()
            else:
                self._ended.add(victim)
        return self.draw.choice([(), middle.ON]) if passing.is_answer else middle.ON

    def _go_on(self, instance: int) -> None:
        """After a pause, but for one that was stopped for good meanwhile."""
        if instance not in self._ended:
            self.between.kill(instance, _SIGNALS["CONT"])

    def _cut_at(self, key: SequenceKey) -> int | None:
        plan = self._plans.get(key)
        if plan is None or not plan.is_cut:
            return None
        if plan.fault == "cut" and not plan.state:
            self._note_state(plan, key)
        return plan.num_bytes

    def _hook_outcomes(self) -> None:
        """Have the arbiter's every conclusion noted."""
        arbiter = self.cluster.router._arbiter
        conclude = arbiter._conclude

        def noting(sequence: Any, handshake: Handshake) -> None:
            plan = self._plans.get(handshake.key)
            if plan is not None and handshake.outcome is not None:
                is_lost = handshake.outcome == "lost" and not sequence.has_ended
                outcome = "moved" if handshake.outcome == "moved" else "stayed"
                plan.outcome = "recomputed" if is_lost else outcome
                plan.why = handshake.why
            conclude(sequence, handshake)

        arbiter._conclude = noting  # type: ignore[method-assign]

    # -- clients -------------------------------------------------------------------------------

    @contextmanager
    def clients(self, number: int) -> Iterator[None]:
        """So many clients ask one request after another; when it ends they have their last."""
        self._is_over.clear()
        threads = [
            threading.Thread(target=self._client, args=(self.draw.random(),), daemon=True)
            for _ in range(number)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join(45)
            if any(thread.is_alive() for thread in threads):
                self.wrong.append(f"requests that never end: {self.unfinished()}")

    def _client(self, seed: float) -> None:
        draw = random.Random(seed)
        while not self._is_over.is_set() and not self.wrong:
            item = draw.choice(self.pool)
            try:
                if item.streams:
                    self._stream(item)
                else:
                    self._compare(item, self.cluster.generate(item.prompt, item.params)[0])
            except VkvError as error:
                self._end_with(error)
            except BaseException as error:
                self.wrong.append(f"{item.params}: {error!r}")
                raise
            self.num_requests += 1

    def _stream(self, item: Item) -> None:
        token_ids: list[int] = []
        text, finish_reason = "", None
        for delta in self.cluster.stream(item.prompt, item.params):
            token_ids += delta.token_ids
            text += delta.text
            finish_reason = delta.finish_reason
        right = item.right.outputs[0]
        if finish_reason == "abort":
            self._expect(list(right.token_ids)[: len(token_ids)] == token_ids, item, token_ids)
            return
        self._expect(
            (token_ids, text, finish_reason)
            == (list(right.token_ids), right.text, right.finish_reason),
            item,
            (token_ids, text, finish_reason),
        )

    def _compare(self, item: Item, output: RequestOutput) -> None:
        if output.error is not None:
            self._end_with(output.error)
            return
        for found, right in zip(output.outputs, item.right.outputs, strict=True):
            token_ids = list(found.token_ids)
            if found.finish_reason == "abort" and output.request_id in self._aborted:
                self._expect(list(right.token_ids)[: len(token_ids)] == token_ids, item, found)
                continue
            self._expect(
                (token_ids, found.text, found.finish_reason, found.stop_reason)
                == (list(right.token_ids), right.text, right.finish_reason, right.stop_reason),
                item,
                found,
            )
            self._expect(_are_close(found, right, may_lack=self.num_dead > 0), item, found)

    def _end_with(self, error: VkvError) -> None:
        if not str(error):
            self.wrong.append(f"an error that says nothing: {error!r}")
        self.errors[f"{type(error).__name__}: {str(error)[:60]}"] += 1

    def _expect(self, is_so: bool, item: Item, found: Any) -> None:
        if not is_so:
            right = [(len(o.token_ids), o.finish_reason, o.text) for o in item.right.outputs]
            self.wrong.append(f"{item.params}: {found!r}\n in place of {right}")

    # -- moves -----------------------------------------------------------------------------------

    def move(self, plan: Plan, *, tries: int = 30) -> bool:
        """One move of something with a fault; False if its moment did not come."""
        for _ in range(tries):
            if self.wrong or self._is_over.is_set():
                return False
            while (key := self._choose(plan)) is None:
                if self.wrong or self._is_over.is_set():
                    return False
                time.sleep(0.01)
            try:
                self.cluster.migrate(key[0], plan.target, index=key[1])
            except (InvalidOperation, EngineDied):  # it has just ended, or one of the two has
                pass
            finally:
                self._plans.pop(key, None)
                self._doomed -= {plan.source, plan.target}
            if plan.state and plan.outcome:
                with self._lock:
                    self.runs.append(plan)
                if plan.is_hard:
                    self._heal(plan)
                return True
            if plan.state and plan.is_hard:  # it struck a move that had just ended
                self._heal(plan)
                return False
            plan.state = ""
        self.missed[f"{plan.kind} {plan.fault}"] += 1
        return False

    def _choose(self, plan: Plan) -> SequenceKey | None:
        """Some sequence, and where it is to go; the plan is made for it."""
        requests = self.cluster.stats().requests
        there = [m.id for m in self.cluster.router.members_now() if not m.is_draining]
        with self._lock:
            free = [
                (key, owner)
                for key, owner in requests.items()
                if owner in there and owner not in self._doomed and key not in self._plans
            ]
            targets = [instance for instance in there if instance not in self._doomed]
            if not free or len(targets) < 2:
                return None
            key, owner = self.draw.choice(free)
            assert owner is not None
            plan.source = owner
            plan.target = self.draw.choice([t for t in targets if t != owner])
            plan.num_bytes = self.draw.choice([1, 9, 60, 200, 400, 5000, 100_000])
            plan.begun_s, plan.outcome, plan.why = 0.0, "", ""
            if plan.fault == "none":
                plan.state = "any"
            if plan.is_hard:
                self._doomed |= {plan.source, plan.target}
            self._plans[key] = plan
            return key

    # -- deaths ------------------------------------------------------------------------------------

    @property
    def may_kill(self) -> bool:
        """Whether all instances are there."""
        healing = self._healing
        return healing is None or not healing.is_alive()

    def _heal(self, plan: Plan) -> None:
        self._healing = threading.Thread(target=self._replace, args=(plan,), daemon=True)
        self._healing.start()

    def _replace(self, plan: Plan) -> None:
        """Wait for the end of those that were hit, and have others started."""
        deadline = time.monotonic() + _LIVENESS_S + 10
        while self._there() & set(plan.victims):
            if time.monotonic() > deadline:
                self.wrong.append(f"{plan}: it was not noticed")
                return
            time.sleep(0.02)
        self.num_dead += len(plan.victims)
        if (error := self.cluster.router.error) is not None:
            self.wrong.append(f"{plan}: {error}")
            return
        while any(Path(f"/proc/{self.between.pids[v]}").exists() for v in plan.victims):
            if time.monotonic() > deadline + 10:  # Ray has time to collect them
                self.wrong.append(f"{plan}: a process is left")
                return
            time.sleep(0.05)
        if self.heals_at is not None and len(self._there()) > self.heals_at:
            return
        try:
            self.cluster.scale(self.size)
        except VkvError as error:
            self.wrong.append(f"no other instance starts: {error!r}")

    def _there(self) -> set[int]:
        return {member.id for member in self.cluster.router.members_now()}

    # -- checks ------------------------------------------------------------------------------------

    def check_owners(self) -> None:
        """No sequence is live in two instances, and each is where it is said to be."""
        before, maps, after = self._pictures()
        strips: dict[str, list[int]] = {}
        for instance, picture in maps.items():
            for strip in picture.strips:
                if strip.state == "live" and strip.request:
                    strips.setdefault(strip.request, []).append(instance)
        for name, instances in strips.items():
            if len(instances) > 1:
                self.wrong.append(f"{name} is live on {instances}")
        for key, owner in before.items():
            name = key[0][-_NAME:] + (f"/{key[1]}" if key[1] else "")
            if after.get(key) == owner and strips.get(name, [owner]) != [owner]:
                self.wrong.append(f"{key} is of {owner} and live on {strips[name]}")

    def _pictures(self) -> tuple[dict[Any, Any], dict[int, MemoryMap], dict[Any, Any]]:
        for _ in range(50):
            members = [member.id for member in self.cluster.router.members_now()]
            before = self.cluster.stats().requests
            try:
                maps = self.cluster.router.ask("memory_map")
            except EngineDied:
                time.sleep(0.2)
                continue
            if len(maps) == len(members) and all(isinstance(one, MemoryMap) for one in maps):
                named = dict(zip(members, maps, strict=True))
                return before, named, self.cluster.stats().requests  # type: ignore[return-value]
        raise AssertionError("instances come and go")

    def check_idle(self) -> None:
        """All instances are there, and hold nothing: pages, places, descriptors, threads."""
        healing = self._healing
        if healing is not None:
            healing.join(120)
        left_over.until(
            lambda: not self.cluster.stats().requests, lambda: f"left: {self.unfinished()}"
        )
        left_over.until(self._hold_nothing, lambda: f"held: {self._totals()}")
        self.cluster.router.ask("trim")
        left_over.until(
            lambda: all(not t.parked for t in self._totals()), lambda: f"after: {self._totals()}"
        )
        for member in self.cluster.router.members_now():
            counts = self.held.setdefault(member.pid, [])
            counts.append(left_over.num_open(member.pid))
        if zombies := left_over.zombies():
            self.wrong.append(f"zombies: {zombies}")
        names = {member.id for member in self.cluster.router.members_now()}
        strange = partial(left_over.strange_sockets, self.cluster, names)
        # Who died last is being buried, and a way that was to be cut waits 15 s for its stage.
        if not left_over.wait_until(lambda: not strange(), 40.0):
            self.wrong.append(f"sockets are left: {strange()}")

    def unfinished(self) -> list[str]:
        """All that is known of what has not ended."""
        arbiter = self.cluster.router._arbiter
        strips = [
            (instance, strip.request, strip.num_tokens, strip.state)
            for instance, picture in self._pictures()[1].items()
            for strip in picture.strips
            if strip.state == "live"
        ]
        found = [f"live: {strips}"]
        for one in arbiter.unfinished:
            moving = arbiter.handshake(one.key)
            found.append(
                f"{one.key} of {one.owner} since {one.epoch}, {len(one.output_token_ids)} of "
                f"{one.spec.params.max_tokens} tokens, {one.num_missing} missing, early "
                f"{one.early}, former {one.former}, told {one.told}, aborted {one.is_aborted}, "
                f"moving {None if moving is None else vars(moving)}"
            )
        return found

    def _totals(self) -> list[Any]:
        return [picture.totals for picture in self._pictures()[1].values()]

    def _hold_nothing(self) -> bool:
        return all(map(left_over.holds_nothing, self._pictures()[1].values()))


_SIGNALS = {"KILL": 9, "STOP": 19, "CONT": 18}


def _are_close(found: Any, right: Any, *, may_lack: bool) -> bool:
    """Log probabilities; those of tokens whose engine died may not have come."""
    if right.logprobs is None or (may_lack and len(found.logprobs) < len(right.logprobs)):
        return True
    return len(found.logprobs) == len(right.logprobs) and all(
        abs(logprob.logprob - wanted[token_id].logprob) < 1e-3
        for table, wanted in zip(found.logprobs, right.logprobs, strict=True)
        for token_id, logprob in table.items()
    )


@contextmanager
def attacked(
    by: str,
    pool: Sequence[Item],
    *,
    seed: int,
    size: int = 3,
    liveness_s: float = _LIVENESS_S,
    **options: Any,
) -> Iterator[Attack]:
    """A cluster whose sequences move `by` pages or copies."""
    given = {**OPTIONS, "kv_memory": "256MiB", "movable": by == "pages", **options}
    with (
        middle.in_the_middle() as between,
        Cluster(
            instances=size,
            policy="round_robin",
            threads=1,
            stages=STAGES,
            liveness_s=liveness_s,
            **given,
        ) as cluster,
    ):
        yield Attack(by, cluster, between, pool, size, random.Random(seed))


def kind_of(why: str) -> str:
    """A reason without what it is of."""
    why = re.sub(r"\('[^']*', \d+\)|<?Request\([^)]*\)>?|request '[^']*'|/\S+", "it", why)
    return re.sub(r"\d+", "…", why)
