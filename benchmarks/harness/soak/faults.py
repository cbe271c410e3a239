"""What is done to a cluster while it serves: moves, pauses, kills, more and fewer instances and
less memory.

Three threads do it. One moves requests; one does what takes a moment; one does what an instance
ends of, a single instance at a time, and has it replaced. The eldest instance is spared that, so
that what it holds can be compared over a long time.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ...runtime.cluster.cluster import Cluster
from ...runtime.cluster.stats import Member
from ...vmem.errors import EngineDied, InvalidOperation, VkvError
from .crew import at_work
from .left_over import wait_until
from .options import SoakOptions
from .phases import LIVENESS_S, Phase
from .tally import Tally

_GONE_S = LIVENESS_S + 30.0  # for the end of an instance to be noticed
_LEAST_SHARE = 0.8  # of an instance's memory, to which it may be brought down
_MOVES_S = (0.05, 0.4)  # between two moves
_SOFT_S = (0.3, 2.0)  # between two of these
_HARD_S = (2.0, 8.0)
_ENDS_S = 150.0  # for the last fault of each thread
_SPARE = "spare"


Fault = Callable[[random.Random], None]


class Faults:
    """What is done to a cluster.

    Args:
        phase: that the cluster is of.
        chance: draws all of it.

    Attributes:
        num_killed: instances that were killed, or stopped for good.
    """

    def __init__(
        self,
        cluster: Cluster,
        options: SoakOptions,
        phase: Phase,
        chance: random.Random,
        tally: Tally,
    ) -> None:
        self.num_killed = 0
        self._cluster, self._size, self._tally = cluster, options.instances, tally
        self._phase, self._chance = phase, chance
        self._is_over = threading.Event()
        self._doomed: set[int] = set()  # are not to go on after a pause
        self._signalling = threading.Lock()
        soft: dict[str, tuple[Fault, ...]] = {
            "pauses": (self._pause,),
            "limits": (self._lower_limit, self._trim),
        }
        hard: dict[str, tuple[Fault, ...]] = {
            "kills": (self._kill, self._stop, self._leave),
            "scaling": (self._drain, self._scale),
            "adapters": (self._change_adapters,),
        }
        if self._size < 3:  # one that is left alone could not take what the others had
            del hard["kills"], hard["scaling"]
        self._works: list[tuple[list[Fault], tuple[float, float]]] = [
            ([self._move] if options.has("moves") else [], _MOVES_S),
            ([one for part, some in soft.items() if options.has(part) for one in some], _SOFT_S),
            ([one for part, some in hard.items() if options.has(part) for one in some], _HARD_S),
        ]

    @contextmanager
    def injected(self) -> Iterator[None]:
        """While it lasts; then all instances are there, and have their memory."""
        self._cluster.scale(self._size)
        threads = [
            threading.Thread(
                target=self._do,
                args=(faults, pause_s, random.Random(self._chance.random())),
                name=f"vkv-soak-{faults[0].__name__}",
                daemon=True,
            )
            for faults, pause_s in self._works
            if faults
        ]
        with at_work(threads, self._is_over, _ENDS_S, self._tell_late):
            yield

    def _tell_late(self, thread: threading.Thread) -> None:
        self._tally.lost(f"{thread.name} has not ended after {_ENDS_S:g} s")

    def _do(
        self, faults: Sequence[Fault], pause_s: tuple[float, float], chance: random.Random
    ) -> None:
        """One of them after another, in a random order in which each comes once a turn."""
        left: list[Fault] = []
        while not self._is_over.wait(chance.uniform(*pause_s)):
            left = left or chance.sample(faults, len(faults))
            fault = left.pop()
            try:
                fault(chance)
            except (InvalidOperation, EngineDied, ProcessLookupError):
                continue  # what it was for has just ended
            except VkvError as error:
                self._tally.lost(f"{fault.__name__} raised {type(error).__name__}: {error}")
            except BaseException as error:
                self._tally.lost(f"{fault.__name__} raised {error!r}")
                raise

    # -- of a moment -----------------------------------------------------------------------------

    def _move(self, chance: random.Random) -> None:
        """Move some request to some other instance."""
        requests = [pair for pair in self._cluster.stats().requests.items() if pair[1] is not None]
        there = [member.id for member in self._members()]
        if not requests or len(there) < 2:
            return
        (request_id, index), owner = chance.choice(requests)
        target = chance.choice([one for one in there if one != owner])
        self._cluster.migrate(request_id, target, index=index)

    def _pause(self, chance: random.Random) -> None:
        """Stop an instance for a while, shorter than silence counts."""
        victim = chance.choice(self._members())
        os.kill(victim.pid, signal.SIGSTOP)
        self._tally.fault("pause")
        time.sleep(chance.choice([0.05, 0.2, 1.0]))
        with self._signalling:
            if victim.id not in self._doomed:
                os.kill(victim.pid, signal.SIGCONT)

    def _trim(self, chance: random.Random) -> None:
        """Have all instances give up what only finished requests hold."""
        self._cluster.router.ask("trim")
        self._tally.fault("trim")

    def _lower_limit(self, chance: random.Random) -> None:
        """Give an instance less memory for a while."""
        victim = chance.choice(self._members())
        share = chance.uniform(_LEAST_SHARE, 1.0)
        self._cluster.limit_memory(int(share * self._phase.pool_bytes), instance=victim.id)
        self._tally.fault("less memory")
        try:
            self._is_over.wait(chance.uniform(0.5, 3.0))
        finally:
            self._cluster.limit_memory(None, instance=victim.id)

    # -- what an instance ends of ----------------------------------------------------------------

    def _kill(self, chance: random.Random) -> None:
        self._end(self._victim(chance), signal.SIGKILL, "kill")

    def _stop(self, chance: random.Random) -> None:
        """Stop an instance for good: it answers nothing, and is taken for dead."""
        self._end(self._victim(chance), signal.SIGSTOP, "stop")

    def _end(self, victim: Member, how: signal.Signals, fault: str) -> None:
        with self._signalling:
            self._doomed.add(victim.id)
            os.kill(victim.pid, how)
        self.num_killed += 1
        self._replace(victim, fault)

    def _leave(self, chance: random.Random) -> None:
        """Tell an instance to end, as an operator does."""
        victim = self._victim(chance)
        os.kill(victim.pid, signal.SIGTERM)
        self._replace(victim, "told to end")

    def _drain(self, chance: random.Random) -> None:
        victim = self._victim(chance)
        try:
            self._cluster.drain(victim.id, timeout_s=_GONE_S)
        except InvalidOperation as error:
            self._tally.lost(f"an instance that is drained stays: {error}")
        self._replace(victim, "drain")

    def _scale(self, chance: random.Random) -> None:
        """One more for a while."""
        self._cluster.scale(self._size + 1)
        self._tally.fault("scaled up")
        self._is_over.wait(chance.uniform(0.5, 2.0))
        self._cluster.scale(self._size)
        self._tally.fault("scaled down")

    def _change_adapters(self, chance: random.Random) -> None:
        """One more adapter for a while, in all instances, which nobody asks for."""
        folder = chance.choice(list(self._phase.models.adapters.values()))
        self._cluster.load_adapter(_SPARE, folder)
        self._cluster.unload_adapter(_SPARE)
        self._tally.fault("adapter loaded and unloaded")

    def _replace(self, victim: Member, fault: str) -> None:
        """Wait until an instance is gone, and have another started."""
        self._tally.fault(fault)
        gone = wait_until(lambda: victim.id not in {m.id for m in self._all()}, _GONE_S)
        if not gone:
            self._tally.lost(f"instance {victim.id} is there still: {fault}")
        if (error := self._cluster.router.error) is not None:
            self._tally.lost(f"{fault} of instance {victim.id}: {error}")
            return
        self._cluster.scale(self._size)

    def _victim(self, chance: random.Random) -> Member:
        """One that may end: not the eldest, and of prompts' or tokens' instances not the last."""
        members = sorted(self._members(), key=lambda member: member.id)[1:]
        roles = [member.role for member in self._members()]
        able = [m for m in members if m.role == "both" or roles.count(m.role) > 1]
        return chance.choice(able or members)

    def _members(self) -> list[Member]:
        return [m for m in self._all() if not m.is_draining]

    def _all(self) -> list[Member]:
        return self._cluster.router.members_now()
