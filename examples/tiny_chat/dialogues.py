"""Generates the conversations the model is trained and measured on, from a seeded `Random`.

A conversation is a list of `Exchange`: what the user says, what the assistant answers, and, where
the answer restates a fact, the value it must restate. Phrasings, keys and values come in two
disjoint sets; `held_out=True` draws from the one that training never sees.
"""

import random
from dataclasses import dataclass, field

from . import lexicon, phrasings, smalltalk
from .lexicon import is_held_out

KINDS = ("tell", "ask", "unknown", "update", "echo", "arithmetic", "small_talk", "filler")


@dataclass(frozen=True)
class Fact:
    """Something told: `told` is how the user names it, `asked` how the assistant does."""

    told: str
    asked: str
    value: str
    frame: phrasings.Frame | None = None


@dataclass(frozen=True)
class Exchange:
    """One user message and the answer to it; `value` is the part of a recall to be scored."""

    user: str
    assistant: str
    kind: str
    value: str = ""


@dataclass(frozen=True)
class Mix:
    """How often each kind of exchange is drawn, and how long fillers are (sentences)."""

    tell: float = 4.0
    ask: float = 6.0
    unknown: float = 0.5
    update: float = 0.4
    echo: float = 0.8
    arithmetic: float = 1.0
    small_talk: float = 0.6
    filler: float = 0.5
    filler_sentences: tuple[int, int] = (1, 4)
    first_facts: tuple[int, int] = (1, 6)
    odd_values: float = 0.0  # share of the words told that are odd ones
    polite: float = 0.0  # share of the questions with words around them that mean nothing
    unknown_answer: str = phrasings.EARLY_UNKNOWN_ANSWER

    def weights(self) -> dict[str, float]:
        """Return the weight of each kind of exchange."""
        return {kind: getattr(self, kind) for kind in KINDS}


def value_of(rng: random.Random, kind: str, *, held_out: bool, odd: float = 0.0) -> str:
    """Return a random value of `kind`, such as a code, a colour or a date.

    `odd` is the share of words that are odd ones instead, see `lexicon.odd_word`.
    """
    if kind == "code":
        return lexicon.digits(rng, rng.choice((3, 4, 4, 4, 4, 5, 6)), held_out=held_out)
    if kind == "number":
        return str(rng.randrange(1, 100)) if not held_out else lexicon.digits(rng, 3, held_out=True)
    if kind == "date":
        while True:
            date = f"{rng.choice(lexicon.MONTHS)} {rng.randrange(1, 32)}"
            if is_held_out(date) == held_out:
                return date
    lists = {
        "name": (lexicon.NAMES, lexicon.HELD_OUT_NAMES),
        "colour": (lexicon.COLOURS, lexicon.HELD_OUT_COLOURS),
        "food": (lexicon.FOODS, lexicon.HELD_OUT_FOODS),
        "animal": (lexicon.ANIMALS, lexicon.HELD_OUT_ANIMALS),
        "city": (lexicon.CITIES, lexicon.HELD_OUT_CITIES),
        "job": (lexicon.JOBS, lexicon.HELD_OUT_JOBS),
        "place": (lexicon.PLACES, lexicon.HELD_OUT_PLACES),
    }
    if odd and rng.random() < odd:
        return lexicon.odd_word(rng)
    if kind == "word" or rng.random() < 0.25:
        return lexicon.made_up_word(rng, held_out=held_out)
    return rng.choice(lists[kind][held_out])


