"""How much is guessed by a model: what pays, on a clock of the test's."""

import random

import pytest
from guessing import decoding
from vkv.runtime.request.request import Request, ScheduledRequest
from vkv.runtime.speculation import Drafter, Speculation


class _Model(Drafter):
    """Guesses sevens; each takes a while."""

    kind = "draft"
    takes_time = True

    def __init__(self, clock: "_Clock", seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def draft(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:  # type: ignore[override]
        self._clock.now_s += self._seconds * max(wanted.values())
        return {request: [7] * num for request, num in wanted.items()}


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _run(
    chance: float, *, draft_s: float, num_steps: int = 4000, num_requests: int = 1
) -> tuple[float, Speculation]:
    """Tokens a second with guesses that are right by some chance, as a multiple of without."""
    clock, chances = _Clock(), random.Random(1)
    speculation = Speculation(_Model(clock, draft_s), max_tokens=8, max_rows=64, clock=clock)
    items = [decoding(f"{i}", max_tokens=10**9) for i in range(num_requests)]
    num_tokens = 0
    for _ in range(num_steps):
        drafted = speculation.drafted(items, 1000)
        clock.now_s += 1 + 0.05 * max(len(item.draft) for item in drafted)
        came = {item.request: 1 + _num_right(item, chance, chances) for item in drafted}
        num_computed = [item.request.num_computed for item in drafted]
        speculation.note_step(drafted, came)
        for item, num in zip(drafted, num_computed, strict=True):
            item.request.num_computed = num  # the requests stay where they are
        num_tokens += sum(came.values())
    return num_tokens / num_requests / clock.now_s, speculation


def _num_right(item: ScheduledRequest, chance: float, chances: random.Random) -> int:
    hits = [chances.random() < chance for _ in item.draft]
    return hits.index(False) if False in hits else len(hits)


@pytest.mark.parametrize("num_requests", [1, 5])
@pytest.mark.parametrize("draft_s", [0.1, 0.25, 0.6, 2.0])
def test_guesses_that_are_never_right_cost_next_to_nothing(
    draft_s: float, num_requests: int
) -> None:
    speed, speculation = _run(0.0, draft_s=draft_s, num_requests=num_requests)
    assert 0.97 < speed < 1
    assert 0 < speculation.num_drafted < 1000 * num_requests  # it goes on to try, rarely


@pytest.mark.parametrize(
    ("chance", "draft_s", "least"),
    # The best of constant lengths gives 2.10, 1.55, 2.84 and 1.17.
    [(0.8, 0.1, 1.95), (0.8, 0.25, 1.45), (0.95, 0.15, 2.7), (0.9, 0.6, 1.1)],
)
def test_guesses_that_pay_are_as_long_as_pays_most(
    chance: float, draft_s: float, least: float
) -> None:
    speed, _ = _run(chance, draft_s=draft_s)
    assert speed > least


def test_a_model_that_gets_better_is_seen_to() -> None:
    clock = _Clock()
    speculation = Speculation(_Model(clock, 0.1), max_tokens=8, max_rows=64, clock=clock)
    item, lengths = decoding("a", max_tokens=10**9), []
    for step in range(4000):
        (drafted,) = speculation.drafted([item], 1000)
        clock.now_s += 1 + 0.05 * len(drafted.draft)
        num_right = 0 if step < 2000 else len(drafted.draft)
        speculation.note_step([drafted], {item.request: 1 + num_right})
        item.request.num_computed = 3
        lengths.append(len(drafted.draft))
    assert sum(map(bool, lengths[1000:2000])) < 300
    assert sum(map(bool, lengths[3000:])) > 900


def test_what_raises_is_not_asked_again() -> None:
    class Broken(_Model):
        num_calls = 0

        def draft(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:  # type: ignore[override]
            self.num_calls += 1
            raise RuntimeError("a damaged model")

    clock = _Clock()
    drafter = Broken(clock, 0)
    speculation = Speculation(drafter, max_tokens=8, max_rows=64, clock=clock)
    for _ in range(20):
        (item,) = speculation.drafted([decoding("a")], 100)
        clock.now_s += 1
        speculation.note_step([item], {item.request: 1})
        assert item.draft == ()
    assert drafter.num_calls == 1
