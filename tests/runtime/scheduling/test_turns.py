"""Whose turn it is where others lend too little."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from vkv.runtime.scheduling.lending.turns import able, who_does_without
from vkv.runtime.scheduling.plan import Plan
from vkv.vmem.errors import OutOfLoans


@dataclass(eq=False)
class _Request:
    is_spread: bool = False
    mending: object = None


def _request(**facts: Any) -> Any:
    return _Request(**facts)


@pytest.mark.parametrize("later_is_spread", [True, False])
def test_the_last_with_tokens_elsewhere_gives_way_or_who_asked_stands_aside(
    later_is_spread: bool,
) -> None:
    """In a tier of its own, too: nobody else could have what it has there."""
    before, asks, last = _request(is_spread=True), _request(), _request()
    later = _request(is_spread=later_is_spread)
    running = [before, asks, later, last]
    assert who_does_without(running, asks) is (later if later_is_spread else asks)
    assert who_does_without(running, _request()) is None  # it waits


def test_nobody_gives_way_for_what_others_have_lost() -> None:
    mends, later = _request(is_spread=True, mending=object()), _request(is_spread=True)
    assert who_does_without([mends, later], mends) is mends


def test_a_plan_keeps_those_that_may_begin_and_whose_places_they_take() -> None:
    def check_loans(request: str) -> None:
        if request == "long":
            raise OutOfLoans("nobody lends")

    segments: Any = SimpleNamespace(check_loans=check_loans)
    names = ("first", "long", "behind")
    keys = tuple((name, 0) for name in names)
    requests: Any = dict(zip(keys, names, strict=True))
    losers = tuple((f"loser of {name}", 0) for name in names)
    plan = Plan(preempt=losers, admit=keys, admit_tokens=9)
    found, refused = able(plan, requests, segments)
    assert (found.preempt, found.admit, found.admit_tokens) == (losers[:1], keys[:1], 9)
    assert refused is not None
    assert refused[0] == "long"
    found, _ = able(Plan(preempt=losers[:1], admit=keys[1:2], admit_tokens=9), requests, segments)
    assert (found.preempt, found.admit, found.admit_tokens) == ((), (), 0)
    for unchanged in (Plan(admit=keys), Plan(preempt=losers[:1])):
        assert able(unchanged, requests, segments) == (unchanged, None)
    assert able(plan, requests, None) == (plan, None)
