"""What an output should be, and what is wrong with one that is not."""

from dataclasses import dataclass

from ...runtime.request.outputs import RequestOutput

CUT = "its client went away"  # in place of a finish reason


@dataclass(frozen=True)
class Right:
    """An output, or what it should be."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


Turn = tuple[Right, ...]
"""The outputs of one turn."""


def rights_of(output: RequestOutput) -> Turn:
    """The outputs of a request."""
    return tuple(
        Right(tuple(one.token_ids), one.text, one.finish_reason, one.stop_reason)
        for one in output.outputs
    )


def differs(found: Right, right: Right) -> tuple[str, int] | None:
    """What is wrong with an output, and how many of its tokens; None if it is right.

    One whose client went away must begin as what is right does.
    """
    pairs = zip(found.token_ids, right.token_ids, strict=False)
    wrong = [place for place, (one, other) in enumerate(pairs) if one != other]
    if wrong:
        at = wrong[0]
        return (
            f"token {at} is {found.token_ids[at]} in place of {right.token_ids[at]}, and "
            f"{len(wrong)} of {len(right.token_ids)} differ",
            len(wrong),
        )
    if len(found.token_ids) > len(right.token_ids):
        more = len(found.token_ids) - len(right.token_ids)
        return f"{more} tokens come after the last, {len(right.token_ids)}", more
    if found.finish_reason == CUT:
        return None
    if found != right:
        return f"it is {_told(found)} in place of {_told(right)}", 0
    return None


def _told(one: Right) -> str:
    return (
        f"{len(one.token_ids)} tokens, {one.finish_reason}, {one.stop_reason!r}, {one.text[-20:]!r}"
    )
