"""Texts written beforehand, and a model of a real shape that says them.

All of the model's work is done, but its blocks add nothing to what a token is, and its output layer
says which token follows which. So how much a text repeats itself is known.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ...vmem.errors import InvalidConfig
from .shapes import build_model


@dataclass(frozen=True)
class Script:
    """A prompt, and what the model says after it."""

    prompt: tuple[int, ...]
    said: tuple[int, ...]


def quotations(fresh: Iterator[int], document: int, num_tokens: int) -> Script:
    """A summary: forty tokens of a document, ten of its own."""
    source, said = _take(fresh, document), list[int]()
    for start in range(0, document, 80):
        said += [*source[start : start + 40], *_take(fresh, 10)]
    return Script((*source, next(fresh)), tuple(said[:num_tokens]))


def edits(fresh: Iterator[int], document: int, num_tokens: int) -> Script:
    """Code once more, every 25th token another one."""
    source = _take(fresh, document)
    said = [next(fresh) if i % 25 == 24 else token for i, token in enumerate(source[:num_tokens])]
    return Script((*source, next(fresh)), tuple(said))


def loop(fresh: Iterator[int], document: int, num_tokens: int) -> Script:
    """The same fifty tokens for ever."""
    said = _take(fresh, 50)
    return Script((*said, *said), tuple(said * (num_tokens // 50 + 1))[:num_tokens])


def novel(fresh: Iterator[int], document: int, num_tokens: int) -> Script:
    """What was never said before."""
    return Script(tuple(_take(fresh, 50)), tuple(_take(fresh, num_tokens)))


def misleading(fresh: Iterator[int], document: int, num_tokens: int) -> Script:
    """Every three tokens were said before, and another one followed."""
    said, other = _take(fresh, num_tokens), next(fresh)
    runs = [token for i in range(num_tokens - 3) for token in (*said[i : i + 3], other)]
    return Script((*runs, next(fresh)), tuple(said))


SCRIPTS: Mapping[str, Callable[[Iterator[int], int, int], Script]] = {
    make.__name__: make for make in (quotations, edits, loop, novel, misleading)
}


def write(names: Sequence[str], vocab_size: int, document: int, num_tokens: int) -> list[Script]:
    """Scripts of which none has a token of another. Raises InvalidConfig if there are too few."""
    fresh = iter(range(vocab_size))
    try:
        return [SCRIPTS[name](fresh, document, num_tokens) for name in names]
    except (StopIteration, RuntimeError) as error:
        raise InvalidConfig(
            f"{vocab_size} tokens are too few for texts of {num_tokens} over documents of "
            f"{document}; take a larger shape, or less"
        ) from error


def scripted_model(
    shape: str,
    scripts: Sequence[Script],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    error_rate: float = 0.0,
    vocab_size: int | None = None,
) -> PreTrainedModel:
    """A Llama of a shape that says these scripts, greedily.

    Args:
        error_rate: of the tokens behind which it says another than is written.
        vocab_size: of scripts that were written for a larger shape; None for the shape's own.
    """
    changes = {} if vocab_size is None else {"vocab_size": vocab_size}
    model: Any = build_model(
        shape,
        dtype=dtype,
        device=torch.device("cpu"),
        seed=seed,
        tie_word_embeddings=False,
        **changes,
    )
    follows: dict[int, int] = {}
    for script in scripts:
        tokens = (script.prompt[-1], *script.said)
        for before, after in itertools.pairwise(tokens):
            assert follows.setdefault(before, after) == after, before
    before, after = torch.tensor(list(follows.items())).T
    errs = torch.rand(len(after), generator=torch.Generator().manual_seed(seed)) < error_rate
    before, after = before[~errs], after[~errs]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[after] = model.model.embed_tokens.weight[before]
    return model


def _take(fresh: Iterator[int], count: int) -> list[int]:
    return [next(fresh) for _ in range(count)]
