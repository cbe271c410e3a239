"""How many instances there are: started, drained and ended."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ...vmem.errors import InvalidConfig, InvalidOperation, VkvError
from .instances.launcher import Launcher
from .policies import drained_first
from .router import Router
from .snapshot import Role
from .stats import Member

_MEET_S = 60.0  # for an instance that is ready to say what it is

_log = logging.getLogger(__name__)


class Fleet:
    """Starts instances and ends them, for whoever asks: users, policies, signals. For any thread.

    Args:
        launcher: starts their processes, and ends them.
        router: gives them work.
        order: of each instance, as of `Launcher.begin`.
    """

    def __init__(self, launcher: Launcher, router: Router, order: dict[str, Any]) -> None:
        self._launcher = launcher
        self._router = router
        self._order = order
        self._ids = itertools.count()
        self._changing = threading.RLock()  # one change at a time, which may have parts
        router.on_leaving = self._beside(self._leave)
        router.decisions.on_scale = self._beside(self._rescale)

    def start(self, roles: Sequence[Role]) -> None:
        """Start an instance for each role, all at once. If one fails none of them stays."""
        begun: list[tuple[int, Role]] = [(next(self._ids), role) for role in roles]
        try:
            for instance, _ in begun:
                self._launcher.begin(instance, **self._order)
            for instance, role in begun:
                arrived = self._launcher.wait(instance)
                member = Member(
                    id=instance,
                    role=role,
                    pid=arrived.pid,
                    node=arrived.node,
                    lends_at=arrived.lends_at,
                )
                self._router.join(member, self._launcher.connect(instance))
            self._wait_for_faces({instance for instance, _ in begun})
        except BaseException:
            for instance, _ in begun:
                self._router.end(instance, "failed")
            raise

    def drain(self, instance: int, timeout_s: float | None = None) -> None:
        """As of `Cluster.drain`."""
        with self._changing:
            others = [m for m in self._router.members() if m.id != instance and not m.is_draining]
            if not others:
                raise InvalidOperation(
                    f"instance {instance} is the only one; close the cluster, or scale it first"
                )
            self._router.begin_drain(instance)
        self._end_drained(instance, timeout_s)

    def _end_drained(self, instance: int, timeout_s: float | None = None) -> None:
        """End an instance that drains, once it is empty. Other changes need not wait for that."""
        self._router.drain(instance, timeout_s)
        self._router.end(instance, "drained")

    def scale(self, instances: int) -> None:
        """As of `Cluster.scale`."""
        for instance in self._begin_scaling(instances):
            self._end_drained(instance)

    def _begin_scaling(self, instances: int) -> Sequence[int]:
        """Start as many as are missing, or have as many as are too many drain, which are returned;
        they are to be ended."""
        if instances < 1:
            raise InvalidConfig(f"instances is {instances}; a cluster has one at least")
        with self._changing:
            members = [m for m in self._router.members() if not m.is_draining]
            if len(members) < instances:
                more: list[Role] = ["both"] * (instances - len(members))
                self.start(more)
                return ()
            leaving = drained_first(self._router.snapshot(), len(members) - instances)
            for instance in leaving:
                self._router.begin_drain(instance)
            return leaving

    def load_adapter(self, name: str, path: str) -> None:
        """As of `Cluster.load_adapter`."""
        adapters = self._order["options"]["adapters"]  # that an instance begins with
        with self._changing:
            try:
                self._router.ask("load_adapter", name, path)
            except VkvError:
                if name not in adapters:
                    with suppress(VkvError):  # where some may not have it
                        self._router.ask("unload_adapter", name)
                raise
            adapters[name] = path

    def unload_adapter(self, name: str) -> None:
        """As of `Cluster.unload_adapter`."""
        with self._changing:
            self._order["options"]["adapters"].pop(name, None)
            self._router.ask("unload_adapter", name)

    def _beside(self, act: Callable[[int], None]) -> Callable[[int], None]:
        """Does something on a thread of its own, so that the router's goes on."""

        def work(number: int) -> None:
            if not self._router.is_closed:
                act(number)

        def begin(number: int) -> None:
            threading.Thread(target=work, args=(number,), name="vkv-scale", daemon=True).start()

        return begin

    def _leave(self, instance: int) -> None:
        """Drain an instance that was told to end."""
        try:
            self.drain(instance)
        except VkvError as error:  # the last one stays, and so do its requests
            _log.warning("instance %d was told to end, and stays: %s", instance, error)

    def _rescale(self, instances: int) -> None:
        """Have as many instances as the policy wants, which may ask again while some drain."""
        try:
            done = False
            try:
                leaving = self._begin_scaling(instances)
                done = True
            finally:
                self._router.scaled(done=done)
            for instance in leaving:
                self._end_drained(instance)
        except VkvError as error:
            _log.warning("there are to be %d instances, and cannot be: %s", instances, error)

    def _wait_for_faces(self, instances: set[int]) -> None:
        deadline = time.monotonic() + _MEET_S
        while time.monotonic() < deadline:
            known = {m.id for m in self._router.members() if m.has_arrived}
            if instances <= known:
                return
            self._router.check_open()
            time.sleep(0.01)
        raise InvalidOperation(f"instances {sorted(instances)} have said nothing; try again")