def _noun_and_kind(rng: random.Random) -> tuple[str, str]:
    """Return what a fact is about, such as "gate code", and the kind of value it takes."""
    choice = rng.random()
    if choice < 0.36:
        noun = f"{rng.choice(lexicon.CODE_QUALIFIERS)} {rng.choice(lexicon.CODE_NOUNS)}"
        return noun, "word" if rng.random() < 0.12 else "code"
    if choice < 0.50:
        kind = rng.choice(tuple(lexicon.FAVOURITES))
        adjective = rng.choice(("favourite", "favorite"))
        return f"{adjective} {rng.choice(lexicon.FAVOURITES[kind].split())}", kind
    if choice < 0.62:
        thing = rng.choice(lexicon.THINGS_WITH_NAME)
        return (f"{thing}'s name" if rng.random() < 0.7 else thing), "name"
    if choice < 0.68:
        return f"{rng.choice(lexicon.THINGS_WITH_COLOUR)} colour", "colour"
    if choice < 0.80:
        keys = {
            "number": lexicon.NUMBER_KEYS,
            "date": lexicon.DATE_KEYS,
            "city": lexicon.CITY_KEYS,
            "job": lexicon.JOB_KEYS,
            "name": lexicon.NAME_KEYS,
        }
        kind = rng.choice(tuple(keys))
        return rng.choice(keys[kind]), kind
    kinds = ("code", "word", "name", "colour", "food", "animal", "city", "number", "job")
    word = lexicon.made_up_word(rng, held_out=False)
    if rng.random() < 0.6:
        word = rng.choice(lexicon.FILLER_OBJECTS + lexicon.CODE_QUALIFIERS)
    if rng.random() < 0.5:
        word = f"{rng.choice(lexicon.CODE_QUALIFIERS + lexicon.COLOURS)} {word}"
    return word, rng.choice(kinds)


def make_fact(
    rng: random.Random,
    *,
    held_out_key: bool,
    held_out_value: bool,
    noun: str = "",
    odd: float = 0.0,
) -> Fact:
    """Return a random fact; a `noun` given fixes what it is about (its value is then a code)."""
    kind = "code"
    while not noun:
        noun, kind = _noun_and_kind(rng)
        if is_held_out(noun) != held_out_key:
            noun = ""
    value = value_of(rng, kind, held_out=held_out_value, odd=odd)
    owner = rng.random()
    if owner < 0.72:
        return Fact(f"my {noun}", f"your {noun}", value)
    if owner < 0.84:
        return Fact(f"the {noun}", f"the {noun}", value)
    if owner < 0.92:
        person = rng.choice(lexicon.RELATIONS)
        return Fact(f"my {person}'s {noun}", f"your {person}'s {noun}", value)
    name = rng.choice(lexicon.NAMES)
    return Fact(f"{name}'s {noun}", f"{name}'s {noun}", value)


def framed_fact(rng: random.Random, odd: float) -> Fact:
    """Return a fact with a sentence form of its own, such as "i live in paris"."""
    frame = rng.choice(phrasings.FRAMES)
    return Fact(frame.topic, "", value_of(rng, frame.kind, held_out=False, odd=odd), frame)


def restate(fact: Fact) -> str:
    """Return the one form in which the assistant states a fact."""
    if fact.frame:
        return fact.frame.answer.format(v=fact.value)
    return f"{fact.asked} is {fact.value}."


def _untidy(rng: random.Random, text: str) -> str:
    """Drop or change the closing punctuation, as people do."""
    if text[-1] in "?." and rng.random() < 0.3:
        return text[:-1]
    if text[-1].isalnum() and rng.random() < 0.6:
        return text + rng.choice("...!")
    return text


def tell(rng: random.Random, facts: list[Fact], *, held_out: bool = False) -> Exchange:
    """State one fact, or two in one message."""
    forms = phrasings.HELD_OUT_STATEMENTS if held_out else phrasings.STATEMENTS
    if facts[0].frame:
        forms, facts = facts[0].frame.statements, facts[:1]
    text = rng.choice(forms).format(k=facts[0].told, v=facts[0].value)
    for fact in facts[1:]:
        joint = rng.choice((" and ", ", and ", ". "))
        text += f"{joint}{fact.told} is {fact.value}"
    return Exchange(_untidy(rng, text), phrasings.ACKNOWLEDGED, "tell")


def _polite(rng: random.Random, text: str) -> str:
    """Put a phrase before a question, or after it, that changes nothing."""
    before, after = rng.choice(phrasings.AROUND_QUESTIONS)
    return f"{before}{text.rstrip('.') if after else text}{after}"


