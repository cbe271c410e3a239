"""What is asked: drawn from a seed, so that the same seed asks the same."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.request.sampling_params import SamplingParams
from ...runtime.request.structured_outputs import StructuredOutputsParams
from .tiny import NUM_LETTERS

MOST_TURNS = 4
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["yes", "no"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_SHAPES: tuple[dict[str, Any], ...] = (
    {"regex": "[a-f ]{20,60}x"},
    {"json": _SCHEMA, "disable_any_whitespace": True},
    {"choice": ["yes", "no", "perhaps"]},
)
_NUM_HEADS = 6  # beginnings that many prompts share


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a client asks, in one turn or several.

    Attributes:
        number, kind: name it in messages.
        voice: who answers: the name of a model or of an adapter.
        turns: what is said in each, as tokens; it follows on what was said and answered before.
        salt: as of a prompt's `cache_salt`.
        priority, tenant: as of `LLM.generate`.
        streams: its client reads tokens as they come.
        cancel_after: tokens after which its client goes away; None for never.
    """

    number: int
    kind: str
    voice: str
    turns: tuple[tuple[int, ...], ...]
    params: SamplingParams
    salt: str = ""
    priority: int = 0
    tenant: str = ""
    streams: bool = False
    cancel_after: int | None = None

    def __str__(self) -> str:
        return f"request {self.number} ({self.kind}, {self.voice})"


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a phase asks.

    Attributes:
        name: of the phase.
        kinds: and how often each, beside the others.
        voices: who answers.
        long_tokens: of the shortest and longest prompt of the kind "long".
        has_priorities: requests differ in priority.
    """

    name: str
    kinds: Mapping[str, int]
    voices: Sequence[str]
    long_tokens: tuple[int, int] = (0, 0)
    has_priorities: bool = False


def draw(seed: int, mix: Mix, number: int) -> Ask:
    """The request of a number."""
    chance = random.Random(f"{seed} {mix.name} {number}")
    (kind,) = chance.choices(list(mix.kinds), list(mix.kinds.values()))
    heads = _heads(seed)
    first = _prompt(chance, heads, mix if kind == "long" else None)
    num_more = chance.randint(1, MOST_TURNS - 1) if kind == "conversation" else 0
    more = (_letters(chance, chance.randint(1, 40)) for _ in range(num_more))
    most = chance.randint(8, 40) if kind == "conversation" else chance.randint(8, 90)
    cancels = kind == "cancel"
    return Ask(
        number=number,
        kind=kind,
        voice=mix.voices[0] if kind == "long" else chance.choice(mix.voices),
        turns=(first, *more),
        params=_params(kind, chance, most),
        salt=chance.choice(["", "", "", "salt"]),
        priority=chance.choice([-1, 0, 0, 1]) if mix.has_priorities else 0,
        tenant=chance.choice(["heavy", "heavy", "heavy", "light"]),
        streams=cancels or (kind != "several" and chance.random() < 0.4),
        cancel_after=chance.randint(1, most) if cancels else None,
    )


def _heads(seed: int) -> list[tuple[int, ...]]:
    chance = random.Random(f"{seed} heads")
    return [_letters(chance, chance.randint(30, 300)) for _ in range(_NUM_HEADS)]


def _letters(chance: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chance.randrange(NUM_LETTERS) for _ in range(count))


def _prompt(
    chance: random.Random, heads: Sequence[tuple[int, ...]], mix: Mix | None
) -> tuple[int, ...]:
    """As long as `mix` wants it; else one that begins like others, repeats itself, or neither."""
    if mix is not None:
        return _letters(chance, chance.randint(*mix.long_tokens))
    how = chance.random()
    if how < 0.4:
        return chance.choice(heads) + _letters(chance, chance.randint(1, 30))
    if how < 0.6:
        return _letters(chance, chance.randint(4, 12)) * chance.randint(3, 8)
    return _letters(chance, round(3 * 150 ** chance.random()))


def _params(kind: str, chance: random.Random, most: int) -> SamplingParams:
    drawn: dict[str, Any] = {"temperature": chance.uniform(0.6, 1.1), "seed": chance.randrange(999)}
    greedy: dict[str, Any] = {"temperature": 0}
    how = chance.choice([drawn, greedy])
    special: dict[str, dict[str, Any]] = {
        "greedy": greedy,
        "seeded": {**drawn, "top_p": chance.choice([1.0, 0.9]), "top_k": chance.choice([0, 20])},
        "penalised": {**how, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        "several": {**drawn, "n": 3},
        "stop": {**how, "stop": [chance.choice("abcdefgh")]},
        "structured": {
            **how,
            "structured_outputs": StructuredOutputsParams(**chance.choice(_SHAPES)),
            "ignore_eos": False,
        },
    }
    return SamplingParams(**{"max_tokens": most, "ignore_eos": True, **special.get(kind, how)})
