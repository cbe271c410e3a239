"""Held-out conversations to measure the model on: phrasings and values training never saw.

The fact asked for is told in a held-out phrasing, with a held-out value, and asked for in a
held-out phrasing; every second one is also about something no training conversation mentions.
What lies between is ordinary conversation, other facts of similar names included.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import dialogues, lexicon
from .dialogues import Conversation, Exchange, Fact, Mix
from .lexicon import is_held_out

CountTokens = Callable[[str], int]

DISTRACTORS = Mix(
    tell=3.0, ask=2.0, unknown=0.3, update=0.0, echo=1.0, arithmetic=1.0, small_talk=1.0,
    filler=2.0, filler_sentences=(1, 12),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measured question: the messages up to it, the answer expected, and how far back."""

    kind: str
    messages: tuple[dict[str, str], ...]
    answer: str
    value: str
    distance_tokens: int = 0


def _messages(exchanges: list[Exchange]) -> tuple[dict[str, str], ...]:
    """Return the chat messages of `exchanges`, without the last answer."""
    messages = []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": exchange.assistant})
    return tuple(messages[:-1])


def _near_miss(rng: random.Random, fact: Fact) -> Fact | None:
    """Return a fact of another name that shares a word with that of `fact`, if one is made."""
    owner, *noun = fact.told.split()
    if len(noun) != 2:
        return None
    while True:
        qualifier = rng.choice(lexicon.CODE_QUALIFIERS)
        if qualifier != noun[0] and not is_held_out(f"{qualifier} {noun[1]}"):
            break
    told = f"{owner} {qualifier} {noun[1]}"
    value = dialogues.value_of(rng, "code", held_out=False)
    return Fact(told, told.replace("my ", "your ", 1), value)


def _distractors(
    rng: random.Random, fact: Fact, target_tokens: int, count: CountTokens
) -> list[Exchange]:
    """Return exchanges of about `target_tokens` tokens that never mention the value."""
    conversation = Conversation(rng, DISTRACTORS)
    weights = DISTRACTORS.weights()
    near = _near_miss(rng, fact) if rng.random() < 0.5 else None
    total = 0
    while True:
        if near and total > target_tokens // 3:
            conversation.facts[near.told] = near
            conversation.exchanges.append(dialogues.tell(rng, [near]))
            near = None
        else:
            conversation.add(rng.choices(tuple(weights), tuple(weights.values()))[0])
        last = conversation.exchanges[-1]
        if fact.value in last.user or fact.value in last.assistant or fact.told in last.user:
            conversation.facts = {}
            conversation.exchanges.pop()
            continue
        # A message costs its text, its role token and its end token.
        total += count(last.user) + count(last.assistant) + 4
        if total > target_tokens:
            return conversation.exchanges[:-1]


def recall_case(
    rng: random.Random, count: CountTokens, low: int, high: int, *, held_out: bool = True
) -> Case:
    """Return a question whose fact was told between `low` and `high` tokens before it."""
    while True:
        fact = dialogues.make_fact(
            rng, held_out_key=held_out and rng.random() < 0.5, held_out_value=held_out
        )
        before = Conversation(rng, DISTRACTORS)
        for _ in range(rng.randint(0, 2)):
            before.add(rng.choice(("tell", "small_talk", "arithmetic")))
        if any(fact.value in e.user or fact.told in e.user for e in before.exchanges):
            continue
        told = dialogues.tell(rng, [fact], held_out=held_out)
        between = _distractors(rng, fact, rng.randint(low, high), count)
        to_value = told.user[: told.user.rindex(fact.value) + len(fact.value)]
        # The rest of the message, the acknowledgement, two end tokens and two role tokens.
        distance = count(told.user) - count(to_value) + count(told.assistant) + 4
        distance += sum(count(e.user) + count(e.assistant) + 4 for e in between)
        if low <= distance < high:
            break
    question = dialogues.ask(rng, fact, held_out=held_out)
    exchanges = [*before.exchanges, told, *between, question]
    return Case("recall", _messages(exchanges), question.assistant, fact.value, distance)


def rivals_case(rng: random.Random, count: CountTokens) -> Case:
    """Return a question about one of three facts that differ only in whose they are."""
    noun = f"{rng.choice(lexicon.CODE_QUALIFIERS)} {rng.choice(lexicon.CODE_NOUNS)}"
    relation, name = rng.choice(lexicon.RELATIONS), rng.choice(lexicon.NAMES)
    owners = [("my", "your"), (f"my {relation}'s", f"your {relation}'s"), (f"{name}'s",) * 2]
    rng.shuffle(owners)
    facts = [
        Fact(f"{told} {noun}", f"{asked} {noun}", lexicon.digits(rng, 4, held_out=True))
        for told, asked in owners
    ]
    exchanges = []
    for fact in facts:
        exchanges += _distractors(rng, fact, rng.randint(0, 80), count)
        exchanges.append(dialogues.tell(rng, [fact], held_out=True))
    question = dialogues.ask(rng, rng.choice(facts), held_out=True)
    return Case("rivals", _messages([*exchanges, question]), question.assistant, question.value)


def update_case(rng: random.Random, count: CountTokens) -> Case:
    """Return a question about a fact whose value was changed; the latest value is the answer."""
    fact = dialogues.make_fact(rng, held_out_key=False, held_out_value=True, noun="door code")
    value = dialogues.value_of(rng, "code", held_out=True)
    changed = Fact(fact.told, fact.asked, value)
    question = dialogues.ask(rng, changed, held_out=True)
    exchanges = [
        dialogues.tell(rng, [fact], held_out=True),
        *_distractors(rng, fact, rng.randint(0, 150), count),
        dialogues.update(rng, changed, held_out=True),
        *_distractors(rng, changed, rng.randint(0, 150), count),
        question,
    ]
    return Case("update", _messages(exchanges), question.assistant, value)


def unknown_case(rng: random.Random, count: CountTokens) -> Case:
    """Return a question about something never told, after other talk."""
    fact = dialogues.make_fact(rng, held_out_key=rng.random() < 0.5, held_out_value=True)
    question = dialogues.ask_unknown(rng, fact, held_out=True)
    exchanges = [*_distractors(rng, fact, rng.randint(50, 300), count), question]
    return Case("unknown", _messages(exchanges), question.assistant, "not known to me")


def skill_case(rng: random.Random, count: CountTokens, kind: str) -> Case:
    """Return an "arithmetic" or "echo" question in a held-out phrasing, after other talk."""
    maker = {"arithmetic": dialogues.arithmetic, "echo": dialogues.echo}[kind]
    question = maker(rng, held_out=True)
    nothing = Fact("nothing at all", "nothing at all", "nothing at all")
    exchanges = [*_distractors(rng, nothing, rng.randint(20, 200), count), question]
    return Case(kind, _messages(exchanges), question.assistant, question.assistant)