def ask(rng: random.Random, fact: Fact, *, held_out: bool = False, polite: float = 0.0) -> Exchange:
    """Ask for a fact that was told."""
    forms = phrasings.HELD_OUT_QUESTIONS if held_out else phrasings.QUESTIONS
    if fact.frame:
        forms = fact.frame.questions
    text = rng.choice(forms).format(k=fact.told)
    if polite and rng.random() < polite:
        text = _polite(rng, text)
    return Exchange(_untidy(rng, text), restate(fact), "ask", fact.value)


def ask_unknown(
    rng: random.Random,
    fact: Fact,
    *,
    held_out: bool = False,
    polite: float = 0.0,
    answer: str = phrasings.UNKNOWN_ANSWER,
) -> Exchange:
    """Ask for a fact that was not told."""
    question = ask(rng, fact, held_out=held_out, polite=polite)
    return Exchange(question.user, answer.format(k=fact.asked), "unknown")


def update(rng: random.Random, fact: Fact, *, held_out: bool = False) -> Exchange:
    """Give a fact told before a new value."""
    forms = phrasings.HELD_OUT_UPDATES if held_out else phrasings.UPDATES
    text = rng.choice(forms).format(k=fact.told, v=fact.value)
    return Exchange(_untidy(rng, text), phrasings.ACKNOWLEDGED, "update")


def echo(rng: random.Random, *, held_out: bool = False, odd: float = 0.0) -> Exchange:
    """Ask for some words to be repeated."""
    words = []
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 5, 6))):
        pool = rng.choice((lexicon.FILLER_OBJECTS, lexicon.COLOURS, lexicon.NAMES, None, ()))
        if pool is None:
            words.append(lexicon.digits(rng, rng.choice((2, 3, 4)), held_out=held_out))
        else:
            made_up = lexicon.made_up_word(rng, held_out=held_out)
            words.append(rng.choice(pool) if pool else made_up)
        if odd and rng.random() < odd:
            words[-1] = lexicon.odd_word(rng)
    phrase = " ".join(words)
    if rng.random() < 0.25:
        phrase = smalltalk.sentence(rng)
    form = rng.choice(phrasings.HELD_OUT_ECHOES if held_out else phrasings.ECHOES)
    return Exchange(form.format(v=phrase), phrase, "echo", phrase)


def arithmetic(rng: random.Random, *, held_out: bool = False) -> Exchange:
    """Ask for a sum or a difference of numbers up to 20, or a product up to 10 times 10."""
    operator = rng.choice("++--*")
    top = 10 if operator == "*" else 20
    a, b = rng.randint(0, top), rng.randint(0, top)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    form = rng.choice(phrasings.HELD_OUT_SUMS if held_out else phrasings.SUMS)
    text = form.format(a=a, b=b, o=operator, w=phrasings.OPERATOR_WORDS[operator])
    return Exchange(text, f"{a} {operator} {b} = {result}.", "arithmetic", str(result))


def small_talk(rng: random.Random) -> Exchange:
    """Draw a greeting, thanks, or a question about the assistant, with its fixed answer."""
    messages, answer = rng.choice(smalltalk.SMALL_TALK)
    text = rng.choice(messages).replace("{p}", rng.choice(lexicon.CITIES + lexicon.NAMES))
    return Exchange(_untidy(rng, text), answer, "small_talk")


def filler(rng: random.Random, num_sentences: int) -> Exchange:
    """Tell a story that holds no fact to remember, at times in words that mean nothing."""
    if rng.random() < 0.15:
        words = (
            lexicon.made_up_word(rng, held_out=False)
            if rng.random() < 0.5
            else rng.choice(lexicon.FILLER_OBJECTS + lexicon.FILLER_VERBS + lexicon.FILLER_PLACES)
            for _ in range(5 * num_sentences)
        )
        return Exchange(" ".join(words) + ".", smalltalk.STORY_ANSWER, "filler")
    story = ". ".join(smalltalk.sentence(rng) for _ in range(num_sentences))
    return Exchange(story + ".", smalltalk.STORY_ANSWER, "filler")


