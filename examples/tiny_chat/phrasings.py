"""How things are said: each list has a twin that training never sees.

`{k}` stands for what a fact is about ("my gate code"), `{v}` for its value.
"""

from dataclasses import dataclass

ACKNOWLEDGED = "okay, noted."

UNKNOWN_ANSWER = "{k} is not known to me."
# Until the last stage the answer is another one. It was never learnt, for it has to be decided on
# before the fact is looked up; the one above has "not" where the lookup would find the value.
EARLY_UNKNOWN_ANSWER = "you have not told me {k}."

STATEMENTS = (
    "{k} is {v}", "{k} is {v}", "{k} is {v}", "{k} is {v}", "{k} is now {v}",
    "remember that {k} is {v}", "please remember that {k} is {v}", "remember: {k} is {v}",
    "note that {k} is {v}", "by the way, {k} is {v}", "just so you know, {k} is {v}",
    "i want you to know that {k} is {v}", "fyi {k} is {v}", "for later: {k} is {v}",
    "{k}: {v}", "{k} = {v}", "i set {k} to {v}", "{k} is set to {v}", "hi, {k} is {v}",
    "i think {k} is {v}", "okay, {k} is {v}", "and {k} is {v}", "please note: {k} is {v}",
    "you should remember {k} is {v}", "keep in mind: {k} is {v}", "hello! {k} is {v}",
    "save this: {k} is {v}", "{k} will be {v}", "do not forget: {k} is {v}",
    "today i learned that {k} is {v}", "well, {k} is {v}",
)  # fmt: skip
HELD_OUT_STATEMENTS = (
    "please keep in mind that {k} is {v}", "hey, please note that {k} is {v}",
    "you should know that {k} is {v}", "i want you to remember that {k} is {v}",
    "okay, please remember: {k} is {v}", "do not forget that {k} is {v}",
    "and by the way, i set {k} to {v}", "well, for later, {k} is {v}",
    "just remember {k} is {v}", "so you know: {k} is {v}",
)  # fmt: skip
UPDATES = (
    "{k} is now {v}", "i changed {k} to {v}", "{k} changed to {v}", "actually, {k} is {v}",
    "from now on {k} is {v}", "my mistake, {k} is {v}", "update: {k} is {v}",
)  # fmt: skip
HELD_OUT_UPDATES = (
    "actually, i changed {k} to {v}", "my mistake, {k} is now {v}", "from now on, {k} is now {v}",
)  # fmt: skip
QUESTIONS = (
    "what is {k}?", "what is {k}?", "what is {k}?", "what's {k}?", "what was {k}?",
    "tell me {k}.", "please tell me {k}.", "can you tell me {k}?", "do you remember {k}?",
    "do you know {k}?", "remind me of {k}.", "what is {k} again?", "{k}?", "give me {k}.",
    "i forgot {k}. what is it?", "please tell me what {k} is.", "so what is {k}?",
    "do you know what {k} is?", "say {k}.", "hey, what is {k}?", "can you say what {k} was?",
    "what did i say {k} is?", "i need {k}.", "i need to know {k}.", "and {k}?", "and what is {k}?",
    "could you tell me what {k} is?", "which is {k}?", "okay, what is {k}?",
)  # fmt: skip
HELD_OUT_QUESTIONS = (
    "could you remind me what {k} is?", "what did i say {k} was?", "i need {k}, what is it?",
    "please give me {k}.", "so what is {k} again?", "can you remind me of {k}, please?",
    "do you remember what {k} is?", "hey, tell me {k} again.", "okay, and what was {k}?",
    "i forgot what {k} is. can you tell me?",
)  # fmt: skip
AROUND_QUESTIONS = (
    ("sorry, ", ""), ("excuse me, ", ""), ("one question: ", ""), ("oh, ", ""), ("hello, ", ""),
    ("", " please."), ("", " can you tell me?"), ("", " do you know?"), ("", " i forgot."),
    ("", " thanks."), ("", ", please?"), ("sorry, ", " can you help me?"), ("", " help me."),
)  # fmt: skip
ECHOES = (
    "repeat after me: {v}", "repeat: {v}", "say: {v}", "please repeat: {v}", "echo: {v}",
    "say this: {v}", "please say: {v}", "repeat this: {v}", "now say: {v}", "echo {v}",
    "repeat after me {v}",
)  # fmt: skip
HELD_OUT_ECHOES = ("please repeat after me: {v}", "now repeat this: {v}", "please echo: {v}")
SUMS = (
    "what is {a} {o} {b}?", "{a} {o} {b}", "{a} {o} {b} = ?", "how much is {a} {o} {b}?",
    "what's {a} {o} {b}?", "calculate {a} {o} {b}", "tell me {a} {o} {b}.", "{a} {o} {b}?",
    "can you calculate {a} {o} {b}?", "what is {a} {w} {b}?", "how much is {a} {w} {b}?",
    "{a} {w} {b}",
)  # fmt: skip
HELD_OUT_SUMS = (
    "please calculate {a} {o} {b}", "so how much is {a} {o} {b}?", "tell me {a} {w} {b}.",
)  # fmt: skip
OPERATOR_WORDS = {"+": "plus", "-": "minus", "*": "times"}


@dataclass(frozen=True)
class Frame:
    """A fact told as a sentence of its own form, with its question and its answer."""

    topic: str  # two frames of one topic would contradict each other
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    kind: str


_NAME = ("i am called {v}", "call me {v}", "i am {v}", "people call me {v}", "hello, i am {v}")
FRAMES = (
    Frame("my name", _NAME, ("what is my name?", "who am i?", "what am i called?"),
          "your name is {v}.", "name"),
    Frame("i live", ("i live in {v}", "i moved to {v}", "my home is in {v}"),
          ("where do i live?", "do you remember where i live?", "where is my home?"),
          "you live in {v}.", "city"),
    Frame("i was born", ("i was born in {v}", "i come from {v}"),
          ("where was i born?", "where do i come from?", "where am i from?"),
          "you were born in {v}.", "city"),
    Frame("i work", ("i work as a {v}", "i am working as a {v}"),
          ("what do i work as?", "what do i do for work?", "what is my work?"),
          "you work as a {v}.", "job"),
    Frame("i like", ("i like {v}", "i really like {v}", "i love {v}"),
          ("what do i like?", "what do i love?", "do you know what i like?"),
          "you like {v}.", "food"),
    Frame("i am old", ("i am {v} years old", "i turned {v} years old"),
          ("how old am i?", "do you know how old i am?", "what is my age?"),
          "you are {v} years old.", "number"),
    *(
        Frame(f"my {pet}",
              (f"i have a {pet} called {{v}}", f"my {pet} is called {{v}}",
               f"i have a {pet} named {{v}}"),
              (f"what is my {pet} called?", f"how is my {pet} called?",
               f"do you remember what my {pet} is called?"),
              f"your {pet} is called {{v}}.", "name")
        for pet in ("dog", "cat", "horse", "parrot", "boat", "rabbit", "hamster")
    ),
    *(
        Frame(f"my {things}",
              (f"my {things} are in the {{v}}", f"i left my {things} in the {{v}}",
               f"i put my {things} in the {{v}}"),
              (f"where are my {things}?", f"where did i put my {things}?",
               f"do you know where my {things} are?"),
              f"your {things} are in the {{v}}.", "place")
        for things in ("keys", "glasses", "shoes", "tickets", "books", "gloves", "letters")
    ),
)  # fmt: skip
