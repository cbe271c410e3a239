"""What takes long is done beside the engine's loop; who is gone by then is forgotten."""

import select
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import vocabularies
from vkv import SamplingParams, StructuredOutputsParams
from vkv.runtime.engine.messages import Add
from vkv.runtime.execution.grammars import Grammars
from vkv.runtime.link.preparing import Preparing
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import InvalidSamplingParams


def _add(name: str, **fields: Any) -> Add:
    outputs = StructuredOutputsParams(**fields) if fields else None
    params = SamplingParams(structured_outputs=outputs)
    return Add(RequestSpec(request_id=name, prompt_token_ids=[5], params=params))


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(vocabularies.byte_level(), 520, [1, 2])


@pytest.fixture
def preparing(grammars: Grammars) -> Iterator[Preparing]:
    preparing = Preparing(grammars)
    yield preparing
    preparing.close()


def _take(preparing: Preparing) -> list[Any]:
    assert select.select([preparing], [], [], 60)[0], "nobody rang"
    return preparing.take()


def test_what_needs_no_compiling_goes_on_at_once(grammars: Grammars, preparing: Preparing) -> None:
    assert not preparing.begin(_add("plain"))
    grammars.prepare(StructuredOutputsParams(regex="a"))
    assert not preparing.begin(_add("known", regex="a"))
    without = Preparing(None)
    assert not without.begin(_add("refused by the engine", regex="a"))
    without.close()


def test_what_is_compiled_comes_back(grammars: Grammars, preparing: Preparing) -> None:
    add = _add("a", regex="[a-z]+")
    assert preparing.begin(add)
    assert _take(preparing) == [(add, None)]
    assert grammars.knows(StructuredOutputsParams(regex="[a-z]+"))


def test_a_priority_may_change_meanwhile(preparing: Preparing) -> None:
    assert preparing.begin(_add("a", regex="[b-z]+"))
    preparing.set_priority("a", 7)
    preparing.set_priority("nobody", 7)
    ((found, error),) = _take(preparing)
    assert error is None
    assert (found.spec.request_id, found.spec.priority) == ("a", 7)


def test_a_refusal_comes_back_with_its_request(preparing: Preparing) -> None:
    add = _add("a", json={"not": {}})
    preparing.begin(add)
    ((found, error),) = _take(preparing)
    assert found is add
    assert isinstance(error, InvalidSamplingParams)


def test_who_hangs_up_meanwhile_is_forgotten(
    preparing: Preparing, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Grammars, "prepare", lambda self, outputs: go_on.wait())
    gone, stays = _add("gone", regex="a"), _add("stays", regex="b")
    preparing.begin(gone)
    preparing.begin(stays)
    assert preparing.drop("gone") is gone
    assert preparing.drop("gone") is None
    go_on.set()
    found = _take(preparing)
    while not found:
        found = _take(preparing)
    assert found == [(stays, None)]


def test_other_work_is_done_beside_the_loop(preparing: Preparing) -> None:
    go_on, done = threading.Event(), []
    preparing.do(go_on.wait, lambda: done.append("read"))
    assert not select.select([preparing], [], [], 0)[0]
    go_on.set()
    assert _take(preparing) == []
    for act in preparing.take_finished():
        act()
    assert done == ["read"]
    assert preparing.take_finished() == []
