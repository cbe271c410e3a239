"""What callers pass for a number or a list, as plain Python: numpy's, torch's and sets too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any, NoReturn

from ...vmem.errors import InvalidSamplingParams


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raise InvalidSamplingParams that names a parameter, its value and what is allowed."""
    raise InvalidSamplingParams(f"{name} = {value!r} is not allowed: it must be {allowed}")


def plain(value: Any) -> Any:
    """A number or text as Python's own type, if it is a scalar of numpy or torch; or as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def plain_list(value: Any) -> list[Any] | None:
    """The elements of a list, tuple, set or one-dimensional array; None for anything else.

    Those of a set are in no order yet.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        return None
    return [plain(element) for element in value] if isinstance(value, Collection) else None


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Texts to look for: a string, several, or None for none. Raises InvalidSamplingParams."""
    value = plain(value)
    found = [value] if isinstance(value, str) else [] if value is None else plain_list(value)
    if found is None:
        refuse(name, value, "a string or a list of strings")
    for string in found:
        if not isinstance(string, str) or not string:
            refuse(name, string, "a non-empty string, or a list of these")
        if half_of_a_pair(string) is not None:
            refuse(name, string, f"text; {HALF_A_PAIR}")
    texts = [str.__str__(string) for string in found]
    return tuple(sorted(texts) if isinstance(value, Set) else texts)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, or none for None. Raises InvalidSamplingParams."""
    found = [] if value is None else plain_list(value)
    if found is None:
        refuse(name, value, "a list of token ids")
    for token_id in found:
        if not is_int(token_id) or token_id < 0:
            refuse(name, token_id, "a token id: an integer >= 0")
    ids = [int(token_id) for token_id in found]
    return tuple(sorted(ids) if isinstance(value, Set) else ids)


HALF_A_PAIR = (
    "a lone surrogate is no character, and stands for a byte that is no UTF-8: decode the bytes as "
    "what they are, or with errors='replace'"
)


def half_of_a_pair(text: str) -> int | None:
    """Where a text has its first lone surrogate, which no tokenizer takes; None without one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
