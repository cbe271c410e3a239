"""How much to guess where guessing takes time: as much as pays, by what it took and brought lately.

With `a` the chance that a guess is right, a step with `k` guesses brings `1 + a + … + a^k` tokens,
and takes as long as a plain one, `k` steps of whoever guesses and what more there is to verify.

Source: Leviathan et al., arXiv:2211.17192, section 3, with all times measured.
"""

from collections import deque
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ..request.request import Request

_ALLOWANCE = 0.02  # of all time: what trials may cost where guessing does not pay
_LEAST_GAIN = 1.03  # tokens a second, as a multiple, for which it does
_NUM_KNOWN = 5  # times from which it is known how long something takes
# Of the last few the lower quartile counts: so not steps that were recorded, or disturbed.
_NUM_KEPT = 7
_PLAIN_EVERY = 128  # steps with guesses: then one without, to see how long that takes now
_FORGET = 0.95  # of what is known of a request's luck, for each further guess
_FEW_UNSEEN = 32  # tokens, which a guess is charged for as if they were none
# What is assumed before anything is known: who asks for guesses has reason to hope.
_HOPED_LUCK, _HOPED_WEIGHT = 0.8, 4.0
_HOPED_DRAFT, _HOPED_EXTRA = 0.25, 0.05  # of a plain step, for each guess


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What a step took, and what was guessed in it.

    Attributes:
        num_decodes: requests that decode.
        is_plain_batch: no prompt was computed beside them.
        num_drafted: guesses that it verified.
        longest: guesses of one request, at most.
        num_caught_up: as of `Drafter`.
        draft_s, step_s: seconds of guessing, and of the step itself.
    """

    num_decodes: int
    is_plain_batch: bool
    num_drafted: int
    longest: int
    num_caught_up: int
    draft_s: float
    step_s: float


@dataclass
class _Times:
    """The last few of something's times; what it takes as a rule."""

    kept: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    num_seen: int = 0

    def add(self, value: float) -> None:
        self.kept.append(value)
        self.num_seen += 1

    @property
    def usual(self) -> float:
        return sorted(self.kept)[len(self.kept) // 4]


@dataclass
class _Luck:
    """How many guesses were right, and wrong; what is long ago counts less."""

    hits: float = 0.0
    misses: float = 0.0

    def note(self, num_hits: int, num_misses: int, forget: float) -> None:
        fade = forget ** (num_hits + num_misses)
        self.hits = fade * self.hits + num_hits
        self.misses = fade * self.misses + num_misses

    def chance(self, hoped: float, weight: float) -> float:
        return (self.hits + weight * hoped) / (self.hits + self.misses + weight)


class Worth:
    """Guesses as many tokens as pay, for each request by its own luck.

    Where none pay, a few are guessed now and then, to see whether that has changed. Such trials
    cost no more than a part of all time (`_ALLOWANCE`) in the long run.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._lucks: WeakKeyDictionary[Request, _Luck] = WeakKeyDictionary()
        self._luck = _Luck()  # of all requests
        self._plain_s: dict[int, _Times] = {}  # a step without guesses, by requests that decode
        self._draft = _Times()  # a guess, in plain steps
        self._extra: dict[int, _Times] = {}  # verifying, by guesses of a request; in plain steps
        self._unseen_s = _Times()  # of a token that who guesses had not seen
        self._credit_s = 0.0
        self._num_since_plain = 0
        self._num_trials = self._num_paying = 0  # requests that this step guesses for

    def length(self, request: Request, num_decodes: int, num_unseen: int) -> int:
        """As of `Pace`."""
        plain = self._plain_s.get(num_decodes)
        if plain is None or plain.num_seen < _NUM_KNOWN or self._num_since_plain >= _PLAIN_EVERY:
            return 0
        chance = self._chance(request)
        length = max(range(1, self._max_tokens + 1), key=lambda k: self._gain(chance, k))
        gain = self._gain(chance, length)
        if gain >= _LEAST_GAIN and self._repays(request, num_unseen, gain, num_decodes):
            self._num_paying += 1
            return length
        if self._credit_s < 0:
            return 0
        self._num_trials += 1
        return length

    def note(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """As of `Pace`."""
        num_misses = int(num_accepted < num_drafted)  # what follows a wrong guess says nothing
        luck = self._lucks.setdefault(request, _Luck())
        luck.note(num_accepted, num_misses, _FORGET)
        self._luck.note(num_accepted, num_misses, _FORGET)

    def note_step(self, times: StepTimes) -> None:
        """As of `Pace`."""
        trials = self._num_trials / max(1, self._num_trials + self._num_paying)
        self._num_trials = self._num_paying = 0
        cost_s = times.draft_s
        plain = self._plain_s.setdefault(times.num_decodes, _Times())
        if times.is_plain_batch:
            if not times.num_drafted:
                plain.add(times.step_s)
                self._num_since_plain = 0
            elif plain.kept:
                self._num_since_plain += 1
                extra_s = max(0.0, times.step_s - plain.usual)
                self._extra.setdefault(times.longest, _Times()).add(extra_s / plain.usual)
                cost_s += extra_s
            self._note_draft(times, plain)
        self._credit_s += _ALLOWANCE * times.step_s - trials * cost_s
        self._credit_s = min(self._credit_s, times.step_s / 2)

    def _note_draft(self, times: StepTimes, plain: _Times) -> None:
        if not times.draft_s or not plain.kept:
            return
        if times.num_caught_up > _FEW_UNSEEN:
            self._unseen_s.add(times.draft_s / times.num_caught_up)
        elif times.longest:
            self._draft.add(times.draft_s / times.longest / plain.usual)

    def _chance(self, request: Request) -> float:
        """That a guess of a request is right: by its own luck, and at first by everyone's."""
        everyone = self._luck.chance(_HOPED_LUCK, _HOPED_WEIGHT)
        luck = self._lucks.get(request)
        return everyone if luck is None else luck.chance(everyone, _HOPED_WEIGHT)

    def _gain(self, chance: float, length: int) -> float:
        """Tokens a second with guesses of some length, as a multiple of without."""
        tokens = sum(chance**k for k in range(length + 1))
        draft = self._draft.usual if self._draft.num_seen >= _NUM_KNOWN else _HOPED_DRAFT
        return tokens / (1 + draft * length + self._extra_of(length))

    def _extra_of(self, length: int) -> float:
        """What more a step takes to verify guesses of some length, in plain steps."""
        if not self._extra:
            return _HOPED_EXTRA * length
        nearest = min(self._extra, key=lambda known: abs(known - length))
        return self._extra[nearest].usual * max(1, length / nearest)

    def _repays(self, request: Request, num_unseen: int, gain: float, num_decodes: int) -> bool:
        """Whether what is to be computed before the first guess comes in again."""
        if num_unseen <= _FEW_UNSEEN or not self._unseen_s.kept:
            return True
        left = request.max_tokens - request.num_output_tokens
        saved_s = self._plain_s[num_decodes].usual / num_decodes * left * (1 - 1 / gain)
        return saved_s > num_unseen * self._unseen_s.usual
