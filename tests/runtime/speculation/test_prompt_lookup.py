"""What is guessed from a text's own tokens."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from vkv import SamplingParams
from vkv.runtime.request.request import Request
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.speculation import PromptLookup


def _request(tokens: Sequence[int]) -> Request:
    params = SamplingParams(max_tokens=100)
    spec = RequestSpec(request_id="r", prompt_token_ids=tuple(tokens), params=params)
    return Request(spec, max_tokens=100, sampling=SamplingState(params, tokens))


def _draft(tokens: Sequence[int], num_tokens: int = 4) -> list[int]:
    request = _request(tokens)
    return PromptLookup().draft({request: num_tokens})[request]


def test_a_text_goes_on_as_it_did() -> None:
    assert _draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == [4, 5, 6, 7]


def test_what_never_came_is_not_guessed() -> None:
    assert _draft([1, 2, 3, 4, 5, 6]) == []
    assert _draft([1, 2, 9, 1, 2]) == []  # two tokens alone say too little
    assert _draft([1]) == _draft([1, 2]) == _draft([1, 2, 3]) == []


def test_the_longest_equal_run_counts_and_of_equals_the_latest() -> None:
    longest = [9, 1, 2, 3, 50, 51, 8, 1, 2, 3, 60, 61, 9, 1, 2, 3]
    assert _draft(longest, 2) == [50, 51]
    latest = [7, 1, 2, 3, 50, 51, 8, 1, 2, 3, 60, 61, 9, 1, 2, 3]
    assert _draft(latest, 2) == [60, 61]


def test_a_loop_is_guessed_beyond_its_end() -> None:
    assert _draft([5, 6, 7, 5, 6, 7, 5], 8) == [6, 7, 5, 6, 7, 5, 6, 7]
    assert _draft([4, 4, 4, 4], 5) == [4] * 5


def test_a_long_prompt_is_taken_in_step_by_step() -> None:
    drafter, request = PromptLookup(), _request([*range(20_000), 100, 101, 102])
    guesses = [drafter.draft({request: 2})[request] for _ in range(4)]
    assert guesses == [[], [], [103, 104], [103, 104]]


def test_tokens_that_come_later_are_looked_up_too() -> None:
    drafter, request = PromptLookup(), _request([1, 2, 3])
    assert drafter.draft({request: 2})[request] == []
    for token in (8, 9, 1, 2, 3):
        request.token_ids.append(token)
        found = drafter.draft({request: 2})[request]
    assert found == [8, 9]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_each_guess_follows_an_equal_run(tokens: list[int], num_tokens: int) -> None:
    drafted = _draft(tokens, num_tokens)
    runs = [tokens[i : i + 3] for i in range(len(tokens) - 3)]  # those that something follows
    assert bool(drafted) == (tokens[-3:] in runs and len(tokens) > 3)
    if drafted:
        assert len(drafted) == num_tokens
        text = tokens + drafted
        places = [i for i in range(3, len(tokens)) if tokens[i - 3 : i] == tokens[-3:]]
        assert any(text[place : place + num_tokens] == drafted for place in places)