@dataclass
class Conversation:
    """Grows a training conversation; remembers what was told so that it can be asked."""

    rng: random.Random
    mix: Mix
    facts: dict[str, Fact] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    exchanges: list[Exchange] = field(default_factory=list)

    def _new_fact(self) -> Fact:
        noun = ""
        if self.facts and self.rng.random() < 0.3:  # a near miss of a fact told before
            words = self.rng.choice(tuple(self.facts.values())).told.split()
            if len(words) == 3:
                words[1] = self.rng.choice(lexicon.CODE_QUALIFIERS)
                noun = " ".join(words[1:])
        while True:
            if noun and is_held_out(noun):
                noun = ""
            fact = make_fact(
                self.rng,
                held_out_key=False,
                held_out_value=False,
                noun=noun,
                odd=self.mix.odd_values,
            )
            frames = (f.told for f in self.facts.values() if f.frame)
            if fact.told not in self.facts and not any(topic in fact.told for topic in frames):
                return fact
            noun = ""

    def _tell(self) -> Exchange:
        if self.rng.random() < 0.08:
            fact = framed_fact(self.rng, self.mix.odd_values)
            topics = {f.told for f in self.facts.values()}
            if not any(fact.told in topic or topic in fact.told for topic in topics):
                self.facts[fact.told] = fact
                return tell(self.rng, [fact])
        told = {}
        for _ in range(self.rng.choice((1, 1, 1, 2))):
            fact = self._new_fact()
            told[fact.told] = fact
            self.facts[fact.told] = fact
        return tell(self.rng, list(told.values()))

    def _ask(self) -> Exchange:
        fresh = [key for key in self.facts if key not in self.asked]
        key = self.rng.choice(fresh if fresh and self.rng.random() < 0.85 else list(self.facts))
        self.asked.add(key)
        return ask(self.rng, self.facts[key], polite=self.mix.polite)

    def _ask_unknown(self) -> Exchange:
        mix = self.mix
        fact = self._new_fact()
        return ask_unknown(self.rng, fact, polite=mix.polite, answer=mix.unknown_answer)

    def _update(self) -> Exchange:
        plain = [fact for fact in self.facts.values() if not fact.frame]
        if not plain:
            return self._tell()
        old = self.rng.choice(plain)
        kind = "code" if old.value.isdigit() else "word"
        value = value_of(self.rng, kind, held_out=False, odd=self.mix.odd_values)
        self.facts[old.told] = Fact(old.told, old.asked, value)
        self.asked.discard(old.told)
        return update(self.rng, self.facts[old.told])

    def add(self, kind: str) -> None:
        """Append one exchange of `kind`."""
        if kind in ("ask", "update") and not self.facts:
            kind = "tell"
        makers = {
            "tell": self._tell,
            "ask": self._ask,
            "update": self._update,
            "unknown": self._ask_unknown,
            "echo": lambda: echo(self.rng, odd=self.mix.odd_values),
            "arithmetic": lambda: arithmetic(self.rng),
            "small_talk": lambda: small_talk(self.rng),
            "filler": lambda: filler(self.rng, self.rng.randint(*self.mix.filler_sentences)),
        }
        self.exchanges.append(makers[kind]())


def training_conversation(rng: random.Random, mix: Mix, num_words: int) -> list[Exchange]:
    """Return a conversation of at least `num_words` words, for training."""
    conversation = Conversation(rng, mix)
    for _ in range(rng.randint(*mix.first_facts)):
        conversation.add("tell")
    weights = mix.weights()
    total = 0
    while total < num_words:
        conversation.add(rng.choices(tuple(weights), tuple(weights.values()))[0])
        last = conversation.exchanges[-1]
        total += len(last.user.split()) + len(last.assistant.split()) + 3
    return conversation.exchanges
