"""What an output must be: a JSON schema, a regular expression, a choice or a grammar, as data."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ...vmem.errors import InvalidSamplingParams
from .plain_values import HALF_A_PAIR, half_of_a_pair, plain, refuse, strings

KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OF_JSON = ("disable_any_whitespace", "whitespace_pattern")  # what else these kinds may have

MAX_CHARACTERS = {
    "json": 1 << 17,
    "choice": 1 << 17,
    "regex": 1 << 15,
    "grammar": 1 << 15,
    "whitespace_pattern": 1 << 10,
}
"""Of each field. What takes a compiler the square of its length takes it seconds then, not more."""

_MOST_IN_A_TEXT = 1 << 14  # characters of a schema's names and values, among them its patterns

_NOT_HERE = {  # fields of vLLM's, and what to do without them
    "structural_tag": "outputs are held to one grammar from their start; use json or grammar",
    "disable_additional_properties": (
        'write "additionalProperties": false into the schema\'s objects'
    ),
    "backend": "there is one, llguidance; leave it out",
    "disable_fallback": "there is one backend, llguidance; leave it out",
}


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must be, with vLLM's names: exactly one of the first five.

    Every value is checked on construction, and what may be checked without a tokenizer of the
    grammar's text. Raises `InvalidSamplingParams`, which names the field and the remedy.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as a dictionary or as text; kept as text."""
    regex: str | None = None
    """A regular expression that the whole output matches, in the syntax of Rust's `regex`."""
    choice: Sequence[str] | None = None
    """The texts of which the output is one; kept as a tuple."""
    grammar: str | None = None
    """A grammar in Lark's syntax as llguidance has it, or in llama.cpp's GBNF."""
    json_object: bool | None = None
    """True for any JSON object."""
    disable_any_whitespace: bool = False
    """For `json` and `json_object`: no whitespace between JSON's tokens."""
    whitespace_pattern: str | None = None
    """For `json` and `json_object`: the regular expression of whitespace between JSON's tokens."""

    def __new__(cls, **options: Any) -> Self:
        # Before `__init__`, whose TypeError could not suggest the name that was meant.
        for name in options:
            if name in _NOT_HERE:
                raise InvalidSamplingParams(
                    f"structured_outputs has no field {name!r}: {_NOT_HERE[name]}"
                )
            if name not in _FIELDS:
                close = difflib.get_close_matches(name, _FIELDS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_FIELDS)}"
                raise InvalidSamplingParams(f"structured_outputs has no field {name!r}: {hint}")
        return super().__new__(cls)

    @classmethod
    def of(cls, value: Any) -> StructuredOutputsParams | None:
        """From what a caller gives: an object of this class, a mapping of its fields, or None.

        Fields of vLLM's that are not here may be there if they ask for nothing.
        """
        if value is None or isinstance(value, StructuredOutputsParams):
            return value
        if not isinstance(value, Mapping):
            refuse(
                "structured_outputs",
                value,
                "StructuredOutputsParams, or a mapping such as {'json': …}, or None",
            )
        return cls(**{str(name): v for name, v in value.items() if v or name not in _NOT_HERE})

    def __post_init__(self) -> None:
        for name in _FIELDS:
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (True, False, None):
                refuse(f"structured_outputs.{name}", getattr(self, name), "True or False")
            object.__setattr__(self, name, bool(getattr(self, name)))
        kinds = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(kinds) != 1:
            raise InvalidSamplingParams(
                f"structured_outputs has {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}; "
                "give exactly one, or leave structured_outputs out"
            )
        self._normalise()
        for name in _OF_JSON:
            if getattr(self, name) and not self.is_json:
                raise InvalidSamplingParams(
                    f"structured_outputs.{name} is for json and json_object, and this is "
                    f"{kinds[0]}; leave it out"
                )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise InvalidSamplingParams(
                "structured_outputs.disable_any_whitespace contradicts whitespace_pattern; "
                "use one of them"
            )

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @property
    def is_json(self) -> bool:
        """True if the output is JSON."""
        return self.json is not None or bool(self.json_object)

    @property
    def schema_text(self) -> str:
        """The JSON schema as text; of `json` and `json_object` alone."""
        assert self.is_json, self.kind
        return str(self.json) if self.json is not None else '{"type":"object"}'

    def _normalise(self) -> None:
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _texts(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if self.grammar is not None and self.grammar.lstrip().startswith("{"):
            refuse(
                "structured_outputs.grammar", self.grammar[:40], "Lark or GBNF; JSON goes to json"
            )


_FIELDS = tuple(StructuredOutputsParams.__dataclass_fields__)


def _schema_text(value: Any) -> str:
    """A JSON schema as text, spelt alike if it is the same."""
    if not isinstance(value, str | Mapping):
        refuse("structured_outputs.json", value, "a JSON schema: a dictionary, or its text")
    try:
        if isinstance(value, str):
            _check_text("json", value)
            schema = json.loads(value)
        else:
            schema = dict(value)
        # Properties stay in their order, in which they are generated.
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidSamplingParams):
            raise
        raise InvalidSamplingParams(
            f"structured_outputs.json is no JSON: {type(error).__name__}: {error}; give a schema "
            "as a dictionary or as its text (of a pydantic model: .model_json_schema())"
        ) from error
    if not isinstance(schema, dict):
        refuse("structured_outputs.json", schema, "an object; for any JSON value use {}")
    if "x-guidance" in schema:  # which could make keywords be skipped
        refuse(
            "structured_outputs.json['x-guidance']",
            schema["x-guidance"],
            "left out; whitespace is set by disable_any_whitespace and whitespace_pattern",
        )
    _check_text("json", text)
    longest = max(map(len, re.findall(r'"(?:[^"\\]|\\.)*"', text)), default=0)
    if longest > _MOST_IN_A_TEXT:
        raise InvalidSamplingParams(
            f"structured_outputs.json has a text of {longest} characters, and {_MOST_IN_A_TEXT} "
            "are allowed in one; say it in fewer"
        )
    return text


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        refuse("structured_outputs.choice", value, "a list of texts")
    texts = strings("structured_outputs.choice", value)
    if not texts:
        refuse("structured_outputs.choice", texts, "a list of at least one text")
    _check_length("choice", sum(map(len, texts)))
    return texts


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        refuse(f"structured_outputs.{name}", value, "a text that is not empty")
    _check_length(name, len(value))
    if half_of_a_pair(value) is not None:
        refuse(f"structured_outputs.{name}", value, f"text; {HALF_A_PAIR}")


def _check_length(name: str, num_characters: int) -> None:
    if num_characters > MAX_CHARACTERS[name]:
        raise InvalidSamplingParams(
            f"structured_outputs.{name} has {num_characters} characters, and "
            f"{MAX_CHARACTERS[name]} are allowed; say it in fewer"
        )
