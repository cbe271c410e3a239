"""Tenants of one engine with planted equal prompts: what each is given, finds and could see."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora
import zoo
from vkv import LLM
from vkv.allocator import KVCache
from vkv.runtime.engine.messages import Add
from vkv.runtime.request.request import Request
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.scheduling.tiers import common_prefix

ADAPTERS = ("french", "german")


@dataclass(frozen=True)
class Tenant:
    """Who asks.

    Attributes:
        salt, adapter, name: of its requests; `name` is what fairness knows it by.
    """

    salt: str = ""
    adapter: str | None = None
    name: str = ""


TENANTS = (
    Tenant(),
    Tenant(salt="ann"),
    Tenant(salt="bob"),
    Tenant(adapter="french"),
    Tenant(adapter="german"),
    Tenant(adapter="french", salt="ann"),
    Tenant(name="shop"),
    Tenant(salt="ann", name="shop"),
)


def save_adapters(folder: Path) -> dict[str, Path]:
    """For the tiny llama."""
    model = zoo.tiny_model("llama")
    return {
        name: lora.save_adapter(folder / name, model, seed=number, rank=16)
        for number, name in enumerate(ADAPTERS)
    }


class Alone:
    """What each adapter's merged model says by itself."""

    def __init__(self, adapters: Mapping[str, Path]) -> None:
        self._adapters = adapters
        self._models: dict[str | None, Any] = {}
        self._said: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}

    def tokens(self, adapter: str | None, prompt: Sequence[int], count: int) -> list[int]:
        """The first `count` tokens after a prompt."""
        if adapter not in self._models:
            self._models[adapter] = model = zoo.tiny_model("llama")
            if adapter is not None:
                lora.merge(model, self._adapters[adapter])
        key = adapter, tuple(prompt)
        if len(self._said.get(key, ())) < count:
            self._said[key] = zoo.generate_alone(self._models[adapter], prompt, count)
        return self._said[key][:count]


@dataclass
class Findings:
    """What came of a run.

    Attributes:
        num_requests: that ended.
        num_found: prompt tokens that were found computed.
        num_foreign_rows: rows of keys that a request could see behind its own, and that none of its
            owner's requests had computed: one counts for each step.
    """

    num_requests: int = 0
    num_found: int = 0
    num_foreign_rows: int = 0


@dataclass
class _Asked:
    tenant: Tenant
    spec: RequestSpec
    tokens: list[int] = field(default_factory=list)


class Watch:
    """Knows what each row of keys is of, and looks at all memory that a live request's slot shows.

    Args:
        had: by owner, the tokens of all its requests, as they grow.
    """

    def __init__(self, llm: LLM, had: Mapping[Any, list[list[int]]]) -> None:
        self._cache = llm.engine.cache
        self._had = had
        self._known: dict[bytes, list[int]] = {}  # a row of keys, and the tokens up to it

    def foreign_rows(self, running: Sequence[Request]) -> int:
        """Rows behind the tokens of running requests that no request of their owner computed.

        Of the last layer: those of the first are the same for a token at a position.
        """
        if not isinstance(self._cache, KVCache):
            return 0
        self._cache._look_ahead.drain()  # or pages may be there that are being cleared
        rows = {request: self._rows(request) for request in running if request.slot is not None}
        for request, (own, _) in rows.items():
            for position, row in enumerate(own, start=request.slot_start):
                self._known.setdefault(row, request.token_ids[: position + 1])
        return sum(
            row in self._known and not self._is_of(request.spec.owner, self._known[row])
            for request, (_, behind) in rows.items()
            for row in behind
        )

    def _is_of(self, owner: Any, tokens: list[int]) -> bool:
        return any(had[: len(tokens)] == tokens for had in self._had[owner])

    def _rows(self, request: Request) -> tuple[list[bytes], list[bytes]]:
        """Those of its tokens, and those behind them; not the next, which a recorded step may have
        written in its name (`Padding`)."""
        slot, cache = request.slot, self._cache
        assert slot is not None
        assert isinstance(cache, KVCache)
        num_backed = cache.geometry.tokens_backed([len(pages) for pages in slot.pages])
        num_own = min(request.num_computed - request.slot_start, slot.num_tokens)
        keys, _ = cache.layer(len(cache.layout.layers) - 1)
        rows = [row.numpy().tobytes() for row in keys[slot.index, :num_backed].clone()]
        return rows[:num_own], rows[num_own + 1 :]


