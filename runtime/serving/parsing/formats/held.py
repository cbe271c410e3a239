"""Calls that a grammar holds the model to: JSON alone, whatever the model's own way."""

from collections.abc import Callable

from ..draft import Draft
from ..json_calls import read_array, read_value
from ..source import Reading, Source


def read_held(
    source: Source,
    draft: Draft,
    *,
    name: str | None,
    otherwise: Callable[[Source, Draft], Reading[None]],
) -> Reading[None]:
    """Read what `tool_grammar` allows.

    Args:
        source: the answer.
        draft: takes what is read.
        name: of the one tool whose arguments the answer is; None for an array of calls.
        otherwise: reads an answer that does not begin so, as it is without a grammar.
    """
    space = yield from source.skip_space()
    char = yield from source.peek()
    if char != ("[" if name is None else "{"):
        draft.content(space)
        yield from otherwise(source, draft)
    elif name is None:
        draft.content((yield from read_array(source, draft)) or "")
    else:
        draft.begin_call(name)
        if (yield from read_value(source, draft.arguments)):
            draft.end_call()
