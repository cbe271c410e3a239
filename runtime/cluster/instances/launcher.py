"""Starts and ends instances on Ray."""

import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....vmem.errors import InvalidConfig, InvalidOperation
from .actor import InstanceActor, InstanceOrder

_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes: no tokens, keys or values go through it


class Launcher:
    """Instances as actors of Ray: of a cluster of its own, or of one that is there.

    Args:
        address: of a Ray cluster to join, as of `ray.init`; None to start one here, which ends
            with this object.

    Raises InvalidConfig if Ray is not installed.
    """

    def __init__(self, address: str | None = None) -> None:
        self._ray = _import_ray()
        self._owns_ray = not self._ray.is_initialized()
        self._folder = tempfile.TemporaryDirectory(prefix="vkv-cluster-")  # nobody else may look in
        self._actors: dict[int, Any] = {}
        self._pids: dict[int, int] = {}
        if self._owns_ray:
            local: dict[str, Any] = {} if address else {"object_store_memory": _OBJECT_STORE_BYTES}
            self._ray.init(
                address=address or "local",  # or one that is there by chance would be joined
                include_dashboard=None if address else False,
                log_to_driver=False,
                **local,
            )

    def path(self, instance: int) -> str:
        """Of an instance's socket."""
        return str(Path(self._folder.name) / str(instance))

    def begin(
        self,
        instance: int,
        *,
        model: str | None,
        device: str,
        dtype: str,
        options: dict[str, Any],
        threads: int | None,
    ) -> None:
        """Begin to start an instance, beside others."""
        order = InstanceOrder(
            model=model,
            device=device,
            dtype=dtype,
            options=options,
            path=self.path(instance),
            threads=threads,
        )
        actor = self._ray.remote(InstanceActor).options(
            num_cpus=0, max_restarts=0, scheduling_strategy=self._here()
        )
        self._actors[instance] = actor.remote(order)

    def _here(self) -> Any:
        """On this machine, whose sockets and pages they share."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = self._ray.get_runtime_context().get_node_id()
        return NodeAffinitySchedulingStrategy(node, soft=False)

    def wait(self, instance: int) -> int:
        """Wait until an instance has loaded its model; returns its process's id.

        Raises what loading raised, or InvalidOperation if its process ended.
        """
        try:
            pid, failure = self._ray.get(self._actors[instance].ready.remote())
        except self._ray.exceptions.RayError as error:
            raise InvalidOperation(f"an instance did not start: {error}") from error
        if failure is not None:
            raise failure.error()
        self._pids[instance] = pid
        return pid

    def kill(self, instance: int) -> None:
        """End an instance at once, also one that is stopped. Once this returns it does no harm."""
        actor, pid = self._actors.pop(instance, None), self._pids.pop(instance, None)
        if pid is not None:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        if actor is not None:
            with suppress(Exception):  # Ray may have noticed by itself
                self._ray.kill(actor)
        for path in (self.path(instance), f"{self.path(instance)}.kv"):
            Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        """End all instances, and Ray if it was started here. Closing twice is harmless."""
        for instance in list(self._actors):
            self.kill(instance)
        if self._owns_ray:
            self._owns_ray = False
            self._ray.shutdown()
        self._folder.cleanup()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InvalidConfig(
            "instances are actors of Ray, which is missing: pip install 'vkv[cluster]'"
        ) from error
    return ray
