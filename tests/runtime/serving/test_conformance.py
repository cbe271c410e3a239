"""The server answers as the table of conformance says, and the page is the table."""

import json
from typing import Any

import pytest
from conformance import ANY, PAGE, ROWS, Row, page
from served import Served, events


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.route}: {row.asks}")
def test_row(served: Served, row: Row) -> None:
    answer = served.client.request(row.method, row.path, json=row.body)
    assert answer.status_code == row.status, answer.text
    told: Any
    if answer.headers["content-type"].startswith("text/event-stream"):
        data = events(answer.text.splitlines())
        told = [one if one == "[DONE]" else json.loads(one) for one in data]
    else:
        told = answer.json()
    for place, expected in row.finds.items():
        found = _at(told, place)
        assert found is not _NOTHING, (place, told)
        assert expected is ANY or found == expected, place
    for place in row.lacks:
        assert _at(told, place) is _NOTHING, place
    if row.words:
        assert row.words in told["error"]["message"]


_NOTHING = object()


def _at(told: Any, place: str) -> Any:
    for part in place.split("."):
        try:
            told = told[int(part) if isinstance(told, list) else part]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return told


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/support/conformance.py"


def test_every_route_that_answers_is_in_it() -> None:
    assert len(ROWS) >= 40
    routes = {row.path for row in ROWS}
    assert routes >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
    }


def test_no_two_rows_ask_the_same() -> None:
    names = [(row.route, row.asks) for row in ROWS]
    assert len(set(names)) == len(names)
