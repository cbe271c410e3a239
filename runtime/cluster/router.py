"""The way to several engines: each request to one of them, and to another when that is better.

It is an `EnginePort`, so that whatever hands requests to one engine can hand them to a cluster. One
thread with an event loop hears all instances; an `Arbiter` says whose word counts; `Decisions` asks
the policy where requests go and which of them move.
"""

import asyncio
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ...vmem.errors import EngineDied, InvalidOperation, VkvError
from ...vmem.process import ProcessOwner
from ..engine.memory.memory_map import MemoryMap
from ..engine.messages import Abort, Finish, Message, SetPriority
from ..engine.migration.arbiter import Arbiter
from ..engine.migration.handshake import Stages
from ..engine.migration.messages import Answer as MoveAnswer
from ..frontend.driving.sinks import Sink, give
from ..link.face import Face
from ..link.messages import Pulse, Question
from ..request.spec import RequestSpec, SequenceKey
from ..request.step_output import StepOutput
from .decisions import Decisions
from .instances.instance_link import InstanceLink
from .instances.maps import Maps, Seen
from .lending import longest_of
from .loop_thread import LoopThread
from .members import Ending, Members
from .policies import ClusterPolicy
from .snapshot import ClusterSnapshot
from .stats import ClusterStats, Member, MoveUnderWay

_TICK_S = 0.02  # between looks at moves under way
_LOANS_LEAVE_S = 10.0  # for what an instance that drains has of others' requests
_DECIDE_S = 0.1  # between questions to the policy
_OTHERS_FIRST_S = 2.0  # that what moves has, before what does not is computed again elsewhere


