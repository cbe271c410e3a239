"""What is said between facts: small talk with fixed answers, and stories that mean nothing."""

import random

from . import lexicon

STORY_ANSWER = "i see."

SYSTEM_PROMPTS = (
    "you are a helpful assistant.",
    "you are a helpful assistant. answer in one short sentence.",
    "you are a tiny chat model. remember what the user tells you.",
    "answer the questions of the user.",
    "be brief and friendly.",
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("hello", "hi", "hey", "hello!", "hi there", "hey there", "good morning", "good evening",
         "hello there", "good day", "hello, how is it going", "yo"),
        "hello! tell me something and i will remember it.",
    ),
    (
        ("thanks", "thank you", "thanks a lot", "thank you very much", "great, thanks", "thx",
         "many thanks", "okay, thank you", "perfect, thanks"),
        "you are welcome.",
    ),
    (
        ("how are you?", "how are you doing?", "hello, how are you?", "are you okay?",
         "how do you do?", "hi, how are you?"),
        "i am fine, thank you.",
    ),
    (
        ("who are you?", "what are you?", "what is your name?", "tell me about yourself.",
         "are you a robot?", "are you human?", "who made you?", "what's your name?"),
        "i am a tiny chat model. i remember what you tell me.",
    ),
    (
        ("what can you do?", "help", "help me", "can you help me?", "what do you know?",
         "how does this work?", "what should i say?", "what can i ask you?"),
        "i can remember facts, repeat words and do small sums.",
    ),
    (
        ("bye", "goodbye", "see you", "good night", "see you later", "bye bye", "i have to go"),
        "goodbye!",
    ),
    (
        ("okay", "ok", "yes", "no", "good", "great", "nice", "cool", "very good", "well done",
         "i see", "sure", "fine", "right", "correct", "wow"),
        "good.",
    ),
    (
        ("tell me a joke", "tell me a story", "sing a song", "write a poem", "tell me something",
         "say something funny", "write some code"),
        "i am too small for that. i can remember facts.",
    ),
    (
        ("what is the capital of {p}?", "who is the king of {p}?", "what is the weather like?",
         "what time is it?", "what is the meaning of life?", "how far is {p}?", "where is {p}?",
         "why is the sky blue?", "what do you think of {p}?", "who was {p}?", "how old is {p}?",
         "when was {p} built?", "why?", "how?", "what?", "which one?"),
        "i do not know that.",
    ),
)  # fmt: skip


def sentence(rng: random.Random) -> str:
    """Return a simple sentence without a full stop, such as "the old king lost two letters"."""
    adjective = f"{rng.choice(lexicon.FILLER_ADJECTIVES)} " if rng.random() < 0.5 else ""
    subject = f"the {adjective}{rng.choice(lexicon.FILLER_SUBJECTS)}"
    form = rng.random()
    if form < 0.15:
        return f"{subject} was {rng.choice(lexicon.FILLER_ADJECTIVES)}"
    if form < 0.25:
        return f"{subject} is {rng.choice(lexicon.FILLER_ADJECTIVES)}"
    if form < 0.5:
        place = rng.choice(lexicon.FILLER_PLACES)
        return f"{subject} went to the {place} {rng.choice(lexicon.FILLER_TIMES)}"
    count = rng.choice(("a", "the", "the", rng.choice(lexicon.FILLER_COUNTS)))
    thing = f"{count} {rng.choice(lexicon.FILLER_OBJECTS)}"
    return (
        f"{subject} {rng.choice(lexicon.FILLER_VERBS)} {thing} {rng.choice(lexicon.FILLER_TIMES)}"
    )
