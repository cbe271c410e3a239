"""How a request wants its tokens chosen, with vLLM's names and meanings."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ...vmem.errors import InvalidSamplingParams
from .plain_values import is_int, is_number, plain, refuse, strings, token_ids
from .structured_outputs import StructuredOutputsParams

GREEDY_TEMPERATURE = 1e-5
"""Below this a temperature means greedy, as in vLLM: float32 could not tell the two apart."""

ALL_TOKENS = 2**31 - 1
"""More than any vocabulary: what -1 comes to in `logprobs` and `prompt_logprobs`."""

_FLAGS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
)
_NO_BEAMS = "there is no beam search; use n with a temperature, and choose by cumulative_logprob"
_NOT_HERE = {  # parameters of vLLM's and of transformers', and what to do without them
    "best_of": "use n, and choose among the outputs by cumulative_logprob",
    "use_beam_search": _NO_BEAMS,
    "beam_width": _NO_BEAMS,
    "num_beams": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "early_stopping": _NO_BEAMS,
    "logits_processors": "use allowed_token_ids, bad_words or logit_bias",
    "guided_decoding": "use structured_outputs",
    "guided_json": "use structured_outputs={'json': …}",
    "guided_regex": "use structured_outputs={'regex': …}",
    "guided_choice": "use structured_outputs={'choice': […]}",
    "guided_grammar": "use structured_outputs={'grammar': …}",
    "guided_json_object": "use structured_outputs={'json_object': True}",
    "guided_decoding_backend": "there is one, llguidance; use structured_outputs",
    "guided_whitespace_pattern": "use structured_outputs={'json': …, 'whitespace_pattern': …}",
    "response_format": "use structured_outputs={'json': …}, or {'json_object': True}",
    "output_kind": "LLM.stream gives what is new, AsyncLLM all so far, LLM.generate the end",
    "flat_logprobs": "log probabilities are a dictionary for each token; leave it out",
    "extra_args": "nothing would read them; leave it out",
    "skip_reading_prefix_cache": (
        "use LLM(prefix_reuse=False), or a prompt with a cache_salt of its own"
    ),
    "thinking_token_budget": "use max_tokens",
    "repetition_detection": "use repetition_penalty, frequency_penalty or stop",
    "max_new_tokens": "use max_tokens",
    "num_return_sequences": "use n",
    "do_sample": "use temperature, where 0 takes the likeliest token",
    "eos_token_id": "use stop_token_ids",
    "stop_strings": "use stop",
    "bad_words_ids": "use bad_words",
    "no_repeat_ngram_size": "use repetition_penalty or frequency_penalty",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the next token, and when to stop.

    Every value is checked on construction. An unknown name, an impossible value or a
    contradiction raises `InvalidSamplingParams`, which names the field and what it allows. Numbers
    may be numpy's or torch's, and lists may be sets or arrays; they are kept as Python's own.

    The sampler applies them in this order: penalties, `logit_bias`, `min_tokens`,
    `allowed_token_ids`, `bad_words` and `structured_outputs`, `temperature`, `top_k`, `top_p`,
    `min_p`.
    """

    n: int = 1
    """Continuations of the same prompt, at least 1."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy: always the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together hold this mass, in (0, 1]."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all, and so does vLLM's -1."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest one, in [0, 1]."""
    seed: int | None = None
    """Makes the draws the same in any batch, and so the tokens as far as the logits are
    (`LLM(repeatable=True)`). By default a fresh seed is drawn, as with vLLM's -1."""
    repetition_penalty: float = 1.0
    """Above 0: divides positive and multiplies negative logits of all tokens seen so far."""
    presence_penalty: float = 0.0
    """Subtracted once from every token generated so far, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted for every time a token was generated so far, in [-2, 2]."""
    logit_bias: Mapping[int, float] | None = None
    """Token id to an addend of its logit, in [-100, 100]."""
    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may come, end-of-sequence among them if it is to end; None for all."""
    bad_words: str | Sequence[str] | None = ()
    """Texts that must not come, as the tokenizer spells them, with a space before them or without.

    The same letters may still come from other tokens."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must be: a JSON schema, a regular expression, a choice or a grammar. May be
    given as a mapping of the fields. An output that is whole ends, whatever else is asked."""
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
    """Show what ended the output: the stop string, or the stop token's text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (never out of `token_ids`)."""
    spaces_between_special_tokens: bool = True
    """True alone: tokens are joined as the tokenizer's own decoder joins them."""
    detokenize: bool = True
    """Make text of the tokens; without, `text` is empty and log probabilities have no texts."""
    logprobs: int | None = None
    """Report each token's log probability, with this many of the likeliest tokens; -1 for all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    truncate_prompt_tokens: int | None = None
    """Use the prompt's last so many tokens, the tokenizer's begin-of-sequence token among them;
    -1: as many as the slot holds beside `max_tokens`."""

    # What `stop` and `stop_token_ids` come to; derived, hence no part of equality or repr.
    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)
    stop_ids: frozenset[int] = field(init=False, repr=False, compare=False)

    def __new__(cls, **options: Any) -> Self:
        # Before `__init__`, whose TypeError could not suggest the name that was meant.
        for name in options:
            if name in _NOT_HERE:
                raise InvalidSamplingParams(
                    f"there is no sampling parameter {name!r}: {_NOT_HERE[name]}"
                )
            if name not in _OPTIONS:
                close = difflib.get_close_matches(name, _OPTIONS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_OPTIONS)}"
                raise InvalidSamplingParams(f"unknown sampling parameter {name!r}: {hint}")
        return super().__new__(cls)

    @classmethod
    def from_optional(cls, **options: Any) -> Self:
        """As the class itself, but None means the default; of `max_tokens` it means no limit."""
        given: dict[str, Any] = {
            name: value
            for name, value in options.items()
            if value is not None or name == "max_tokens"
        }
        return cls(**given)

    def __post_init__(self) -> None:
        for name in _OPTIONS:
            self._set(name, plain(getattr(self, name)))
        self._check_filters()
        self._check_penalties()
        self._check_lengths()
        self._check_flags()
        self._normalise_lists()
        self._normalise_bias()
        self._set("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        self._check_contradictions()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids, and numbers of alternatives, that the model's vocabulary lacks.

        Raises InvalidSamplingParams.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            largest = max(getattr(self, name) or (), default=0)
            if largest >= vocab_size:
                refuse(name, largest, f"a token id in [0, {vocab_size})")
        for name in ("logprobs", "prompt_logprobs"):
            if vocab_size < (getattr(self, name) or 0) < ALL_TOKENS:
                refuse(name, getattr(self, name), f"at most the vocabulary's {vocab_size}")

    def _check_filters(self) -> None:
        self._check_float("temperature", 0.0, math.inf, "a finite number >= 0")
        self._check_float("top_p", 0.0, 1.0, "in (0, 1]", exclude=0.0)
        self._check_float("min_p", 0.0, 1.0, "in [0, 1]")
        self._exchange("top_k", -1, 0)
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
            self._exchange(name, -1, ALL_TOKENS)
            if getattr(self, name) is not None:
                self._check_int(name, 0, "an integer >= 0, -1 for all tokens, or None for none")
        if self.truncate_prompt_tokens is not None:
            allowed = "an integer >= 1, -1 for all that fits, or None"
            self._check_int("truncate_prompt_tokens", -1, allowed)
            if self.truncate_prompt_tokens == 0:
                refuse("truncate_prompt_tokens", 0, allowed)
        self._exchange("seed", -1, None)
        if self.seed is not None:
            self._check_int("seed", -(2**63), "a 64-bit signed integer, or None")

    def _check_flags(self) -> None:
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                refuse(name, getattr(self, name), "True or False")
        if not self.spaces_between_special_tokens:
            refuse("spaces_between_special_tokens", False, "True: the tokenizer's decoder decides")

    def _normalise_lists(self) -> None:
        for name in ("stop", "bad_words"):
            self._set(name, strings(name, getattr(self, name)))
        self._set("stop_strings", self.stop)
        self._set("stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids))
        self._set("stop_ids", frozenset(self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            allowed = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                refuse(
                    "allowed_token_ids", allowed, "None for all tokens, or at least one token id"
                )
            self._set("allowed_token_ids", allowed)

    def _normalise_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            refuse("logit_bias", self.logit_bias, "a mapping of token id to bias, or None")
        biases: dict[int, float] = {}
        for token_id, bias in ((plain(t), plain(b)) for t, b in self.logit_bias.items()):
            if not is_int(token_id) or token_id < 0:
                refuse("logit_bias", token_id, "a token id: an integer >= 0")
            if not is_number(bias) or not -100.0 <= bias <= 100.0:
                refuse(f"logit_bias[{token_id}]", bias, "in [-100, 100]")
            biases[int(token_id)] = bias
        self._set("logit_bias", biases)

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
        if self.stop_strings and not self.detokenize:
            raise InvalidSamplingParams(
                f"stop = {self.stop!r} with detokenize = False: stop strings are looked for in the "
                "text; use stop_token_ids, or detokenize"
            )

    def _check_float(
        self, name: str, low: float, high: float, allowed: str, *, exclude: float | None = None
    ) -> None:
        value = getattr(self, name)
        # NaN passes no comparison, and an integer may be larger than any float.
        if not is_number(value) or not low <= value <= min(high, sys.float_info.max):
            refuse(name, value, allowed)
        if value == exclude:
            refuse(name, value, allowed)
        self._set(name, float(value))

    def _check_int(self, name: str, low: int, allowed: str) -> None:
        value = getattr(self, name)
        if not is_int(value) or value < low:
            refuse(name, value, allowed)
        if value >= 2**63:
            refuse(name, value, "a 64-bit signed integer")
        self._set(name, int(value))

    def _exchange(self, name: str, sentinel: int, meaning: int | None) -> None:
        """Put what it means in the place of a number that vLLM has for it."""
        value = getattr(self, name)
        if is_int(value) and value == sentinel:
            self._set(name, meaning)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen, but still under construction


_OPTIONS = tuple(f.name for f in SamplingParams.__dataclass_fields__.values() if f.init)
