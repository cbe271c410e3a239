"""The words that dialogues are made of, and which of them training never sees.

Whatever can be enumerated is listed (nouns, names, colours); whatever cannot (codes, dates,
made-up words, pairs of a qualifier and a noun) is held out by a fixed hash, see `is_held_out`.
"""

import random
import zlib

HELD_OUT_ONE_IN = 7


def is_held_out(text: str) -> bool:
    """Say whether `text` (a value, or a pair of words naming a fact) is kept for evaluation."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 3


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


NAMES = _words(
    "anna ben carl dora emma finn greta hugo ida jack kate leo mia noah olga paul rosa sam tina "
    "victor wendy yara zoe adam bella clara david ella frank grace henry iris james karen lucas "
    "maria nina oscar peter ruth simon tom ursula vera walter alice bob eve tim lisa max nora "
    "otto pia ralf sara theo una john mary susan linda robert laura kevin julia mark diana"
)
HELD_OUT_NAMES = _words(
    "albert bruno cecile dmitri edith fatima gustav helga ingrid joshua kirsten lorenzo matilda "
    "nadia orlando priya quentin raquel stefan tamara ulrich valerie wilhelm xenia yusuf zelda"
)
COLOURS = _words(
    "red blue green yellow orange purple pink brown black white grey silver gold violet teal "
    "cream navy amber olive beige"
)
HELD_OUT_COLOURS = _words("crimson indigo turquoise magenta lavender maroon coral ivory")
FOODS = _words(
    "pizza pasta rice soup bread cheese apple banana cherry mango peach salad cake honey tea "
    "coffee milk juice curry noodles potato carrot tomato lemon onion chocolate cookies pancakes "
    "sushi beans"
)
HELD_OUT_FOODS = _words(
    "lasagna spinach papaya falafel pumpkin raspberry omelette walnut ginger pretzel"
)
ANIMALS = _words(
    "dog cat horse rabbit hamster parrot turtle goldfish pony snake lizard mouse duck goat sheep "
    "cow pig hen fox wolf bear lion tiger monkey owl frog"
)
HELD_OUT_ANIMALS = _words("otter badger penguin giraffe falcon beaver hedgehog donkey")
CITIES = _words(
    "paris london berlin rome madrid vienna oslo dublin prague athens lisbon boston chicago "
    "denver tokyo delhi cairo lima sydney toronto geneva milan dallas austin warsaw kyiv"
)
HELD_OUT_CITIES = _words(
    "helsinki stockholm budapest nairobi seattle valencia zurich jakarta montreal glasgow"
)
PLACES = _words(
    "kitchen garage garden office bedroom cellar car drawer kitchen hall attic library bathroom "
    "basement closet cabinet box bag"
)
HELD_OUT_PLACES = _words("pantry workshop laundry cupboard suitcase hallway")
JOBS = _words(
    "teacher doctor baker farmer driver nurse writer painter lawyer pilot cook singer builder "
    "dentist plumber engineer"
)
HELD_OUT_JOBS = _words("carpenter librarian gardener architect butcher tailor")
MONTHS = _words(
    "january february march april may june july august september october november december"
)

# What a fact may be about. A qualifier and a noun make a key such as "gate code".
CODE_QUALIFIERS = _words(
    "gate door locker alarm safe garage office phone bank bike wifi cabin garden cellar hotel "
    "tablet laptop parking house room train flight ticket customer member card box access secret "
    "school library gym pool boat lab server email account"
)
CODE_NOUNS = _words("code pin number password key id token")
FAVOURITES = {
    "colour": "colour color",
    "food": "food dish snack meal fruit drink dessert breakfast",
    "animal": "animal pet",
    "city": "city place town",
    "name": "singer writer actor player teacher",
    "word": "song book movie game band word team brand",
}
THINGS_WITH_COLOUR = _words("car bike house door jacket hat coat shirt bag room hair phone boat")
THINGS_WITH_NAME = _words(
    "dog cat horse boss teacher friend neighbor brother sister mother father son daughter uncle "
    "aunt cousin doctor wife husband boat street school company hamster parrot landlord coach"
)
NUMBER_KEYS = _phrases(
    "age|lucky number|room number|seat number|house number|shoe size|bus number|table number|"
    "gate|platform|floor|apartment number|favorite number|flight number|score|weight|height"
)
DATE_KEYS = _phrases(
    "birthday|wedding day|exam date|flight date|holiday|appointment|first day of school|deadline"
)
CITY_KEYS = _phrases("city|home town|birth place|destination|town|next stop")
JOB_KEYS = _phrases("job|dream job|old job|profession")
NAME_KEYS = _phrases("name|first name|last name|middle name|nickname|user name|full name")
RELATIONS = _words(
    "sister brother mother father friend boss wife husband son daughter uncle aunt cousin neighbor"
)

# What filler is made of: it must look like facts a little, and be about nothing.
FILLER_SUBJECTS = _words(
    "farmer child woman man driver king bird river train wind girl boy student sailor artist "
    "tree mountain village ship cook"
)
FILLER_ADJECTIVES = _words(
    "old young small large quiet happy slow bright tired cold warm strange simple long heavy empty"
)
FILLER_VERBS = _words(
    "saw found bought carried lost painted followed liked opened closed built sold watched moved "
    "cleaned missed"
)
FILLER_OBJECTS = _words(
    "apple lamp stone letter chair basket window rope bottle coat table book wheel boat bridge "
    "road fence clock mirror blanket"
)
FILLER_PLACES = _words(
    "market house river forest station field harbor church school shop beach hill garden bridge "
    "kitchen"
)
FILLER_TIMES = _phrases(
    "in the morning|after dinner|last week|on monday|before noon|at night|in the rain|every day|"
    "in winter|a long time ago|with a friend|without a word|for two hours|on the way home"
)
FILLER_COUNTS = _words("two three four five six seven eight nine ten many some few")

_ANY_WORDS = (
    NAMES, COLOURS, FOODS, ANIMALS, CITIES, PLACES, JOBS, MONTHS, CODE_QUALIFIERS, CODE_NOUNS,
    RELATIONS, FILLER_SUBJECTS, FILLER_ADJECTIVES, FILLER_VERBS, FILLER_OBJECTS, FILLER_PLACES,
)  # fmt: skip
_HELD_OUT_WORDS = frozenset(
    HELD_OUT_NAMES + HELD_OUT_COLOURS + HELD_OUT_FOODS + HELD_OUT_ANIMALS + HELD_OUT_CITIES
    + HELD_OUT_PLACES + HELD_OUT_JOBS
)  # fmt: skip
_ONSETS = _words("b c d f g h j k l m n p r s t v w z br dr fl gr kl pl sk st tr sh th")
_VOWELS = _words("a e i o u a e i o ai ee ou")
_CODAS = ("", "", "", "n", "r", "l", "s", "k", "m", "x", "t", "nd")


def made_up_word(rng: random.Random, *, held_out: bool) -> str:
    """Return a pronounceable word of two or three syllables that no list contains."""
    while True:
        num_syllables = rng.choice((1, 2, 2, 2, 3))
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
            for _ in range(num_syllables)
        )
        if len(word) > 3 and is_held_out(word) == held_out:
            return word


def odd_word(rng: random.Random) -> str:
    """Return a training word of unusual letters: of two halves, of random letters, or of two words.

    Lists alone would leave many pieces of the tokenizer's vocabulary out of every value.
    """
    while True:
        choice = rng.random()
        if choice < 0.6:  # "teacher" and "london" make "teacdon"
            first, second = (rng.choice(rng.choice(_ANY_WORDS)) for _ in range(2))
            word = first[: rng.randint(1, len(first))] + second[rng.randrange(len(second)) :]
        elif choice < 0.8:
            letters = (rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 6)))
            word = "".join(letters)
        elif choice < 0.9:
            word = rng.choice(rng.choice(_ANY_WORDS))
        else:
            word = f"{rng.choice(FILLER_ADJECTIVES + COLOURS)} {rng.choice(FILLER_OBJECTS)}"
        if not is_held_out(word) and word not in _HELD_OUT_WORDS:
            return word


def digits(rng: random.Random, num_digits: int, *, held_out: bool) -> str:
    """Return a string of random digits; from three digits on, some strings are held out."""
    while True:
        text = "".join(rng.choice("0123456789") for _ in range(num_digits))
        if num_digits < 3 or is_held_out(text) == held_out:
            return text
