"""How a request wants its tokens chosen, with vLLM's names and meanings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from ...vmem.errors import InvalidSamplingParams

GREEDY_TEMPERATURE = 1e-5
"""Below this a temperature means greedy, as in vLLM: float32 could not tell the two apart."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the next token, and when to stop.

    Every value is checked on construction. An unknown name, an impossible value or a
    contradiction raises `InvalidSamplingParams`, which names the field and what it allows.

    The sampler applies them in this order: penalties, `logit_bias`, `min_tokens`, `temperature`,
    `top_k`, `top_p`, `min_p`.
    """

    n: int = 1
    """Continuations of the same prompt, at least 1."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy: always the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together hold this mass, in (0, 1]."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest one, in [0, 1]."""
    seed: int | None = None
    """Makes the request repeatable, in any batch; None draws a fresh seed."""
    repetition_penalty: float = 1.0
    """Above 0: divides positive and multiplies negative logits of all tokens seen so far."""
    presence_penalty: float = 0.0
    """Subtracted once from every token generated so far, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted for every time a token was generated so far, in [-2, 2]."""
    logit_bias: Mapping[int, float] | None = None
    """Token id to an addend of its logit, in [-100, 100]."""
    max_tokens: int | None = 16
    """Tokens to generate at most; None: as many as the slot holds."""
    min_tokens: int = 0
    """Tokens to generate before any stop token or stop string may end the output."""
    stop: str | Sequence[str] | None = ()
    """Strings that end the output; read them as a tuple from `stop_strings`."""
    stop_token_ids: Sequence[int] | None = ()
    """Tokens that end the output beside the model's own; kept as a tuple."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (never out of `token_ids`)."""
    logprobs: int | None = None
    """Report each token's log probability, with this many of the likeliest alternatives."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""

    # What `stop` and `stop_token_ids` come to; derived, hence no part of equality or repr.
    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)
    stop_ids: frozenset[int] = field(init=False, repr=False, compare=False)

    def __new__(cls, **options: Any) -> Self:
        # Before `__init__`, whose TypeError could not suggest the name that was meant.
        for name in options:
            if name not in _OPTIONS:
                close = difflib.get_close_matches(name, _OPTIONS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_OPTIONS)}"
                raise InvalidSamplingParams(f"unknown sampling parameter {name!r}: {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_filters()
        self._check_penalties()
        self._check_lengths()
        self._check_flags()
        self._normalise_stops()
        self._normalise_bias()
        self._check_contradictions()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids, and numbers of alternatives, that the model's vocabulary lacks."""
        for name, ids in (("stop_token_ids", self.stop_ids), ("logit_bias", self.logit_bias or ())):
            for token_id in ids:
                if token_id >= vocab_size:
                    _refuse(name, token_id, f"a token id in [0, {vocab_size})")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                _refuse(name, getattr(self, name), f"at most the vocabulary's {vocab_size}")

    def _check_filters(self) -> None:
        self._check_float("temperature", 0.0, math.inf, "a finite number >= 0")
        self._check_float("top_p", 0.0, 1.0, "in (0, 1]", exclude=0.0)
        self._check_float("min_p", 0.0, 1.0, "in [0, 1]")
        self._check_int("top_k", 0, "an integer >= 0, where 0 keeps all tokens")

    def _check_penalties(self) -> None:
        self._check_float("repetition_penalty", 0.0, math.inf, "a finite number > 0", exclude=0.0)
        self._check_float("presence_penalty", -2.0, 2.0, "in [-2, 2]")
        self._check_float("frequency_penalty", -2.0, 2.0, "in [-2, 2]")

    def _check_lengths(self) -> None:
        self._check_int("n", 1, "an integer >= 1")
        self._check_int("min_tokens", 0, "an integer >= 0")
        if self.max_tokens is not None:
            self._check_int("max_tokens", 1, "an integer >= 1, or None for all that fits")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, 0, "an integer >= 0, or None for none")
        if self.seed is not None:
            self._check_int("seed", -(2**63), "a 64-bit signed integer, or None", high=2**63 - 1)

    def _check_flags(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")

    def _normalise_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, Sequence):
            _refuse("stop", stop, "a string or a list of strings")
        for string in stop:
            if not isinstance(string, str) or not string:
                _refuse("stop", string, "a non-empty string")
        stop_token_ids = self.stop_token_ids or ()
        if not isinstance(stop_token_ids, Sequence):
            _refuse("stop_token_ids", stop_token_ids, "a list of token ids")
        for token_id in stop_token_ids:
            if not _is_int(token_id) or token_id < 0:
                _refuse("stop_token_ids", token_id, "a token id: an integer >= 0")
        self._set("stop", tuple(stop))
        self._set("stop_strings", tuple(stop))
        self._set("stop_token_ids", tuple(stop_token_ids))
        self._set("stop_ids", frozenset(stop_token_ids))

    def _normalise_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            _refuse("logit_bias", self.logit_bias, "a mapping of token id to bias, or None")
        for token_id, bias in self.logit_bias.items():
            if not _is_int(token_id) or token_id < 0:
                _refuse("logit_bias", token_id, "a token id: an integer >= 0")
            if not _is_number(bias) or not -100.0 <= bias <= 100.0:
                _refuse(f"logit_bias[{token_id}]", bias, "in [-100, 100]")
        self._set("logit_bias", dict(self.logit_bias))  # the caller's may change later

    def _check_contradictions(self) -> None:
        if self.n > 1 and self.greedy:
            raise InvalidSamplingParams(
                f"n = {self.n} with temperature = {self.temperature}: greedy continuations would "
                "all be the same; set n = 1 or a temperature above 0"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidSamplingParams(
                f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}"
            )

    def _check_float(
        self, name: str, low: float, high: float, allowed: str, *, exclude: float | None = None
    ) -> None:
        value = getattr(self, name)
        # Infinity passes no upper bound of infinity here, and NaN passes no comparison.
        if not (_is_number(value) and math.isfinite(value) and low <= value <= high):
            _refuse(name, value, allowed)
        if value == exclude:
            _refuse(name, value, allowed)

    def _check_int(self, name: str, low: int, allowed: str, *, high: float = math.inf) -> None:
        value = getattr(self, name)
        if not _is_int(value) or not low <= value <= high:
            _refuse(name, value, allowed)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen, but still under construction


_OPTIONS = tuple(f.name for f in SamplingParams.__dataclass_fields__.values() if f.init)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise InvalidSamplingParams(f"{name} = {value!r} is not allowed: it must be {allowed}")
