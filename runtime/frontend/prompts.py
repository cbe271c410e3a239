"""What callers may pass as prompts, brought into one form."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ...vmem.errors import InvalidPrompt, InvalidSamplingParams
from ..request.plain_values import half_of_a_pair, is_int, plain, plain_list, refuse
from ..request.sampling_params import SamplingParams
from .tokenizer import check_text

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or vLLM's `{"prompt": …}` and `{"prompt_token_ids": …}`."""
Message = Mapping[str, Any]

_NO_TEXT = (bytes, bytearray, memoryview)
_REMEDY = "give a text, a list of token ids, or a list of either"
_OF_A_DICT = ("prompt", "prompt_token_ids", "cache_salt")
_MOST_PRIORITY = 1 << 53  # beyond it, a float does not tell two neighbours apart
_LONGEST_TENANT = 256  # characters


@dataclass(frozen=True, kw_only=True)
class PlainPrompt:
    """A prompt whatever it was given as.

    Attributes:
        text: None where only tokens were given.
        token_ids: None where they are still to be made of the text.
        salt: prefixes are shared among prompts of one salt alone.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    salt: str = ""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a request stands among others: `priority` and `tenant` as of `RequestSpec`.

    Raises InvalidSamplingParams.
    """

    priority: int = 0
    tenant: str = ""

    def __post_init__(self) -> None:
        priority, tenant = plain(self.priority), self.tenant
        if not is_int(priority) or abs(priority) > _MOST_PRIORITY:
            refuse("priority", priority, "an integer, the lower the earlier")
        object.__setattr__(self, "priority", priority)
        is_name = isinstance(tenant, str) and len(tenant) <= _LONGEST_TENANT
        if not is_name or half_of_a_pair(tenant) is not None:
            refuse("tenant", tenant, f"a text of at most {_LONGEST_TENANT} characters")


DEFAULT_STANDING = Standing()
"""Where nothing is said of it."""


def standings(priority: Any, tenant: Any, count: int) -> list[Standing]:
    """Standings for each of `count` prompts: one value for all, or one for each.

    Raises InvalidSamplingParams.
    """
    priorities = _for_each("priority", "priorities", priority, count)
    tenants = _for_each("tenant", "tenants", tenant, count)
    return [
        Standing(priority=one, tenant=its) for one, its in zip(priorities, tenants, strict=True)
    ]


@dataclass(frozen=True)
class Maker:
    """Whom a prompt is completed by: an adapter or a model beside the engine's own, by name."""

    adapter: str | None = None
    model: str | None = None


ITSELF = Maker()


def makers_for_each(adapter: Any, model: Any, count: int) -> list[Maker]:
    """Names of adapters and models for each of `count` prompts: one or None for all, or one each.

    Raises InvalidSamplingParams for another number of them.
    """
    adapters = _for_each("adapter", "adapters", adapter, count)
    return list(map(Maker, adapters, _for_each("model", "models", model, count)))


def _for_each(name: str, plural: str, given: Any, count: int) -> list[Any]:
    several = None if isinstance(given, set | frozenset) else plain_list(given)
    if several is None:
        return [given] * count
    if len(several) != count:
        raise InvalidSamplingParams(
            f"{len(several)} {plural} for {count} prompts; give one {name}, or one for each"
        )
    return several


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. Raises InvalidPrompt."""
    prompts = _as_list(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, _NO_TEXT):
        _refuse_bytes(prompts)
    if not isinstance(prompts, Sequence):
        raise InvalidPrompt(f"prompts is a {type(prompts).__name__}; {_REMEDY}")
    if prompts and _is_number(prompts[0]):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_plain(prompt: Prompt) -> PlainPrompt:
    """Text or plain integers of a prompt. Raises InvalidPrompt."""
    if isinstance(prompt, str):
        return PlainPrompt(text=prompt)
    if isinstance(prompt, Mapping):
        return _of_dict(prompt)
    return PlainPrompt(token_ids=_as_token_ids(prompt))


def is_message(given: Any) -> bool:
    """Whether it is a conversation's message, or was meant as one."""
    return isinstance(given, Mapping) and bool(given.keys() & {"role", "content"})


