"""How much is guessed."""

from collections.abc import Mapping, Sequence

from guessing import decoding
from vkv.runtime.request.request import Request, ScheduledRequest
from vkv.runtime.speculation import Drafter, Speculation


class _Sevens(Drafter):
    kind = "sevens"

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def draft(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        self.asked.append(list(wanted.values()))
        return {request: [7] * num for request, num in wanted.items()}

    def close(self) -> None:
        pass


def _lengths(speculation: Speculation, items: list[ScheduledRequest], budget: int) -> list[int]:
    return [len(item.draft) for item in speculation.drafted(items, budget)]


def test_guesses_double_while_they_are_right_and_end_at_the_most() -> None:
    speculation, item = Speculation(_Sevens(), max_tokens=10, max_rows=64), decoding("a")
    seen = []
    for _ in range(4):
        (drafted,) = speculation.drafted([item], 100)
        seen.append(len(drafted.draft))
        speculation.note(drafted, len(drafted.draft))
    assert seen == [4, 8, 10, 10]
    assert speculation.num_drafted == speculation.num_accepted == 32
    speculation.note(drafted, 2)
    assert _lengths(speculation, [item], 100) == [3]


def test_what_is_never_right_is_guessed_ever_more_rarely() -> None:
    speculation, item = Speculation(_Sevens(), max_tokens=8, max_rows=64), decoding("a")
    steps = []
    for step in range(200):
        (drafted,) = speculation.drafted([item], 100)
        if drafted.draft:
            steps.append(step)
            speculation.note(drafted, 0)
    assert steps[:6] == [0, 2, 6, 14, 30, 62]  # 1, 3, 7, 15 and 31 steps are sat out
    assert steps[6:] == [94, 126, 158, 190]


def test_rows_and_budget_are_shared_and_never_exceeded() -> None:
    items = [decoding(name) for name in "abc"]
    for budget, max_rows, expected in (
        (100, 64, [4, 4, 4]),
        (100, 3, [0, 0, 0]),
        (100, 8, [1, 2, 2]),
        (1, 64, [0, 0, 1]),
        (0, 64, [0, 0, 0]),
    ):
        speculation = Speculation(_Sevens(), max_tokens=8, max_rows=max_rows)
        assert _lengths(speculation, items, budget) == expected


def test_nothing_is_guessed_beyond_the_end_nor_of_prompts_nor_of_pending_tokens() -> None:
    ending, prompt, pending = decoding("a", max_tokens=3), decoding("b"), decoding("c")
    prompt.request.token_ids.pop()
    pending.request.num_pending = 1
    speculation = Speculation(_Sevens(), max_tokens=8, max_rows=64)
    assert _lengths(speculation, [ending, prompt, pending], 100) == [1, 0, 0]


def test_nothing_is_guessed_behind_a_token_that_is_not_the_last() -> None:
    """As of a request that gave its slot up, and of which a step has room for one token."""
    again = decoding("a")
    again.request.num_computed = 1
    assert not again.samples
    speculation = Speculation(_Sevens(), max_tokens=8, max_rows=64)
    assert _lengths(speculation, [again, decoding("b")], 100) == [0, 4]
