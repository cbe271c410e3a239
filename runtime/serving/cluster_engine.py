"""A cluster's instances, as the server's front process knows one engine."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...vmem.errors import EngineDied, InvalidConfig, UsageError
from ..cluster.cluster import Cluster
from ..cluster.stats import ClusterStats, Member
from ..engine.memory.memory_map import MemoryMap
from ..engine.messages import Message
from ..engine.stats import EngineStats, together
from ..frontend.driving.sinks import Sink
from ..link.face import Face
from ..link.messages import Question
from .cluster_map import ClusterMap, ClusterMaps

_FOR_ALL = ("trim", "memory_map")


class ClusterEngine:
    """As of `EngineLink`, over instances that this process starts and ends.

    Args:
        options: of `Cluster`.

    Attributes:
        cluster: None until its instances have loaded their models.
        on_welcome: called with what they are once they have.
        on_refusal: called with why they never will.
        on_started: called when Ray is there, which takes signals for itself.
    """

    def __init__(self, **options: Any) -> None:
        self.cluster: Cluster | None = None
        self.on_welcome: Callable[[Face], None] = lambda face: None
        self.on_refusal: Callable[[UsageError], None] = lambda error: None
        self.on_started: Callable[[], None] = lambda: None
        self.is_asleep = False
        self._options = options
        self._is_closed = False
        self._moved_s = time.monotonic()
        self._num_steps = 0
        self._maps = ClusterMaps()

    async def stay_connected(self) -> None:
        """Start the instances; they need nothing more."""
        try:
            cluster = await asyncio.to_thread(Cluster, **self._options)
        except UsageError as error:
            self.on_refusal(error)
            return
        if self._is_closed:  # meanwhile
            await asyncio.to_thread(cluster.close)
            return
        self.cluster = cluster
        self.on_started()
        face = cluster.face
        num_places = sum(m.face.max_seqs for m in cluster.router.members_now() if m.face)
        self.on_welcome(dataclasses.replace(face, max_seqs=num_places))

    def close(self) -> None:
        """End all instances."""
        self._is_closed = True
        if self.cluster is not None:
            self.cluster.close()

    # -- what there is -------------------------------------------------------------------------

    @property
    def members(self) -> Sequence[Member]:
        """The instances that there are now."""
        return () if self.cluster is None else self.cluster.router.members_now()

    def cluster_now(self) -> ClusterStats | None:
        """As of `Instances`: for metrics."""
        return None if self.cluster is None else self.cluster.router.stats_now()

    @property
    def error(self) -> BaseException | None:
        """As of `EnginePort`."""
        return None if self.cluster is None else self.cluster.router.error

    @property
    def stats(self) -> EngineStats | None:
        """Of all instances together."""
        known = [member.stats for member in self.members if member.stats is not None]
        return together(known) if known else None

    @property
    def is_ready(self) -> bool:
        """As of `EngineLink`."""
        return self.cluster is not None and self.error is None and not self._is_closed

    @property
    def has_died(self) -> bool:
        """As of `EngineLink`: no instance is left."""
        return self.error is not None

    @property
    def stuck_s(self) -> float:
        """As of `EngineLink`; it counts from one look to the next."""
        stats, now_s = self.stats, time.monotonic()
        is_moving = stats is not None and stats.num_steps != self._num_steps
        if stats is None or is_moving or not stats.num_running + stats.num_waiting:
            self._num_steps = 0 if stats is None else stats.num_steps
            self._moved_s = now_s
        return now_s - self._moved_s

    async def memory_map(self) -> MemoryMap:
        """The slots of all instances, one's behind the other's."""
        return (await self.cluster_map()).map

    async def cluster_map(self) -> ClusterMap:
        """The same, and whose they are. Raises EngineDied while no instance answers."""
        router = self._there().router
        seen, stats = await asyncio.to_thread(lambda: (router.maps(), router.stats()))
        drawn = self._maps.draw(seen, stats)
        if drawn is None:
            raise EngineDied("no instance is there")
        return drawn

    async def ask(self, question: Question) -> int | MemoryMap | None:
        """As of `EngineLink`. Raises InvalidConfig for what instances do not do together."""
        if question not in _FOR_ALL:
            raise InvalidConfig(
                f"a server of several instances does not {question}; scale it instead"
            )
        freed = await asyncio.to_thread(self._there().router.ask, question)
        return sum(one for one in freed if isinstance(one, int))

    def _there(self) -> Cluster:
        if self.cluster is None:
            raise EngineDied("the instances are not there yet; try again")
        return self.cluster

    # -- as of `EnginePort` --------------------------------------------------------------------

    def check_process(self) -> None:
        """As of `EnginePort`."""
        if self.cluster is not None:
            self.cluster.router.check_process()

    def check_open(self) -> None:
        """As of `EnginePort`."""
        self._there().router.check_open()

    def submit(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        self._there().router.submit(sinks)

    def abandon(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        if self.cluster is not None:
            self.cluster.router.abandon(sinks)

    def post(self, message: Message) -> None:
        """As of `EnginePort`."""
        if self.cluster is not None:
            self.cluster.router.post(message)

    # -- orders --------------------------------------------------------------------------------

    async def cluster_stats(self) -> ClusterStats:
        """As of `Cluster.stats`."""
        return await asyncio.to_thread(self._there().stats)

    async def drain(self, instance: int) -> None:
        """As of `Cluster.drain`. Raises as it does."""
        await asyncio.to_thread(self._there().drain, instance)

    async def scale(self, instances: int) -> None:
        """As of `Cluster.scale`. Raises as it does."""
        await asyncio.to_thread(self._there().scale, instances)