def is_conversation(given: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(given, list | tuple) and bool(given) and is_message(given[0])


def are_conversations(given: Any) -> bool:
    """Whether it is a list of conversations."""
    return isinstance(given, list | tuple) and bool(given) and isinstance(given[0], list | tuple)


def refuse_conversation(prompt: Any) -> None:
    """Raises InvalidPrompt for a message or a conversation, where a plain prompt must be."""
    if is_message(prompt) or is_conversation(prompt):
        raise InvalidPrompt(
            f"{reprlib.repr(prompt)} is a conversation, and generate() completes texts; use chat()"
        )


def params_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    """Parameters for each of `count` prompts, or None. Raises InvalidSamplingParams."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple):
        check_params(params)
    if len(params) != count:
        raise InvalidSamplingParams(
            f"{len(params)} sampling parameters for {count} prompts; give one, or one for each"
        )
    return list(params)


def check_params(params: Any) -> None:
    """Raises InvalidSamplingParams for what are no sampling parameters."""
    if not isinstance(params, SamplingParams):
        how = "SamplingParams(**…)" if isinstance(params, Mapping) else "SamplingParams(…)"
        raise InvalidSamplingParams(
            f"the parameters are {type(params).__name__} {reprlib.repr(params)}; use {how}"
        )


def _of_dict(prompt: Mapping[str, Any]) -> PlainPrompt:
    if is_message(prompt):
        raise InvalidPrompt(
            f"{reprlib.repr(dict(prompt))} is one message, and a conversation is a list of them; "
            "put it in a list"
        )
    given = {name: value for name, value in prompt.items() if value is not None}
    for name in given:
        if name not in _OF_A_DICT:
            raise InvalidPrompt(
                f"a prompt's {name!r} is not understood: models take text alone here; a prompt has "
                f"{', '.join(_OF_A_DICT)}"
            )
    text, tokens, salt = given.get("prompt"), given.get("prompt_token_ids"), given.get("cache_salt")
    if text is None and tokens is None:
        raise InvalidPrompt(
            f"{reprlib.repr(dict(prompt))} is no prompt; use {{'prompt': …}} or "
            "{'prompt_token_ids': …}"
        )
    for name, value in (("prompt", text), ("cache_salt", salt)):
        if value is not None and not isinstance(value, str):
            raise InvalidPrompt(f"a prompt's {name!r} is {reprlib.repr(value)}; give a text")
        check_text(value or "", what=f"a prompt's {name!r}")
    return PlainPrompt(
        text=text, token_ids=None if tokens is None else _as_token_ids(tokens), salt=salt or ""
    )


def _as_token_ids(prompt: Any) -> list[int]:
    """Plain integers. Raises InvalidPrompt."""
    if isinstance(prompt, _NO_TEXT):
        _refuse_bytes(prompt)
    tokens = _as_list(prompt)
    if isinstance(tokens, Sequence) and not isinstance(tokens, str):
        if all(type(token) is int for token in tokens):
            return list(tokens)
        tokens = [token.item() if getattr(token, "ndim", None) == 0 else token for token in tokens]
        if all(type(token) is int for token in tokens):
            return tokens
    raise InvalidPrompt(
        f"{reprlib.repr(prompt)} is neither a text nor a list of token ids, which are plain "
        "integers"
    )


def _as_list(given: Any) -> Any:
    """An array's elements; anything else as it is."""
    return given.tolist() if getattr(given, "ndim", 0) > 0 and hasattr(given, "tolist") else given


def _is_number(given: Any) -> bool:
    return isinstance(given, int | float) or getattr(given, "ndim", None) == 0


def _refuse_bytes(given: Any) -> NoReturn:
    raise InvalidPrompt(
        f"{reprlib.repr(given)} is a {type(given).__name__}, and prompts are text: decode it as "
        "what it is, such as .decode('utf-8')"
    )
