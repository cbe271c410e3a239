"""Several engines as one: `LLM`'s verbs over a cluster of instances."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch

from ...vmem import janitor, linux
from ...vmem.errors import InvalidConfig, InvalidOperation, InvalidSamplingParams, VkvError
from ..adapters.adapters import known_names
from ..engine.config import EngineConfig
from ..engine.migration.handshake import Stages
from ..engine.stats import together
from ..execution.grammars import Grammars
from ..frontend.chat_template import ChatOptions
from ..frontend.front_end import FrontEnd
from ..frontend.progress import BatchProgress
from ..frontend.prompts import (
    Message,
    Prompt,
    Standing,
    adapters_for_each,
    are_conversations,
    as_batch,
    params_for_each,
    refuse_conversation,
    standings,
)
from ..frontend.text_stream import RequestText, StreamDelta
from ..link.face import Face
from ..request.outputs import RequestOutput
from ..request.sampling_params import SamplingParams
from ..request.spec import AdapterKey, SequenceKey
from .instances.launcher import Launcher
from .members import Member
from .policies import CLUSTER_POLICIES, ClusterPolicy, drained_first
from .router import Router
from .snapshot import Role
from .waiting import Waiting

_log = logging.getLogger(__name__)

_ROLES = ("prefill", "decode", "both")
_MEET_S = 60.0  # for an instance that is ready to say what it is


@dataclass(frozen=True, kw_only=True)
class ClusterStats:
    """What a cluster has done, and what its instances hold.

    Attributes:
        num_migrations: sequences that moved to another instance and went on there.
        num_stayed: migrations that were begun and came to nothing; their sequences went on.
        num_recomputed: sequences that were computed again, since their instance had died.
        instances: as each was a moment ago.
        requests: unfinished sequences, and the instance that has each.
    """

    num_migrations: int
    num_stayed: int
    num_recomputed: int
    instances: tuple[Member, ...]
    requests: Mapping[SequenceKey, int | None] = field(default_factory=dict)


class Cluster:
    """A model on several instances, each an engine in a process of its own. For any thread.

    Ray starts and watches the processes. Requests go to instances as the policy says, and move
    between them while they run, with not a token lost, repeated or changed. If an instance dies,
    its requests go on elsewhere, computed again from what they had.

    Args:
        model: a checkpoint folder, a hub id, or None for the built-in model.
        instances: how many.
        roles: "prefill", "decode" or "both", one an instance; None for all of them "both".
        policy: a name of `CLUSTER_POLICIES`, or an object of your own; None for "llumnix", or where
            there are roles "disaggregated".
        address: of a Ray cluster on this machine to join, as of `ray.init`; None to start one.
        threads: of each instance, on a CPU; None to part the processors evenly.
        stages: how sequences are copied where their pages cannot change hands.
        liveness_s: an instance that answers nothing for so long counts as dead, and is killed. It
            answers between two steps, so it must be more than the longest of them.
        device, dtype, options: as of `LLM`, for each instance.

    Attributes:
        policy: decides where requests go, and which of them move.
        router: the way to the instances, for a server.

    One class, since it is the front door: every method is a verb or a fact for its users.

    Raises a `UsageError` that names the value and the remedy; what an instance's model raises.

    Example:
        >>> with Cluster(instances=2) as cluster:
        ...     print(cluster.generate("hello", SamplingParams(max_tokens=8))[0].outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        instances: int = 2,
        roles: Sequence[Role] | None = None,
        policy: str | ClusterPolicy | None = None,
        address: str | None = None,
        threads: int | None = None,
        stages: Stages | None = None,
        liveness_s: float = 60.0,
        device: str = "auto",
        dtype: str = "auto",
        **options: Any,
    ) -> None:
        roles = _checked_roles(roles, instances)
        EngineConfig(**options)  # to refuse it here, and not in every process
        self.policy = _policy(policy, roles)
        cores = len(os.sched_getaffinity(0))
        self._order: dict[str, Any] = {
            "model": _model(model),
            "device": device,
            "dtype": dtype,
            "options": _options(options, instances, device),
            "threads": threads or max(1, cores // instances),
        }
        self._ids = iter(range(1 << 62))
        self._scaling = threading.Lock()  # one change of the instances at a time
        self._launcher = Launcher(address)
        self.router = Router(self.policy, self._launcher.kill, stages=stages, liveness_s=liveness_s)
        self.router.on_leaving = _beside(weakref.ref(self), Cluster._leave)
        self.router.on_scale = _beside(weakref.ref(self), Cluster._rescale)
        weakref.finalize(self, janitor.later, _closing(self.router, self._launcher)).atexit = False
        try:
            self._start(roles)
            self.router.scaled()
            self._front_end = _front_end(self.face, self._adapters)
        except BaseException:
            self.close()
            raise

    # -- generating --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """As `LLM.generate`; a request that goes wrong has an `error` in its output."""
        batch = as_batch(prompts)
        for prompt in (prompts, *batch):
            refuse_conversation(prompt)
        each = params_for_each(params, len(batch))
        where = standings(priority, tenant, len(batch))
        adapters = adapters_for_each(adapter, len(batch))
        requests = [
            self._front_end.request(prompt, one, standing=standing, adapter=name)
            for prompt, one, standing, name in zip(batch, each, where, adapters, strict=True)
        ]
        return self._run(requests, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        adapter: str | Sequence[str | None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """As `LLM.chat`."""
        conversations: Any = messages if are_conversations(messages) else [messages]
        each = params_for_each(params, len(conversations))
        where = standings(priority, tenant, len(conversations))
        adapters = adapters_for_each(adapter, len(conversations))
        requests = [
            self._front_end.chat_request(talk, one, options, standing=standing, adapter=name)
            for talk, one, standing, name in zip(conversations, each, where, adapters, strict=True)
        ]
        return self._run(requests, progress)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        adapter: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[StreamDelta]:
        """As `LLM.stream`: it goes on whichever instance the request is on."""
        standing = Standing(priority=priority, tenant=tenant)
        request = self._front_end.request(prompt, params, options, standing, adapter)
        if request.spec.params.n != 1:
            raise InvalidSamplingParams(
                f"n = {request.spec.params.n}: a stream has one output; use generate"
            )
        return self._stream(request)

    def _stream(self, request: RequestText) -> Iterator[StreamDelta]:
        waiting = Waiting([request])
        try:
            self.router.submit(waiting.sinks)
            while (delta := waiting.next_delta()) is not None:
                yield delta
            if request.error is not None:
                raise request.error
        finally:
            self.router.abandon(waiting.sinks)

    def _run(self, requests: Sequence[RequestText], progress: bool | None) -> list[RequestOutput]:
        waiting = Waiting(requests)
        try:
            self.router.submit(waiting.sinks)
            with BatchProgress(requests, progress) as bar:
                while not waiting.wait_a_little():
                    bar.update()
        finally:
            self.router.abandon(waiting.sinks)
        return [request.output() for request in requests]

    def get_default_sampling_params(self) -> SamplingParams:
        """As of `LLM`."""
        return self._front_end.default_params

    # -- adapters ------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """As `LLM.load_adapter`, in all instances, those that will be started included.

        If one refuses it, none has it.
        """
        folder = os.path.abspath(path)
        with self._scaling:
            try:
                self.router.ask("load_adapter", name, folder)
            except VkvError:
                if name not in self._adapters_to_load:
                    self._unload_quietly(name)
                raise
            self._adapters_to_load[name] = folder

    def unload_adapter(self, name: str) -> None:
        """As `LLM.unload_adapter`, in all instances."""
        with self._scaling:
            self._adapters_to_load.pop(name, None)
            self.router.ask("unload_adapter", name)

    def _unload_quietly(self, name: str) -> None:
        """Where some may not have it."""
        with suppress(VkvError):
            self.router.ask("unload_adapter", name)

    @property
    def _adapters_to_load(self) -> dict[str, str]:
        """By name, those that an instance begins with."""
        return self._order["options"]["adapters"]

    def _adapters(self) -> Mapping[str, AdapterKey]:
        """Those that all instances have."""
        stats = [member.stats for member in self.router.members_now() if member.stats is not None]
        return known_names(together(stats).adapters) if stats else {}

    # -- the instances -------------------------------------------------------------------------

    def migrate(self, request_id: str, instance: int, *, index: int = 0) -> bool:
        """Move one of an unfinished request's outputs to an instance; waits until it is there.

        False if it stayed where it was: it ended, or the other had no room. `stats().requests`
        names what is unfinished. Raises InvalidOperation if there is nothing to move.
        """
        return self.router.migrate((request_id, index), instance)

    def drain(self, instance: int, *, timeout_s: float | None = None) -> None:
        """Move everything away from an instance, without computing a token again, and end it.

        What fits nowhere else ends where it is. Raises InvalidOperation if it is the only one, or
        if something is left after `timeout_s`.
        """
        with self._scaling:
            others = [m for m in self.router.members() if m.id != instance and not m.is_draining]
            if not others:
                raise InvalidOperation(
                    f"instance {instance} is the only one; close the cluster, or scale it first"
                )
            self.router.drain(instance, timeout_s)
            self.router.end(instance)

    def scale(self, instances: int) -> None:
        """Have so many instances: start more, or drain those with least to move away."""
        if instances < 1:
            raise InvalidConfig(f"instances is {instances}; a cluster has one at least")
        members = [m for m in self.router.members() if not m.is_draining]
        if len(members) < instances:
            with self._scaling:
                more: list[Role] = ["both"] * (instances - len(members))
                self._start(more)
            return
        snapshot = self.router.snapshot()
        for instance in drained_first(snapshot, len(members) - instances):
            self.drain(instance)

    def stats(self) -> ClusterStats:
        """What the cluster has done and holds."""
        counts = self.router.counts()
        return ClusterStats(
            num_migrations=counts.moved,
            num_stayed=counts.stayed,
            num_recomputed=counts.orphaned,
            instances=tuple(self.router.members()),
            requests=self.router.requests(),
        )

    def _leave(self, instance: int) -> None:
        """Drain an instance that was told to end."""
        try:
            self.drain(instance)
        except VkvError as error:  # the last one stays, and so do its requests
            _log.warning("instance %d was told to end, and stays: %s", instance, error)

    def _rescale(self, instances: int) -> None:
        """Have as many instances as the policy wants."""
        try:
            self.scale(instances)
        except VkvError as error:
            _log.warning("there are to be %d instances, and cannot be: %s", instances, error)
        finally:
            self.router.scaled()

    def _start(self, roles: Sequence[Role]) -> None:
        """Start an instance for each role, all at once. If one fails none of them stays."""
        begun: list[tuple[int, Role]] = [(next(self._ids), role) for role in roles]
        try:
            for instance, _ in begun:
                self._launcher.begin(instance, **self._order)
            for instance, role in begun:
                pid = self._launcher.wait(instance)
                self.router.join(instance, self._launcher.path(instance), role=role, pid=pid)
            self._wait_for_faces({instance for instance, _ in begun})
        except BaseException:
            for instance, _ in begun:
                self.router.end(instance)
            raise

    def _wait_for_faces(self, instances: set[int]) -> None:
        deadline = time.monotonic() + _MEET_S
        while time.monotonic() < deadline:
            known = {m.id for m in self.router.members() if m.face is not None}
            if instances <= known:
                return
            self.router.check_open()
            time.sleep(0.01)
        raise InvalidOperation(f"instances {sorted(instances)} have said nothing; try again")

    @property
    def face(self) -> Face:
        """What its instances are. Raises EngineDied if there is none."""
        self.router.check_open()
        face = self.router.members()[0].face
        assert face is not None
        return face

    # -- the end -------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self.router.is_closed

    def close(self) -> None:
        """End all requests and instances, and Ray if it was started here. Closing twice is
        harmless."""
        self.router.close()
        self._launcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _beside(
    cluster: "weakref.ref[Cluster]", act: "Callable[[Cluster, int], None]"
) -> Callable[[int], None]:
    """Does something with a cluster, if it is still there, on a thread of its own."""

    def work(number: int) -> None:
        there = cluster()
        if there is not None and not there.is_closed:
            act(there, number)

    def begin(number: int) -> None:
        threading.Thread(target=work, args=(number,), name="vkv-scale", daemon=True).start()

    return begin


def _closing(router: Router, launcher: Launcher) -> Any:
    """What a cluster that was dropped is ended by, which must not keep it."""

    def close() -> None:
        router.close()
        launcher.close()

    return close


def _options(options: Mapping[str, Any], instances: int, device: str) -> dict[str, Any]:
    """Those of each instance: pages that can change hands, and a part of this machine's memory."""
    found = dict(options)
    found["adapters"] = {
        name: os.path.abspath(path) for name, path in (options.get("adapters") or {}).items()
    }
    if options.get("kv", "virtual") == "virtual":
        found.setdefault("movable", True)
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        half = linux.available_bytes() // 2  # the other for weights and steps
        found.setdefault("kv_memory", half // instances)
    return found


def _front_end(face: Face, adapters: Callable[[], Mapping[str, AdapterKey]]) -> FrontEnd:
    grammars = None
    if face.tokenizer is not None:
        grammars = Grammars(face.tokenizer, face.admission.vocab_size)
    return FrontEnd(face, face.admission, grammars, adapters)


def _checked_roles(roles: Sequence[Role] | None, instances: int) -> list[Role]:
    if instances < 1:
        raise InvalidConfig(f"instances is {instances}; a cluster has one at least")
    if roles is None:
        return ["both"] * instances
    unknown = [role for role in roles if role not in _ROLES]
    if unknown:
        raise InvalidConfig(f"roles has {unknown[0]!r}; use some of {', '.join(_ROLES)}")
    if len(roles) != instances:
        raise InvalidConfig(f"{len(roles)} roles for {instances} instances; name one for each")
    for one in ("prefill", "decode"):
        if all(role not in (one, "both") for role in roles):
            raise InvalidConfig(f"roles {list(roles)} leave nobody to {one}; make one 'both'")
    return list(roles)


def _policy(policy: str | ClusterPolicy | None, roles: Sequence[Role]) -> ClusterPolicy:
    if policy is None:
        policy = "llumnix" if all(role == "both" for role in roles) else "disaggregated"
    if not isinstance(policy, str):
        return policy
    if policy not in CLUSTER_POLICIES:
        raise InvalidConfig(
            f"policy is {policy!r}; use one of {', '.join(CLUSTER_POLICIES)}, or an object"
        )
    return CLUSTER_POLICIES[policy]()


def _model(model: str | Path | None) -> str | None:
    if model is None or isinstance(model, str | Path):
        return None if model is None else str(model)
    raise InvalidConfig(
        f"model is a {type(model).__name__}, which cannot be sent to other processes; save it "
        "(model.save_pretrained) and give the folder"
    )