class _Crowd:
    """Requests at random, of equal prompts and of secret ones."""

    def __init__(self, llm: LLM, tenants: Sequence[Tenant], seed: int) -> None:
        self._random = random.Random(seed)
        self._llm = llm
        self._tenants = tenants
        self._planted = zoo.random_prompts([90, 90], seed=1)
        secrets = zoo.random_prompts([90] * len(tenants), seed=2)
        self._secrets = dict(zip(tenants, secrets, strict=True))
        self._had: dict[str, list[list[int]]] = {}  # by variant, what requests held or hold
        self.had: dict[Any, list[list[int]]] = {}  # the same by owner
        self._round = seed
        self.asked: dict[str, _Asked] = {}
        self.ended: list[_Asked] = []

    def come(self) -> None:
        """One more."""
        draw = self._random
        tenant = draw.choice(self._tenants)
        stem = draw.choice([*self._planted, self._secrets[tenant]])
        names = self._llm.engine.extras.adapters.names
        spec = RequestSpec(
            request_id=f"{self._round}-{len(self.asked) + len(self.ended)}",
            prompt_token_ids=stem[: draw.randint(4, len(stem))],
            params=zoo.greedy(draw.randint(2, 40)),
            variant=tenant.salt,
            adapter=None if tenant.adapter is None else names[tenant.adapter],
            tenant=tenant.name,
        )
        asked = _Asked(tenant, spec, list(spec.prompt_token_ids))
        self._had.setdefault(spec.kv_variant, []).append(asked.tokens)
        self.had.setdefault(spec.owner, []).append(asked.tokens)
        self.asked[spec.request_id] = asked
        self._llm.loop.post(Add(spec))

    def hear(self) -> int:
        """Run a step; returns the prompt tokens that were found, none of them another's."""
        num_found = 0
        for output in self._llm.loop.turn():
            asked = self.asked[output.request_id]
            assert output.failure is None, output.failure
            if output.num_cached_tokens:
                prompt = list(asked.spec.prompt_token_ids)
                others = [t for t in self._had[asked.spec.kv_variant] if t is not asked.tokens]
                most = max((common_prefix(prompt, other) for other in others), default=0)
                assert output.num_cached_tokens <= most, (asked.tenant, output)
                num_found += output.num_cached_tokens
            asked.tokens += output.token_ids
            if output.finish_reason is not None:
                self.ended.append(self.asked.pop(output.request_id))
        return num_found


def run(
    llm: LLM, alone: Alone, *, count: int, seed: int = 0, tenants: Sequence[Tenant] = TENANTS
) -> Findings:
    """Have `count` requests of the tenants run beside each other.

    AssertionError if one of them got other tokens than it gets alone, or began with what none of
    its own variant had computed. The engine is to have `ADAPTERS`, and no requests.
    """
    crowd, findings = _Crowd(llm, tenants, seed), Findings()
    watch = Watch(llm, crowd.had)
    draw = random.Random(seed)
    num_come = 0
    while num_come < count or crowd.asked:
        while num_come < count and len(crowd.asked) < 10 and draw.random() < 0.6:
            crowd.come()
            num_come += 1
        findings.num_found += crowd.hear()
        findings.num_foreign_rows += watch.foreign_rows(llm.engine.scheduler.running)
    for asked in crowd.ended:
        prompt = list(asked.spec.prompt_token_ids)
        expected = alone.tokens(asked.tenant.adapter, prompt, asked.spec.params.max_tokens or 0)
        assert asked.tokens[len(prompt) :] == expected, asked.tenant
    findings.num_requests = len(crowd.ended)
    llm.engine.cache.check_invariants()
    return findings
