"""An engine turned by hand: the one place where benches know of an engine's inside.

What `LLM` offers by itself (texts, `stats`, `trim`) is used as it is; here is what a bench needs
besides, and nothing that it measures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..allocator import KVCache, PagedKVCache
from ..runtime.engine.messages import Add, SetPriority
from ..runtime.engine.stats import EngineStats
from ..runtime.execution.tape import TapeRecorder
from ..runtime.frontend.driving.idle import IdleTrim
from ..runtime.frontend.llm import LLM
from ..runtime.request.sampling_params import SamplingParams
from ..runtime.request.spec import RequestSpec
from ..vmem.errors import InvalidConfig


@dataclass(frozen=True)
class NewToken:
    """A request that got a token by a step, and whether it was its last."""

    request_id: str
    token_id: int
    is_finished: bool


@dataclass(frozen=True)
class RunningRequest:
    """A request between two steps.

    Attributes:
        num_held_tokens: tokens whose keys and values it holds.
    """

    request_id: str
    num_held_tokens: int
    num_output_tokens: int


class Driver:
    """Submits requests to the engine of an `LLM`, and runs its steps one at a time.

    Nobody else may generate with that `LLM` meanwhile.
    """

    def __init__(self, llm: LLM) -> None:
        self._loop = llm.loop
        self._engine = llm.loop.engine

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        num_output_tokens: int,
        *,
        priority: int = 0,
        tenant: str = "",
        model: str | None = None,
    ) -> None:
        """Queue a request that runs greedily to its full length, by a model of the engine's."""
        voice = None if model is None else self._engine.extras.voices[model]
        params = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
        spec = RequestSpec(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            priority=priority,
            tenant=tenant,
            chain=None if voice is None else voice.key,
        )
        self._loop.post(Add(spec))

    def set_priority(self, request_id: str, priority: int) -> None:
        """Change the priority of a request that is unfinished."""
        self._loop.post(SetPriority(request_id, priority))

    def swap(self, *, asynchronous: bool, always: bool, reuses: bool) -> None:
        """Choose how keys and values move to the tier behind the cache and back (`Swapping`).

        What does not keep copies does not copy finished requests' either.
        """
        swapping = self._engine.scheduler.tiers.swapping
        assert swapping is not None, "swap_memory was not given"
        swapping.asynchronous = asynchronous
        swapping.always = always
        swapping.reuses = swapping.keeps_finished = reuses

    @contextmanager
    def without_tier(self) -> Iterator[None]:
        """As if `swap_memory` had not been given; nothing may be on its way."""
        tiers = self._engine.scheduler.tiers
        swapping, tiers.swapping = tiers.swapping, None
        try:
            yield
        finally:
            tiers.swapping = swapping

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return self._loop.has_work

    def step(self) -> list[NewToken]:
        """One step; what came of it. Raises what a request failed by."""
        tokens: list[NewToken] = []
        for output in self._loop.turn():
            if output.failure is not None:
                raise output.failure.error()
            if output.token_ids:
                is_finished = output.finish_reason is not None
                tokens.append(NewToken(output.request_id, output.token_ids[-1], is_finished))
        return tokens

    def finish_all(self) -> None:
        """Run steps until no request is left."""
        while self.has_work:
            self.step()

    def stats(self) -> EngineStats:
        """Counters of the engine and its cache, as they are now."""
        return self._loop.stats(fresh=True)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that went through the model so far."""
        return self._engine.num_computed_tokens

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of a step at most, as resolved for the device."""
        return self._engine.scheduler.max_batch_tokens

    def running(self) -> list[RunningRequest]:
        """The requests that hold a slot."""
        found = []
        for request in self._engine.scheduler.running:
            held = request.slot.num_tokens if request.slot is not None else 0
            found.append(RunningRequest(request.key[0], held, request.num_output_tokens))
        return found

    # -- memory ------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token, over all layers."""
        return self._cache.layout.token_bytes

    @property
    def growth_bytes(self) -> int:
        """What a slot grows by at least: a page of each of its ranges."""
        return self._cache.layout.num_ranges * self._cache.layout.page_bytes

    def backed_bytes(self, num_tokens: int) -> int:
        """Memory that backs a slot of so many tokens."""
        return self._cache.layout.num_pages(num_tokens) * self._cache.layout.page_bytes

    @contextmanager
    def resting(self, after_s: float) -> Iterator[None]:
        """Memory of finished requests goes back after so many seconds of rest, which begin now."""
        idle = IdleTrim(self._loop.trim, after_s)
        try:
            idle.idle()
            yield
        finally:
            idle.stop()

    # -- the model ---------------------------------------------------------------------------

    def modules(self) -> list[nn.Module]:
        """Of the model, as its weights are laid out."""
        return list(self._engine.runner.forward.model.modules())

    def tape(self) -> TapeRecorder:
        """What records decode steps on a CPU. Raises InvalidConfig, with why, if nothing does."""
        recordings = self._engine.runner.recordings
        if recordings is None or not isinstance(recordings.recorder, TapeRecorder):
            raise InvalidConfig("decode steps of this model are not recorded: see `vkv info MODEL`")
        if recordings.refused is not None:
            raise InvalidConfig(
                f"decode steps of this model are not recorded: {recordings.refused}"
            )
        return recordings.recorder

    @property
    def _cache(self) -> KVCache | PagedKVCache:
        cache = self._engine.cache
        assert isinstance(cache, KVCache | PagedKVCache)
        return cache
