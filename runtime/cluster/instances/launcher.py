"""Starts and ends instances on Ray."""

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....vmem.errors import InvalidConfig, InvalidOperation
from ....vmem.process import ProcessOwner
from ...link.addresses import Place
from .actor import FRONT_END, Arrived, InstanceActor, InstanceOrder
from .caretaker import Caretaker

_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes: no tokens, keys or values go through it
_MOST_PATH_BYTES = 103  # of a Unix socket, as Ray counts
_RAY_PATH_BYTES = 70  # what Ray puts behind a folder's name
_CALL_S = 10.0  # for an instance that is ready to take a connection
_END_S = 2.0  # for an instance of another node to clean up, and for its neighbours to end it
_TELL_S = 30.0  # between two words about an instance that has no place yet
_LOOK_S = 1.0  # between two looks whether all is to end
_LEAVE_S = 10.0  # for those that ask Ray, once all is to end

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Instance:
    """One that was begun: its actor, and where it is once it is ready."""

    actor: Any
    what: str
    arrived: Arrived | None = None


class Launcher:
    """Instances as actors of Ray: of a cluster of its own, or of one that is there.

    Args:
        address: of a Ray cluster to join, as of `ray.init`; its nodes share the instances out. None
            to start one here, which ends with this object.
        silence_s: as of `Place`.

    Raises InvalidConfig if Ray is not installed, or there is none of which this machine is a node.
    """

    def __init__(self, address: str | None = None, *, silence_s: float = 60.0) -> None:
        if address is not None and address.startswith("ray://"):
            raise InvalidConfig(
                f"address is {address!r}, a client's; make this machine a node of the cluster "
                "(ray start --address=HOST:PORT) and use 'auto'"
            )
        self._ray = _import_ray()
        self._owns_ray = not self._ray.is_initialized()
        self._is_alone = address is None
        self._owner = ProcessOwner("this cluster")
        self._asking = threading.Condition()
        self._num_asking = 0  # threads that ask Ray for something
        self._has_ended = False
        # Nobody else may look in. The caretaker removes it: a forked child that ends must not.
        self._folder = tempfile.mkdtemp(prefix="vkv-cluster-")
        self._instances: dict[int, _Instance] = {}
        self._ending: list[threading.Thread] = []
        try:
            self._caretaker = Caretaker(self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        try:
            self._place = self._meet_ray(address, silence_s)
        except BaseException:
            self._caretaker.close()
            raise

    def _meet_ray(self, address: str | None, silence_s: float) -> Place:
        """Start a Ray cluster or join one; where this process is in it."""
        if self._owns_ray:
            self._begin_ray(address)
        return Place(
            node=self._ray.get_runtime_context().get_node_id(),
            secret=secrets.token_bytes(32),
            silence_s=silence_s,
        )

    def _begin_ray(self, address: str | None) -> None:
        try:
            self._ray.init(
                address=address or "local",  # or one that is there by chance would be joined
                include_dashboard=None if address else False,
                log_to_driver=False,
                **({} if address else _local(self._folder)),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address is None:
                raise
            raise InvalidConfig(
                f"no Ray cluster is joined at address {address!r} ({error}); make this machine one "
                "of its nodes (ray start), or leave the address out"
            ) from error

    def path(self, instance: int) -> str:
        """Of the socket of an instance on this node."""
        return str(Path(self._folder) / str(instance))

    @contextmanager
    def _asks_ray(self) -> Iterator[None]:
        """Ray is asked meanwhile, and so stays: once it is shut down, whoever asks it for something
        would start another.

        Raises InvalidOperation after the end.
        """
        with self._asking:
            if self._has_ended:
                raise InvalidOperation("this cluster has been closed; create another")
            self._num_asking += 1
        try:
            yield
        finally:
            with self._asking:
                self._num_asking -= 1
                self._asking.notify_all()

    # -- what nodes have -----------------------------------------------------------------------

    def share(self, device: str, instances: int) -> dict[str, Any]:
        """What each of so many instances gets of the nodes that take them: `threads` of PyTorch,
        and on a CPU `memory_share` of a node's memory, unless that is known here.

        Raises InvalidConfig if there are fewer GPUs than instances that need one.
        """
        if self.wants_gpu(device):
            num_gpus = int(sum(node["Resources"].get("GPU", 0) for node in self._nodes()))
            if num_gpus < instances:
                raise InvalidConfig(
                    f"instances is {instances}, and each needs a GPU, of which Ray has {num_gpus}; "
                    "use fewer, or device='cpu'"
                )
            return {"threads": None, "memory_share": None}
        if self._is_alone:
            each = max(1, len(os.sched_getaffinity(0)) // instances)
            return {"threads": each, "memory_share": None}
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._nodes()]
        cores = [count for count in cores if count] or [1]
        a_node = math.ceil(instances / len(cores))
        return {"threads": max(1, min(cores) // a_node), "memory_share": 0.5 / a_node}

    def wants_gpu(self, device: str) -> bool:
        """Whether each instance needs a GPU. Raises InvalidConfig for a certain one."""
        if device == "auto" and not self._is_alone:  # this machine may be the one without
            return any("GPU" in node["Resources"] for node in self._nodes())
        if device == "auto":
            return torch.cuda.is_available()
        if device.startswith("cuda:"):
            raise InvalidConfig(
                f"device is {device!r}, but an instance has the GPU that Ray gives it; use 'cuda'"
            )
        return device == "cuda"

    def _nodes(self) -> list[Any]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    # -- beginning -----------------------------------------------------------------------------

    def begin(
        self,
        instance: int,
        *,
        model: str | None,
        device: str,
        dtype: str,
        options: dict[str, Any],
        threads: int | None,
        memory_share: float | None = None,
        lends: bool | None = None,
    ) -> None:
        """Begin to start an instance, beside others."""
        order = InstanceOrder(
            model=model,
            device=device,
            dtype=dtype,
            options=options,
            path=self.path(instance),
            threads=threads,
            memory_share=memory_share,
            front_node=self._place.node,
            is_alone=self._is_alone,
            secret=self._place.secret,
            silence_s=self._place.silence_s,
            lends=lends,
        )
        with self._asks_ray():
            needs, what = self._needs(device, threads)
            actor = self._ray.remote(InstanceActor).options(max_restarts=0, **needs)
            self._instances[instance] = _Instance(actor=actor.remote(order), what=what)

    def _needs(self, device: str, threads: int | None) -> tuple[dict[str, Any], str]:
        """What Ray is to give an instance, and the same in words.

        Raises InvalidConfig if no node will ever have it.
        """
        needs: dict[str, Any] = {"num_cpus": 0}
        if self.wants_gpu(device):
            needs["num_gpus"] = 1
        elif not self._is_alone:
            needs["num_cpus"] = threads or 1
        what = f"{needs['num_cpus']} CPUs and {needs.get('num_gpus', 0)} GPUs"
        if self._is_alone:  # on this machine, whose sockets and pages they share
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            here = NodeAffinitySchedulingStrategy(self._place.node, soft=False)
            return {**needs, "scheduling_strategy": here}, what
        if not any(
            node["Resources"].get("CPU", 0) >= needs["num_cpus"]
            and node["Resources"].get("GPU", 0) >= needs.get("num_gpus", 0)
            for node in self._nodes()
        ):
            raise InvalidConfig(
                f"an instance needs {what}, and no node of Ray's has them; use fewer threads, or "
                "another device"
            )
        return {**needs, "scheduling_strategy": "SPREAD"}, what

    def wait(self, instance: int) -> Arrived:
        """Wait until an instance has loaded its model; returns where it is.

        Raises what loading raised, or InvalidOperation if its process ended.
        """
        with self._asks_ray():
            one = self._instances[instance]
            arrived = self._arrival(instance, one)
        if arrived.failure is not None:
            error = arrived.failure.error()
            raise error if self._is_alone else type(error)(f"on node {arrived.host}: {error}")
        one.arrived = arrived
        if arrived.node == self._place.node:
            self._caretaker.watch(arrived.pid)
        return arrived

    def _arrival(self, instance: int, one: _Instance) -> Arrived:
        there = one.actor.ready.remote()
        told_s = time.monotonic()
        while not self._ray.wait([there], timeout=_LOOK_S)[0]:
            if self._has_ended:
                raise InvalidOperation("this cluster was closed while an instance started")
            if time.monotonic() - told_s >= _TELL_S:
                told_s = time.monotonic()
                _log.warning("instance %d loads, or waits for %s on one node", instance, one.what)
        try:
            arrived: Arrived = self._ray.get(there)
        except self._ray.exceptions.RayError as error:
            raise InvalidOperation(f"an instance did not start: {error}") from error
        return arrived

    def connect(self, instance: int) -> socket.socket:
        """A connection to an instance that is ready. Raises InvalidOperation if it is not there."""
        arrived = self._instances[instance].arrived
        assert arrived is not None
        assert arrived.address is not None
        try:
            return self._place.call(arrived.address, FRONT_END, _CALL_S)
        except OSError as error:
            raise InvalidOperation(
                f"instance {instance} on node {arrived.host} is not reached at {arrived.address} "
                f"({error}); let the nodes call each other at any port"
            ) from error

    # -- ending --------------------------------------------------------------------------------

    def kill(self, instance: int) -> None:
        """End an instance at once, also one that is stopped. Once this returns it does no harm.

        On this node it is gone then. On another it is told to end, by Ray and by its neighbours,
        which is waited for only while there are any: they may share pages with it. Whatever else it
        still does, nobody listens to it, and nobody lets it write. After `close` it is gone.
        """
        with suppress(InvalidOperation), self._asks_ray():
            self._kill(instance)

    def _kill(self, instance: int) -> None:
        one = self._instances.pop(instance, None)
        if one is None:
            return
        if one.arrived is not None and one.arrived.node == self._place.node:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(one.arrived.pid, signal.SIGKILL)
        elif one.arrived is not None:
            neighbours = self._neighbours(one.arrived)
            ending = threading.Thread(
                target=self._end_elsewhere, args=(one, neighbours), name="vkv-end", daemon=True
            )
            ending.start()
            self._ending = [thread for thread in self._ending if thread.is_alive()] + [ending]
            if neighbours:
                ending.join()
            return
        with suppress(Exception):  # Ray may have noticed by itself
            self._ray.kill(one.actor)
        for path in (self.path(instance) + end for end in ("", ".kv", ".lend")):
            Path(path).unlink(missing_ok=True)

    def _kill_all(self) -> None:
        for instance in list(self._instances):
            self._kill(instance)

    def _neighbours(self, arrived: Arrived) -> list[Any]:
        return [
            other.actor
            for other in self._instances.values()
            if other.arrived is not None and other.arrived.node == arrived.node
        ]

    def _end_elsewhere(self, one: _Instance, neighbours: list[Any]) -> None:
        """Have an instance of another node killed, by Ray and by its neighbours."""
        assert one.arrived is not None
        with suppress(Exception):  # it, a neighbour or Ray may be gone by themselves
            self._ray.wait([one.actor.clean.remote()], timeout=_END_S)
        with suppress(Exception):
            self._ray.kill(one.actor)
        with suppress(Exception):
            asked = [neighbour.end_neighbour.remote(one.arrived) for neighbour in neighbours]
            if asked and not self._ray.wait(asked, timeout=_END_S)[0]:
                _log.warning("nobody on %s says that an instance has ended", one.arrived.host)

    def close(self) -> None:
        """End all instances, and Ray if it was started here. Closing twice is harmless.

        Without effect in a child of a fork: they are its parent's.
        """
        if not self._owner.is_mine:
            return
        with self._asking:
            self._has_ended = True
        self._kill_all()
        with self._asking:  # who waits for one that is gone hears of it
            self._asking.wait_for(lambda: not self._num_asking, _LEAVE_S)
        self._kill_all()  # what was begun in this moment
        for ending in self._ending:
            ending.join()
        if self._owns_ray:
            self._owns_ray = False
            self._ray.shutdown()
        self._caretaker.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _local(folder: str) -> dict[str, Any]:
    """Options of a Ray cluster of our own, whose files are in a folder that goes with it.

    They have a folder there to themselves, since Ray opens it to all users.
    """
    options: dict[str, Any] = {
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_system_config": {"worker_niceness": 0},  # by default they yield to all else that runs
    }
    own = str(Path(folder) / "ray")
    if len(own.encode()) + _RAY_PATH_BYTES <= _MOST_PATH_BYTES:
        options["_temp_dir"] = own  # else Ray's own, which it leaves behind
    return options


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InvalidConfig(
            "instances are actors of Ray, which is missing: pip install 'vkv[cluster]'"
        ) from error
    return ray
