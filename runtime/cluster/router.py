"""The way to several engines: each request to one of them, and to another when that is better.

It is an `EnginePort`, so that whatever hands requests to one engine can hand them to a cluster. One
thread with an event loop hears all instances; an `Arbiter` says whose word counts; a policy says
where requests go and which of them move.
"""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ...vmem.errors import EngineDied, InvalidOperation, VkvError
from ...vmem.process import ProcessOwner
from ..engine.memory.memory_map import MemoryMap
from ..engine.messages import Abort, Finish, Message, SetPriority
from ..engine.migration.arbiter import Arbiter, MigrationCounts
from ..engine.migration.handshake import Stages
from ..engine.migration.messages import Answer as MoveAnswer
from ..frontend.driving.sinks import Sink, give
from ..link.face import Face
from ..link.messages import Pulse, Question
from ..request.spec import RequestSpec, SequenceKey
from ..request.step_output import StepOutput
from .instances.instance_link import InstanceLink
from .members import Member, Members
from .policies import ClusterPolicy
from .snapshot import ClusterSnapshot, Newcomer, Role

_TICK_S = 0.02  # between looks at moves under way
_DECIDE_S = 0.1  # between questions to the policy

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


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
        on_scale: likewise, with how many instances the policy wants; `scaled` answers it.

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
        self.on_scale: Callable[[int], None] = lambda instances: self.scaled()
        self._policy = policy
        self._kill = kill
        self._max_moves = max_moves
        self._liveness_s = liveness_s
        self._owner = ProcessOwner("this cluster")
        self._arbiter = Arbiter(stages=stages)
        self._members = Members(self._arbiter)
        self._sinks: weakref.WeakValueDictionary[str, Sink] = weakref.WeakValueDictionary()
        self._held: deque[RequestSpec] = deque()  # that no instance takes yet
        self._moved: dict[SequenceKey, list[asyncio.Future[None]]] = {}
        self._num_dispatched = 0
        self._leaving: set[int] = set()
        self._is_scaling = True  # until the first instances are there
        self._decided_s = 0.0
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vkv-router", daemon=True)
        self._thread.start()

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
        self._call(self._begin, [sink.spec for sink in sinks])
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
        self._call(self._tell, message)

    # -- the instances, from any thread --------------------------------------------------------

    def join(self, instance: int, path: str, *, role: Role, pid: int) -> None:
        """An instance is ready: connect to it, and give it work from now on."""
        self._ask(self._join(instance, path, role, pid))

    def drain(self, instance: int, timeout_s: float | None = None) -> None:
        """Give an instance nothing more, and wait until all that it has moved or ended.

        Raises InvalidOperation if it is unknown, or not empty after `timeout_s`: it drains on then.
        """
        self._ask(self._drain(instance, timeout_s))

    def end(self, instance: int) -> None:
        """End an instance for good; what it still has goes on elsewhere, computed again."""
        self._ask(self._end_one(instance))

    def scaled(self) -> None:
        """What `on_scale` asked for is done, or cannot be: the policy may ask again."""
        self._call(self._has_scaled)

    def migrate(self, key: SequenceKey, instance: int) -> bool:
        """Move a sequence; waits until that is over. True if it is there, or ended there.

        Raises InvalidOperation if it is not unfinished, is there or on its way, or if the instance
        takes nothing.
        """
        return self._ask(self._migrate(key, instance))

    def members(self) -> list[Member]:
        """The instances, as they are now."""
        return self._ask(self._copied(self._members.all))

    def ask(self, question: Question, *about: str) -> list[int | MemoryMap | None]:
        """Have all instances do something between steps; what came of it, in their order.

        Raises what it raises in any of them, EngineDied if one is gone meanwhile.
        """
        return self._ask(self._ask_all(question, *about))

    def members_now(self) -> list[Member]:
        """The instances, without waiting for the router's thread; not to be changed."""
        return self._members.now()

    def snapshot(self) -> ClusterSnapshot:
        """The cluster as its policy sees it."""
        return self._ask(self._copied(self._picture))

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._is_closed

    def counts(self) -> MigrationCounts:
        """Migrations that are over."""
        return self._ask(self._copied(lambda: self._arbiter.counts))

    def requests(self) -> dict[SequenceKey, int | None]:
        """Unfinished sequences, and the instance that has each; None for one that waits for any."""
        return self._ask(self._copied(self._where))

    def close(self) -> None:
        """Hang up on all instances. Requests end with InvalidOperation. Closing twice is
        harmless."""
        if self._is_closed or not self._owner.is_mine:
            return
        self._is_closed = True
        self._ask(self._end(InvalidOperation("this cluster was closed while it generated")))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- between threads -----------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._tick)
        self._loop.run_forever()

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # closed in this moment, and its requests with it
            _log.debug("%s came after the end", function.__name__)

    def _ask(self, work: Coroutine[Any, Any, _T]) -> _T:
        future: Future[_T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    async def _copied(self, function: Callable[[], _T]) -> _T:
        return function()

    # -- requests ------------------------------------------------------------------------------

    def _begin(self, specs: Sequence[RequestSpec]) -> None:
        if self.error is not None:  # since they were submitted
            self._fail_all(EngineDied(str(self.error)))
            return
        self._held += specs
        self._dispatch()
        self._send()

    def _dispatch(self) -> None:
        """Give those that wait to instances, in order, as far as the policy lets them."""
        while self._held:
            spec = self._held[0]
            if spec.request_id not in self._sinks:  # nobody waits for it any more
                self._held.popleft()
                continue
            newcomer = Newcomer(
                key=(spec.request_id, 0),
                num_tokens=len(spec.prompt_token_ids),
                priority=spec.priority,
                tenant=spec.tenant,
            )
            snapshot = self._picture()
            chosen = self._policy.dispatch(snapshot, newcomer)
            if chosen is None:
                return
            self._held.popleft()
            self._num_dispatched += 1
            self._members.changed()
            self._arbiter.add(spec, str(chosen))

    def _tell(self, message: Finish | Abort | SetPriority) -> None:
        if isinstance(message, Abort):
            held = [spec for spec in self._held if spec.request_id == message.request_id]
            for spec in held:
                self._held.remove(spec)
                self._route(_aborted(spec))
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

    def _where(self) -> dict[SequenceKey, int | None]:
        found: dict[SequenceKey, int | None] = {
            (spec.request_id, index): None for spec in self._held for index in range(spec.params.n)
        }
        for sequence in self._arbiter.unfinished:
            found[sequence.key] = None if sequence.owner is None else int(sequence.owner)
        return found

    # -- what instances say: as of `Listener` --------------------------------------------------

    def on_outputs(self, instance: int, outputs: list[StepOutput]) -> None:
        """New tokens of some requests."""
        self._route(self._arbiter.accept(outputs))
        self._members.changed()
        if self._held:
            self._dispatch()
        if self._members.is_apart:  # what has its first token is to be handed over soon
            self._decided_s = 0.0
        self._send()

    def on_answer(self, instance: int, answer: MoveAnswer) -> None:
        """A step of a migration."""
        self._arbiter.on(answer)
        self._route(self._arbiter.accept())
        self._note_moves()
        self._send()

    def on_pulse(self, instance: int, pulse: Pulse) -> None:
        """What it holds, or that it was told to end."""
        self._members.note(instance, pulse)
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
        self._kill(instance)  # first: what it would say later must never come
        self._members.remove(instance)
        if not self._members.now():
            self.error = EngineDied(f"no instance is left: the last one, {instance}, {why}")
        self._bury(instance)

    def _bury(self, instance: int) -> None:
        """An instance is no more."""
        self._arbiter.died(str(instance))
        self._route(self._arbiter.accept())
        self._note_moves()
        if self.error is not None:
            self._fail_all(EngineDied(str(self.error)))
        elif self._members.now():
            self._place_orphans()
        self._send()

    def _place_orphans(self) -> None:
        for orphan in self._arbiter.take_orphans():
            snapshot = self._picture()
            newcomer = Newcomer(
                key=orphan.key, num_tokens=len(orphan.token_ids), priority=orphan.spec.priority
            )
            chosen = self._policy.dispatch(snapshot, newcomer)
            if chosen is None:  # backpressure is for newcomers: these were let in
                able = snapshot.working or snapshot.instances
                chosen = min(able, key=lambda i: i.num_requests).id
            self._arbiter.resume(orphan, str(chosen))
            self._members.changed()

    def _fail_all(self, error: VkvError) -> None:
        self._held.clear()
        self._arbiter.take_orphans()
        for reference in self._sinks.valuerefs():
            sink = reference()
            if sink is not None:
                sink.fail(error)
        self._sinks.clear()

    def _picture(self) -> ClusterSnapshot:
        return self._members.snapshot(num_dispatched=self._num_dispatched)

    # -- from time to time ---------------------------------------------------------------------

    def _tick(self) -> None:
        self._loop.call_later(_TICK_S, self._tick)  # first: a policy of the user's own may raise
        now_s = time.monotonic()
        if now_s - self._decided_s >= _DECIDE_S:
            self._decided_s = now_s
            self._decide()
        self._send()

    def _decide(self) -> None:
        """Ask the policy how many instances there should be, what for, and which requests move."""
        self._dispatch()
        snapshot = self._picture()
        wanted = self._policy.scale(snapshot)
        if wanted != len(snapshot.working) and not self._is_scaling:
            self._is_scaling = True
            self._members.scaled_s = snapshot.time_s
            self.on_scale(wanted)
        if len(snapshot.instances) < 2 or not self._arbiter.has_some:
            return
        for instance, role in self._policy.roles(snapshot).items():
            self._members.of(instance).role = role
            self._members.switched_s = snapshot.time_s
            self._members.changed()
        for move in self._policy.migrations(snapshot):
            if self._arbiter.num_moving >= self._max_moves:
                break
            try:
                self._arbiter.migrate(move.key, str(move.target))
            except InvalidOperation as error:  # it has just ended
                _log.debug("%s does not move: %s", move, error)

    def _has_scaled(self) -> None:
        self._is_scaling = False
        self._members.scaled_s = time.monotonic()

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

    async def _join(self, instance: int, path: str, role: Role, pid: int) -> None:
        link = InstanceLink(instance, path, self, liveness_s=self._liveness_s)
        self._members.add(Member(id=instance, role=role, pid=pid), link)

    async def _migrate(self, key: SequenceKey, instance: int) -> bool:
        member = self._members.of(instance)
        if member.is_draining:
            raise InvalidOperation(f"instance {instance} drains; move to another")
        self._arbiter.migrate(key, str(instance))
        future = self._loop.create_future()
        self._moved.setdefault(key, []).append(future)
        before = self._arbiter.counts.moved
        self._send()
        await future
        owner = self._arbiter.owner(key)
        return owner == str(instance) or (owner is None and self._arbiter.counts.moved > before)

    async def _drain(self, instance: int, timeout_s: float | None) -> None:
        self._members.of(instance).is_draining = True
        self._members.changed()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._arbiter.involves(str(instance)):
            if deadline is not None and time.monotonic() > deadline:
                num_left = len(self._arbiter.sequences_of(str(instance)))
                raise InvalidOperation(
                    f"instance {instance} still has {num_left} sequences after {timeout_s:g} s; "
                    "it drains on, and drain() may be called again"
                )
            await asyncio.sleep(_TICK_S)

    async def _ask_all(self, question: Question, *about: str) -> list[int | MemoryMap | None]:
        links = [self._members.link(member.id) for member in self._members.now()]
        return list(await asyncio.gather(*(link.ask(question, *about) for link in links if link)))

    async def _end_one(self, instance: int) -> None:
        self._members.remove(instance)
        await asyncio.to_thread(self._kill, instance)
        self._bury(instance)

    async def _end(self, error: VkvError) -> None:
        for member in self._members.all():
            self._members.remove(member.id)
        self._fail_all(error)
        for futures in self._moved.values():
            for future in futures:
                future.cancel()


def _aborted(spec: RequestSpec) -> list[StepOutput]:
    return [
        StepOutput(request_id=spec.request_id, index=index, finish_reason="abort")
        for index in range(spec.params.n)
    ]