class Router:
    """Requests to the instances of a cluster, and what came of them back to their sinks.

    Args:
        policy: decides where requests go, and which move.
        kill: ends an instance for good; called before its requests go on elsewhere.
        stages: how migrations copy.
        max_moves: sequences that move at once.
        liveness_s: as of `InstanceLink`.

    Attributes:
        error: as of `EnginePort`: what ended the cluster; None while it works.
        on_leaving: called, on the router's thread, for an instance that was told to end.
        decisions: what the policy is asked, on that thread.

    One class, since all of it is what happens on one event loop.
    """

    def __init__(
        self,
        policy: ClusterPolicy,
        kill: Callable[[int], None],
        *,
        stages: Stages | None = None,
        max_moves: int = 4,
        liveness_s: float = 60.0,
    ) -> None:
        self.error: BaseException | None = None
        self.on_leaving: Callable[[int], None] = lambda instance: None
        self._kill = kill
        self._liveness_s = liveness_s
        self._owner = ProcessOwner("this cluster")
        self._arbiter = Arbiter(stages=stages)
        self._members = Members(self._arbiter)
        self.decisions = Decisions(policy, self._arbiter, self._members, max_moves=max_moves)
        self._sinks: weakref.WeakValueDictionary[str, Sink] = weakref.WeakValueDictionary()
        self._moved: dict[SequenceKey, list[asyncio.Future[None]]] = {}
        self._leaving: set[int] = set()
        self._maps = Maps()
        self._burials: set[asyncio.Task[None]] = set()
        self._decided_s = 0.0
        self._is_closed = False
        self._thread = LoopThread("vkv-router", self._owner)
        self._thread.post(self._tick)

    # -- as of `EnginePort`, from any thread ---------------------------------------------------

    def check_process(self) -> None:
        """As of `EnginePort`."""
        self._owner.check()

    def check_open(self) -> None:
        """As of `EnginePort`; raises EngineDied once no instance is left."""
        self._owner.check()
        if self._is_closed:
            raise InvalidOperation("this cluster has been closed; create another")
        if self.error is not None:
            raise EngineDied(str(self.error))

    def submit(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        self.check_open()
        for sink in sinks:
            self._sinks[sink.spec.request_id] = sink
        self._thread.post(self._begin, [sink.spec for sink in sinks])
        self.check_open()  # once more: what comes after the end is heard by nobody

    def abandon(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        if self._owner.is_mine:
            for sink in sinks:
                if not sink.is_finished:
                    self.post(Abort(sink.spec.request_id))

    def post(self, message: Message) -> None:
        """As of `EnginePort`."""
        assert isinstance(message, Finish | Abort | SetPriority), message
        self._thread.post(self._tell, message)

    # -- the instances, from any thread --------------------------------------------------------

    def join(self, member: Member, connection: socket.socket) -> None:
        """An instance is ready, and this is the way to it: give it work from now on."""
        self._thread.run(self._join(member, connection))

    def begin_drain(self, instance: int) -> None:
        """Give an instance nothing more. Raises InvalidOperation if it is unknown."""
        self._thread.read(lambda: self._begin_drain(instance))

    def drain(self, instance: int, timeout_s: float | None = None) -> None:
        """Wait until all that an instance has, which `begin_drain` was told of, has moved, ended,
        or, of what does not move, goes on elsewhere; or until it is gone.

        Raises InvalidOperation if it is not empty after `timeout_s`: it drains on then.
        """
        self._thread.run(self._drain(instance, timeout_s))

    def end(self, instance: int, why: Ending) -> None:
        """End an instance for good; what it still has goes on elsewhere, computed again."""
        self._thread.run(self._end_one(instance, why))

    def scaled(self, *, done: bool = True) -> None:
        """As of `Decisions.has_scaled`."""
        self._thread.post(partial(self.decisions.has_scaled, done=done))

    def migrate(self, key: SequenceKey, instance: int) -> bool:
        """Move a sequence; waits until that is over. True if it is there, or ended there.

        Raises InvalidOperation if it is not unfinished, is there or on its way, or if the instance
        takes nothing.
        """
        return self._thread.run(self._migrate(key, instance))

    def members(self) -> list[Member]:
        """The instances, as they are now."""
        return self._thread.read(self._members.all)

    def ask(self, question: Question, *about: str) -> list[int | MemoryMap | None]:
        """Have all instances do something between steps; what came of it, in their order.

        Raises what it raises in any of them, EngineDied if one is gone meanwhile but by a drain.
        """
        return self._thread.run(self._ask_all(question, *about))

    def ask_one(self, instance: int, question: Question, *about: str) -> int | MemoryMap | None:
        """As `ask`, of one instance. Raises InvalidOperation if it is not there."""
        return self._thread.run(self._ask_one(instance, question, *about))

    def maps(self) -> dict[int, Seen]:
        """What the slots of each instance hold; of one that does not answer, what it was."""
        return self._thread.run(self._maps.look(self._members.links()))

    def members_now(self) -> list[Member]:
        """The instances, without waiting for the router's thread; not to be changed."""
        return self._members.now()

    def snapshot(self) -> ClusterSnapshot:
        """The cluster as its policy sees it."""
        return self._thread.read(self.decisions.picture)

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._is_closed

    def stats(self) -> ClusterStats:
        """What the cluster has done and holds."""
        return self._thread.read(self._stats)

    def stats_now(self) -> ClusterStats:
        """As `stats`, without waiting for the router's thread, and without requests and moves."""
        counts, (members, done) = self._arbiter.counts, self._members.report()
        return ClusterStats(
            num_migrations=counts.moved,
            num_stayed=counts.stayed,
            num_recomputed=counts.orphaned,
            done=done,
            instances=tuple(members),
            loans=self.decisions.lending.stats(),
        )

    def close(self) -> None:
        """Hang up on all instances. Requests end with InvalidOperation. Closing twice is
        harmless."""
        if self._is_closed or not self._owner.is_mine:
            return
        self._is_closed = True
        self._thread.run(self._end(InvalidOperation("this cluster was closed while it generated")))
        self._thread.stop()

    # -- requests ------------------------------------------------------------------------------

    def _begin(self, specs: Sequence[RequestSpec]) -> None:
        if self.error is not None:  # since they were submitted
            self._fail_all(EngineDied(str(self.error)))
            return
        self.decisions.held += specs
        self._dispatch()
        self._send()

    def _dispatch(self) -> None:
        self.decisions.dispatch(self._sinks.__contains__)

    def _tell(self, message: Finish | Abort | SetPriority) -> None:
        if isinstance(message, Abort):
            for spec in self.decisions.drop(message.request_id):
                self._route(_aborted(spec))
        elif isinstance(message, SetPriority):
            self.decisions.set_priority(message.request_id, message.priority)
        self._arbiter.tell(message)
        self._members.changed()
        self._send()

    def _route(self, outputs: Sequence[StepOutput]) -> None:
        """Give each output to its sink; a request whose sink is gone is dropped."""
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                if output.finish_reason is None:
                    self._arbiter.tell(Abort(output.request_id))
                continue
            for message in give(sink, output):
                assert isinstance(message, Finish | Abort | SetPriority), message
                self._arbiter.tell(message)
            if sink.is_finished:
                self._sinks.pop(output.request_id, None)

    def _stats(self) -> ClusterStats:
        moves = tuple(
            MoveUnderWay(key=one.key, source=int(one.source), target=int(one.target))
            for one in self._arbiter.under_way
        )
        return replace(self.stats_now(), requests=self._where(), moves=moves)

    def _where(self) -> dict[SequenceKey, int | None]:
        """Unfinished sequences, and the instance that has each; None for one that waits for any."""
        found: dict[SequenceKey, int | None] = {
            (spec.request_id, index): None
            for spec in self.decisions.held
            for index in range(spec.params.n)
        }
        for sequence in self._arbiter.unfinished:
            found[sequence.key] = None if sequence.owner is None else int(sequence.owner)
        return found

    # -- what instances say: as of `Listener` --------------------------------------------------

    def on_outputs(self, instance: int, outputs: list[StepOutput]) -> None:
        """New tokens of some requests."""
        self._route(self._arbiter.accept(outputs))
        self._members.changed()
        if self.decisions.held and any(output.finish_reason is not None for output in outputs):
            self._dispatch()
        if self._members.is_apart:  # what has its first token is to be handed over soon
            self._decided_s = 0.0
        self._send()

    def on_answer(self, instance: int, answer: MoveAnswer) -> None:
        """A step of a migration."""
        num_moving = self._arbiter.num_moving
        self._arbiter.on(answer)
        self._route(self._arbiter.accept())
        if self.decisions.held and self._arbiter.num_moving < num_moving:  # it may have room now
            self._members.changed()
            self._dispatch()
        self.decisions.place_orphans()  # one whose source died may be known to be here only now
        self._note_moves()
        self._send()

    def on_pulse(self, instance: int, pulse: Pulse) -> None:
        """What it holds, or that it was told to end."""
        if self._members.note(instance, pulse):  # told before it, or others, get work
            self.decisions.lending.settle(self.decisions.picture())
        if pulse.is_leaving and instance not in self._leaving:
            self._leaving.add(instance)
            self.on_leaving(instance)

    def on_face(self, instance: int, face: Face) -> None:
        """What it is; with its connection's beginning."""
        self._members.meet(instance, face)
        self._dispatch()
        self._send()

    def on_gone(self, instance: int, why: str) -> None:
        """It is gone, or seems to be: its requests go on elsewhere, computed again."""
        self._members.remove(instance, "died")  # what it says from now on comes nowhere
        if not self._members.now():
            self.error = EngineDied(f"no instance is left: the last one, {instance}, {why}")
        loop = asyncio.get_running_loop()
        burial = loop.create_task(self._end_one(instance, "died"))  # which may wait for its node
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    def _bury(self, instance: int) -> None:
        """An instance is no more."""
        self._arbiter.died(str(instance))
        self._route(self._arbiter.accept())
        self._note_moves()
        if self.error is not None:
            self._fail_all(EngineDied(str(self.error)))
        else:
            self.decisions.place_orphans()
        self._send()

    def _fail_all(self, error: VkvError) -> None:
        self.decisions.held.clear()
        self._arbiter.take_orphans()
        for reference in self._sinks.valuerefs():
            sink = reference()
            if sink is not None:
                sink.fail(error)
        self._sinks.clear()

    # -- from time to time ---------------------------------------------------------------------

    def _tick(self) -> None:
        # First: a policy of the user's own may raise.
        asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        now_s = time.monotonic()
        if now_s - self._decided_s >= _DECIDE_S:
            self._decided_s = now_s
            self._dispatch()
            self.decisions.rebalance()
        self._send()

    def _send(self) -> None:
        for name, message in self._arbiter.take():
            link = self._members.link(int(name))
            if link is not None:
                link.send(message)
        self._note_moves()

    # -- for those that ask --------------------------------------------------------------------

    def _note_moves(self) -> None:
        """Tell those that wait for a move that it is over."""
        for key in list(self._moved):
            if self._arbiter.handshake(key) is None:
                for future in self._moved.pop(key):
                    if not future.done():
                        future.set_result(None)

    async def _join(self, member: Member, connection: socket.socket) -> None:
        link = InstanceLink(member.id, connection, self, liveness_s=self._liveness_s)
        self._members.add(member, link)

    async def _migrate(self, key: SequenceKey, instance: int) -> bool:
        member = self._members.of(instance)
        if member.is_draining:
            raise InvalidOperation(f"instance {instance} drains; move to another")
        self._arbiter.migrate(key, str(instance))
        future = asyncio.get_running_loop().create_future()
        self._moved.setdefault(key, []).append(future)
        before = self._arbiter.counts.moved
        self._send()
        await future
        owner = self._arbiter.owner(key)
        return owner == str(instance) or (owner is None and self._arbiter.counts.moved > before)

    def _begin_drain(self, instance: int) -> None:
        self._members.of(instance).is_draining = True
        self._members.changed()

    async def _drain(self, instance: int, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.decisions.lending.settle(self.decisions.picture())  # what it has of others leaves
        now_s = time.monotonic()
        leaves_until_s, others_first_until_s = now_s + _LOANS_LEAVE_S, now_s + _OTHERS_FIRST_S
        while self._arbiter.involves(str(instance)) or (
            self.decisions.lending.has_loans(instance) and time.monotonic() < leaves_until_s
        ):
            self._take_long_away(instance, others_first_until_s)
            if deadline is not None and time.monotonic() > deadline:
                num_left = len(self._arbiter.sequences_of(str(instance)))
                raise InvalidOperation(
                    f"instance {instance} still has {num_left} sequences after {timeout_s:g} s; "
                    "it drains on, and drain() may be called again"
                )
            await asyncio.sleep(_TICK_S)

    def _take_long_away(self, instance: int, others_first_until_s: float) -> None:
        """Have what does not move from an instance that drains go on elsewhere, computed again, if
        there may be room for it: once all else has moved, unless that takes long."""
        if self._members.link(instance) is None:  # it has died meanwhile
            return
        left = set(self._arbiter.sequences_of(str(instance)))
        long = left & self._members.of(instance).long_requests
        if not long or (left - long and time.monotonic() < others_first_until_s):
            return
        others = [m for m in self._members.now() if m.id != instance and not m.is_draining]
        longest = longest_of(others)
        for sequence in self._arbiter.unfinished:
            num_tokens = len(sequence.spec.prompt_token_ids) + len(sequence.output_token_ids)
            if sequence.key in long and num_tokens <= longest:
                self._arbiter.take_away(sequence.key)
        self.decisions.place_orphans()
        self._send()

    async def _ask_all(self, question: Question, *about: str) -> list[int | MemoryMap | None]:
        asked = (self._ask_member(member, question, *about) for member in self._members.now())
        return list(await asyncio.gather(*asked))

    async def _ask_member(
        self, member: Member, question: Question, *about: str
    ) -> int | MemoryMap | None:
        link = self._members.link(member.id)
        try:
            return None if link is None else await link.ask(question, *about)
        except EngineDied:
            if member.is_draining:  # it was to end, and has
                return None
            raise

    async def _ask_one(
        self, instance: int, question: Question, *about: str
    ) -> int | MemoryMap | None:
        self._members.of(instance)
        link = self._members.link(instance)
        assert link is not None
        return await link.ask(question, *about)

    async def _end_one(self, instance: int, why: Ending) -> None:
        self._members.remove(instance, why)
        self._leaving.discard(instance)
        try:
            await asyncio.to_thread(self._kill, instance)
        except RuntimeError:  # this process ends, and begins nothing beside any more
            self._kill(instance)
        self._bury(instance)

    async def _end(self, error: VkvError) -> None:
        for member in self._members.all():
            self._members.remove(member.id, "closed")
        self._fail_all(error)
        await asyncio.gather(*self._burials, return_exceptions=True)
        for futures in self._moved.values():
            for future in futures:
                future.cancel()


def _aborted(spec: RequestSpec) -> list[StepOutput]:
    return [
        StepOutput(request_id=spec.request_id, index=index, finish_reason="abort")
        for index in range(spec.params.n)
    ]
