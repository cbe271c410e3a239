"""Several engines as one: `LLM`'s verbs over a cluster of instances."""

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack

from ...allocator import parse_bytes
from ...vmem import janitor
from ..adapters.adapters import adapter_folder, known_names
from ..blocks.places import Source
from ..chains.family import gather
from ..engine.admission import Admission
from ..engine.config import EngineConfig
from ..engine.migration.handshake import Stages
from ..engine.stats import together
from ..execution.grammars import Grammars
from ..frontend.chat_template import ChatOptions
from ..frontend.front_end import FrontEnd
from ..frontend.progress import BatchProgress
from ..frontend.prompts import Message, Prompt
from ..frontend.text_stream import RequestText, StreamDelta
from ..link.face import Face
from ..request.outputs import RequestOutput
from ..request.sampling_params import SamplingParams
from ..request.spec import AdapterKey
from .fleet import Fleet
from .instances.launcher import Launcher
from .lending import LentAdmission, admission_of
from .options import (
    check_processes,
    checked_model,
    checked_policy,
    checked_roles,
    instance_options,
)
from .policies import ClusterPolicy
from .router import Router
from .snapshot import Role
from .stats import ClusterStats
from .waiting import Waiting


class Cluster:
    """A model on several instances, each an engine in a process of its own. For any thread.

    Ray starts and watches the processes. Requests go to instances as the policy says, and move
    between them while they run, with not a token lost, repeated or changed. If an instance dies,
    its requests go on elsewhere, computed again from what they had.

    Args:
        source: a checkpoint folder, a GGUF file, a hub id, or None for the built-in model; may also
            be given as `model`. Or a zoo of blocks, which all nodes must have in the same place.
        model: with a zoo, the name of a model in it.
        instances: how many.
        roles: "prefill", "decode" or "both", one an instance; None for all of them "both".
        policy: a name of `CLUSTER_POLICIES`, or an object of your own; None for "llumnix", or where
            there are roles "disaggregated", which alone knows them.
        address: of a Ray cluster to join, as of `ray.init`, "auto" for the one that this machine is
            a node of; its nodes share the instances out. None to start one on this machine.
        threads: of each instance, on a CPU, which are as many of Ray's CPUs in a cluster that is
            joined; None to part the processors evenly.
        lending: instances lend each other memory, so that requests may be longer than what one has,
            and more of them run; None for that where `max_len` is more than one holds.
        stages: how sequences are copied where their pages cannot change hands.
        liveness_s: an instance that answers nothing for so long counts as dead, and is killed. It
            answers between two steps, so it must be more than the longest of them.
        device, dtype: as of `LLM`, by name.
        options: fields of `EngineConfig`, for each instance; neither a built model nor `tokenizer`
            can be sent to other processes.

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
        source: Source = None,
        *,
        model: Source = None,
        instances: int = 2,
        roles: Sequence[Role] | None = None,
        policy: str | ClusterPolicy | None = None,
        address: str | None = None,
        threads: int | None = None,
        lending: bool | None = None,
        stages: Stages | None = None,
        liveness_s: float = 60.0,
        device: str = "auto",
        dtype: str = "auto",
        **options: Any,
    ) -> None:
        roles = checked_roles(roles, instances)
        check_processes(threads, liveness_s)
        chosen, following = gather(source, model)
        options = following | options
        EngineConfig(**options)  # to refuse it here, and not in every process
        self.policy = checked_policy(policy, roles)
        order: dict[str, Any] = {
            "model": checked_model(chosen),
            "device": device,
            "dtype": dtype,
            "lends": lending,
        }
        self._launcher = Launcher(address, silence_s=liveness_s)
        self.router = Router(self.policy, self._launcher.kill, stages=stages, liveness_s=liveness_s)
        self._fleet = Fleet(self._launcher, self.router, order)
        weakref.finalize(self, janitor.later, _closing(self.router, self._launcher)).atexit = False
        try:
            shares_this_machine = address is None and not self._launcher.wants_gpu(device)
            sharing = instances if shares_this_machine else None
            order["options"] = instance_options(options, sharing)
            order |= self._launcher.share(device, instances)
            order["threads"] = threads or order["threads"]
            self._fleet.start(roles)
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
        model: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """As `LLM.generate`; a request that goes wrong has an `error` in its output."""
        requests = self._front_end.batch(
            prompts, params, priority=priority, tenant=tenant, adapter=adapter, model=model
        )
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
        model: str | Sequence[str | None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """As `LLM.chat`."""
        requests = self._front_end.chats(
            messages,
            params,
            options,
            priority=priority,
            tenant=tenant,
            adapter=adapter,
            model=model,
        )
        return self._run(requests, progress)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        adapter: str | None = None,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[StreamDelta]:
        """As `LLM.stream`: it goes on whichever instance the request is on."""
        request = self._front_end.stream(
            prompt, params, options, priority=priority, tenant=tenant, adapter=adapter, model=model
        )
        return self._stream(request)

    def _stream(self, request: RequestText) -> Iterator[StreamDelta]:
        waiting = Waiting([request], each_token=True)
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
        self._fleet.load_adapter(name, str(adapter_folder(path)))

    def unload_adapter(self, name: str) -> None:
        """As `LLM.unload_adapter`, in all instances."""
        self._fleet.unload_adapter(name)

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

        Requests that are longer than its memory do not move: when all else has, they go on
        elsewhere, computed again. What fits nowhere else ends where it is. Raises InvalidOperation
        if it is the only one, or if something is left after `timeout_s`.
        """
        self._fleet.drain(instance, timeout_s)

    def scale(self, instances: int) -> None:
        """Have so many instances: start more, or drain those with least to move away."""
        self._fleet.scale(instances)

    def limit_memory(self, kv_memory: int | str | None, *, instance: int | None = None) -> None:
        """Have an instance, or all there are, keep within less than their `kv_memory` from now on;
        None for that again.

        Live requests give way as they grow. What is let in goes by `kv_memory` as before: one that
        the limit could not hold alone fails. Raises InvalidConfig for more than they began with.
        """
        about = () if kv_memory is None else (str(parse_bytes(kv_memory)),)
        if instance is None:
            self.router.ask("limit_memory", *about)
        else:
            self.router.ask_one(instance, "limit_memory", *about)

    def stats(self) -> ClusterStats:
        """What the cluster has done and holds."""
        return self.router.stats()

    @property
    def face(self) -> Face:
        """What its instances are. Raises EngineDied if there is none."""
        self.router.check_open()
        face = next(m.face for m in self.router.members() if m.face is not None)
        return replace(face, admission=LentAdmission.of(_admission_now(self.router)))

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


def _closing(router: Router, launcher: Launcher) -> Any:
    """What a cluster that was dropped is ended by, which must not keep it."""

    def close() -> None:
        router.close()
        launcher.close()

    return close


def _admission_now(router: Router) -> Callable[[], Admission]:
    last: list[Admission] = []  # what was let in while there was an instance

    def now() -> Admission:
        members = [member for member in router.members_now() if member.face is not None]
        if members:
            last[:] = [admission_of(members)]
        return last[0]

    return now


def _front_end(face: Face, adapters: Callable[[], Mapping[str, AdapterKey]]) -> FrontEnd:
    grammars = None
    if face.tokenizer is not None:
        grammars = Grammars(face.tokenizer, face.admission.vocab_size)
    return FrontEnd(face, face.admission, grammars, adapters, face.voices)
