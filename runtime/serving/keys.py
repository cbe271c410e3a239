"""Keys that callers show, and whose they are."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...vmem.errors import InvalidConfig

_FORM = "write KEY, KEY tenant=NAME or KEY tenant=NAME weight=NUMBER"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key.

    Attributes:
        text: the secret.
        tenant: whose it is; what is told of tenants is told by it.
        weight: the tenant's part, where the file says one.
    """

    text: str
    tenant: str
    weight: float | None = None


def read_keys(given: Sequence[str], file: Path | None) -> tuple[Key, ...]:
    """The keys that were given, those of the environment's VKV_API_KEY, and a file's.

    A key of which the file says no name is a tenant of its own, called by its number. Raises
    InvalidConfig, which shows no key.
    """
    if not all(text.strip() for text in given):
        raise InvalidConfig(
            "an api_key is empty, and would let everybody in; give a key, or leave it out"
        )
    texts = [*given, *os.environ.get("VKV_API_KEY", "").split(",")]
    said: dict[str, dict[str, str]] = {text.strip(): {} for text in texts if text.strip()}
    if file is not None:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                text, *words = line.split()
                said[text] = _said(words, f"api_key_file {file}, line {number}")
        if not said:
            raise InvalidConfig(
                f"api_key_file {file} has no key; write one a line, or leave it out"
            )
    return tuple(
        Key(
            text=text,
            tenant=words.get("tenant", f"key-{number}"),
            weight=float(words["weight"]) if "weight" in words else None,
        )
        for number, (text, words) in enumerate(said.items(), start=1)
    )


def tenant_weights(keys: Sequence[Key]) -> dict[str, float]:
    """By tenant, of those of whom one is said. Raises InvalidConfig if two differ."""
    weights: dict[str, float] = {}
    for key in keys:
        if key.weight is not None and weights.setdefault(key.tenant, key.weight) != key.weight:
            raise InvalidConfig(
                f"tenant {key.tenant!r} has the weights {weights[key.tenant]:g} and "
                f"{key.weight:g}; say one"
            )
    return weights


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"api_key_file {file}: {error}") from error


def _said(words: Sequence[str], where: str) -> dict[str, str]:
    """What stands behind a key."""
    pairs = [word.partition("=") for word in words]
    said = {name: value for name, _, value in pairs}
    if len(said) < len(words) or said.keys() - {"tenant", "weight"} or "" in said.values():
        raise InvalidConfig(f"{where}: what stands behind the key is not understood; {_FORM}")
    if "weight" in said:
        try:
            weight = float(said["weight"])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise InvalidConfig(
                f"{where}: weight is {said['weight']!r}; use a finite number above 0"
            )
    return said
