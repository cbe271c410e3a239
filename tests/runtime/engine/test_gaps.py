"""What others lose of a request is computed again, exactly that, and its tokens are the same."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import borrowing
import pytest
import torch
from borrowing import Lent, expected_of, specs_of, tokens_of
from transformers import PreTrainedModel
from vkv.allocator.transfer import copier
from vkv.runtime.engine.engine import Engine
from vkv.runtime.request.request import Request, RequestState
from vkv.vmem.errors import InvalidOperation, OutOfSlots

_PART = 512
_PROMPT, _OUTPUT = 2300, 40
_ALL = ("1", "2", "3", "4")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return borrowing.model()


@pytest.fixture(scope="module")
def expected(llama: PreTrainedModel) -> list[list[int]]:
    """Of a long request and a short neighbour."""
    return expected_of(llama, _specs())


@pytest.fixture(scope="module")
def engines(llama: PreTrainedModel) -> Iterator[Lent]:
    with Lent(llama, 5, max_batch_tokens=256) as lent:
        yield lent


@pytest.fixture
def lent(engines: Lent) -> Iterator[Lent]:
    """Engines that all lend, and have nothing of before."""
    for request in engines.engines[0].requests:  # of a test that failed
        engines.engines[0].abort(request.key[0])
    for name in _ALL:
        engines.servers[name].close()  # whether or not it was noticed
        engines.meet(name)
    for engine in engines.engines:
        engine.trim()
    yield engines
    assert not engines.engines[0].has_work
    engines.check_nothing_left()


def _specs() -> list[borrowing.RequestSpec]:
    return specs_of([_PROMPT, 30], _OUTPUT)


class _Counted:
    """Says how many tokens an engine has computed since, and what it says of them."""

    def __init__(self, lent: Lent) -> None:
        self._lent = lent
        self._before = self._now()

    def _now(self) -> tuple[int, int, int, int]:
        stats = self._lent.engines[0].stats()
        assert stats.segments is not None
        redone, mended = stats.segments.redone_tokens, stats.segments.mended_tokens
        return stats.num_computed_tokens, mended, redone, stats.num_preemptions

    def check(self, *, again: int) -> None:
        """So many tokens were computed again, each of them lost, and nobody lost a slot."""
        computed, mended, redone, preempted = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )
        assert (mended, redone, preempted) == (again, 0, 0)
        assert computed == _PROMPT + 30 + 2 * (_OUTPUT - 1) + again

    @property
    def redone(self) -> int:
        return self._now()[2] - self._before[2]


def _begun(lent: Lent) -> list[Request]:
    """A long request with a part at each of three, and its neighbour."""
    lent.place(at_1=_PART, at_2=_PART, at_3=_PART)
    requests = [lent.engines[0].add(spec)[0] for spec in _specs()]
    lent.drive(lambda: requests[0].num_output_tokens > 3)
    assert [one.holder for one in requests[0].lent] == ["1", "2", "3"]
    return requests


def _keys(lent: Lent, name: str) -> torch.Tensor:
    """All bytes of what an engine lends, part by part."""
    server, found = lent.servers[name], []
    for loan in sorted(server.loans.values(), key=lambda loan: loan.start):
        for start in range(0, loan.stop - loan.start, _PART):
            spans = server.cache.spans(loan.slot, start, start + _PART)
            found += [piece.clone() for stream in spans for piece in stream]
    return torch.cat(found)


# -- exactly what was lost -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", [("1",), ("2",), ("3",), ("1", "3"), ("2", "3"), ("1", "2", "3")], ids="".join
)
def test_what_was_lost_is_computed_again_and_no_more(
    lent: Lent, expected: list[list[int]], lost: Sequence[str]
) -> None:
    counted = _Counted(lent)
    requests = _begun(lent)
    before = torch.cat([_keys(lent, name) for name in lost])
    for name in lost:
        lent.servers[name].close()
    lent.drive(lambda: requests[0].mending is not None)
    lent.place(at_1=_PART, at_2=_PART, at_3=_PART, at_4=3 * _PART)
    lent.drive(lambda: requests[0].mending is None and not set(lost) & set(_holders(requests[0])))
    assert not requests[0].is_finished
    assert set(_holders(requests[0])) == {"1", "2", "3", "4"} - set(lost)
    found, before = _keys(lent, "4").view(torch.float32), before.view(torch.float32)
    torch.testing.assert_close(found, before)
    lent.drive()
    assert tokens_of(requests) == expected
    counted.check(again=len(lost) * _PART)


def _holders(request: Request) -> list[str]:
    return [one.holder for one in request.all_lent]


def test_to_the_bit_where_steps_are_repeatable() -> None:
    model = borrowing.model(hidden_size=64, head_dim=16, dtype=torch.bfloat16)
    options = {"repeatable": True, "max_batch_tokens": 200}
    with Lent(model, 5, **options) as lent:
        requests = _begun(lent)
        before = _keys(lent, "2")
        lent.servers["2"].close()
        lent.place(at_1=_PART, at_3=_PART, at_4=_PART)
        lent.drive(lambda: lent.loans.mended_tokens > 0)
        assert torch.equal(_keys(lent, "4"), before)
        lent.drive()
        assert tokens_of(requests) == expected_of(model, _specs(), repeatable=True)


def test_a_loan_that_was_ended_leaves_the_others(lent: Lent, expected: list[list[int]]) -> None:
    counted = _Counted(lent)
    requests = _begun(lent)
    (number,) = lent.servers["2"].loans
    lent.servers["2"].call_back(number)
    lent.drive()
    assert tokens_of(requests) == expected
    counted.check(again=_PART)
    assert list(lent.loans.creditors) == ["1", "2", "3", "4"]


def test_who_has_room_itself_needs_nobody(llama: PreTrainedModel, lent: Lent) -> None:
    """Of a request that would fit alone, the lost tokens come to lie before those in its slot."""
    specs = specs_of([600, 560, 1000], 60, 60, 4)
    lent.place(at_1=3 * _PART)
    requests = [lent.engines[0].add(spec)[0] for spec in specs]
    lent.drive(lambda: requests[2].is_finished)
    (spread,) = [request for request in requests if request.lent]
    lost = sum(one.stop - one.start for one in spread.lent)
    before = lent.loans.mended_tokens
    lent.servers["1"].close()
    lent.drive(lambda: not spread.is_spread)
    assert not spread.is_finished
    assert lent.loans.mended_tokens == before + lost
    lent.drive()
    assert tokens_of(requests) == expected_of(llama, specs)


@pytest.mark.parametrize("options", [{"overlap": True}, {"swap_memory": 40 * 8192}], ids=str)
def test_kinds_of_engines(
    llama: PreTrainedModel, expected: list[list[int]], options: dict[str, object]
) -> None:
    with Lent(llama, 4, max_batch_tokens=256, **options) as lent:
        lent.place(at_1=_PART, at_2=_PART, at_3=_PART)
        requests = [lent.engines[0].add(spec)[0] for spec in _specs()]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        lent.servers[_holders(requests[0])[0]].close()
        lent.place(at_1=_PART, at_2=_PART, at_3=3 * _PART)
        lent.drive()
        assert tokens_of(requests) == expected
        assert lent.loans.mended_tokens > 0
        assert lent.engines[0].stats().num_preemptions == 0


# -- while it is under way -----------------------------------------------------------------------


def _in_the_gap(lent: Lent, lost: str = "2") -> list[Request]:
    """Some of the lost tokens are computed, and some are not."""
    requests = _begun(lent)
    lent.servers[lost].close()
    request = requests[0]
    lent.drive(lambda: request.mending is not None and request.num_computed > request.slot_start)
    assert request.num_computed % _PART
    lent.place(at_1=_PART, at_2=_PART, at_3=_PART, at_4=3 * _PART)
    return requests


@pytest.mark.parametrize("next_lost", ["1", "3"])
def test_one_more_is_lost_meanwhile(lent: Lent, expected: list[list[int]], next_lost: str) -> None:
    """Before the gap, so that there are two; and behind it, which is found out afterwards."""
    counted = _Counted(lent)
    requests = _in_the_gap(lent)
    lent.servers[next_lost].close()
    lent.drive()
    assert tokens_of(requests) == expected
    counted.check(again=2 * _PART)


def test_what_lies_behind_a_gap_moves_on_when_it_is_called(
    lent: Lent, expected: list[list[int]]
) -> None:
    counted = _Counted(lent)
    requests = _in_the_gap(lent)
    assert [one.holder for one in requests[0].behind[0].lent] == ["3"]
    lent.place(["3"], at_1=_PART, at_3=0, at_4=3 * _PART)
    lent.drive(lambda: not lent.loans.num_lent("3"))
    assert requests[0].mending is not None
    lent.drive()
    assert tokens_of(requests) == expected
    counted.check(again=_PART)


def _abort(engine: Engine, request: Request) -> None:
    engine.abort(request.key[0])


def _finish(engine: Engine, request: Request) -> None:
    engine.finish(*request.key)


@pytest.mark.parametrize("end", [_abort, _finish])
def test_one_that_ends_leaves_nothing(
    lent: Lent, expected: list[list[int]], end: Callable[[Engine, Request], None]
) -> None:
    requests = _in_the_gap(lent)
    end(lent.engines[0], requests[0])
    assert requests[0].is_finished
    lent.drive()
    assert tokens_of(requests[1:]) == expected[1:]


def _preempt(engine: Engine, request: Request) -> None:
    engine.scheduler.preempt(request)


def _change(engine: Engine, request: Request) -> None:
    engine.weights_changed()


@pytest.mark.parametrize("take", [_preempt, _change])
def test_one_that_loses_its_slot_begins_anew(
    lent: Lent, expected: list[list[int]], take: Callable[[Engine, Request], None]
) -> None:
    requests = _in_the_gap(lent)
    take(lent.engines[0], requests[0])
    assert requests[0].state is RequestState.WAITING
    assert requests[0].slots == []
    lent.drive()
    assert tokens_of(requests) == expected


# -- without room ----------------------------------------------------------------------------------


def test_where_nobody_takes_them_in_all_is_computed_again(
    lent: Lent, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vkv.runtime.scheduling.lending.gaps._PATIENCE_S", 0.05)
    counted = _Counted(lent)
    requests = _begun(lent)
    lent.servers["2"].close()
    lent.place(at_1=_PART, at_3=_PART)
    lent.drive(lambda: requests[0].state is RequestState.WAITING)
    lent.drive(lambda: requests[1].is_finished)  # which goes on meanwhile
    assert counted.redone > _PROMPT
    lent.place(at_1=_PART, at_3=_PART, at_4=_PART)
    lent.drive()
    assert tokens_of(requests) == expected


def test_where_memory_is_short_all_is_computed_again(
    lent: Lent, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = _Counted(lent)
    requests = _begun(lent)
    lent.servers["2"].close()
    cache = lent.engines[0].cache
    other = cache.open()
    cache.grow(other, 800)  # somebody else's; less than a part is left beside the long one
    lent.drive(lambda: requests[0].state is RequestState.WAITING)
    assert counted.redone > _PROMPT
    cache.close(other)
    lent.place(at_1=_PART, at_3=_PART, at_4=_PART)
    lent.drive()
    assert tokens_of(requests) == expected


def test_where_slots_are_short_nobody_gives_way_and_all_is_computed_again(
    lent: Lent, expected: list[list[int]]
) -> None:
    counted = _Counted(lent)
    lent.place(at_1=3 * _PART)
    requests = [lent.engines[0].add(spec)[0] for spec in _specs()]
    lent.drive(lambda: requests[0].num_output_tokens > 3)
    lent.servers["1"].close()
    lent.drive(lambda: requests[0].mending is not None)
    lent.place(at_4=4 * _PART)
    cache, others = lent.engines[0].cache, []
    with contextlib.suppress(OutOfSlots):
        while True:
            others.append(cache.open())  # the gap is longer than a slot, and would need another
    lent.drive(lambda: requests[0].state is RequestState.WAITING)
    assert requests[1].state is not RequestState.WAITING
    assert counted.redone > _PROMPT
    for slot in others:
        cache.close(slot)
    lent.drive()
    assert tokens_of(requests) == expected


# -- at random -----------------------------------------------------------------------------------


class _Faults:
    """What may happen between two steps, at random."""

    def __init__(self, lent: Lent, draw: random.Random) -> None:
        self._lent = lent
        self._draw = draw
        self.copies_fail = False

    def strike(self) -> None:
        """One of them."""
        self._draw.choice([self._lose, self._end_loan, self._preempt, self._place, self._place])()
        self._lent.engines[0].cache.check_invariants()

    def _lose(self) -> None:
        name = self._draw.choice(_ALL)
        self._lent.servers[name].close()

    def _end_loan(self) -> None:
        server = self._lent.servers[self._draw.choice(_ALL)]
        for number in list(server.loans)[:1]:
            server.call_back(number)

    def _preempt(self) -> None:
        running = self._lent.engines[0].scheduler.running
        if running and self._draw.random() < 0.2:
            self._lent.engines[0].scheduler.preempt(self._draw.choice(running))

    def _place(self) -> None:
        self.meet()
        limits = {f"at_{name}": self._draw.choice([0, 1, 2, 3]) * _PART for name in _ALL}
        self._lent.place(self._draw.sample(_ALL, self._draw.choice([0, 0, 1])), **limits)

    def meet(self) -> bool:
        """Those that were lost may be asked again, once nothing is thought to be there still."""
        for name in _ALL:
            if name not in self._lent.loans.creditors and not self._lent.loans.num_lent(name):
                self._lent.meet(name)
        return False

    def heal(self) -> None:
        """No fault from now on."""
        self.copies_fail = False
        self._lent.place(**{f"at_{name}": 3 * _PART for name in _ALL})


@pytest.mark.parametrize("seed", range(4))
def test_faults_at_random_cost_no_token_and_no_page(
    llama: PreTrainedModel, lent: Lent, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vkv.runtime.scheduling.lending.gaps._PATIENCE_S", 0.02)
    draw = random.Random(seed)
    specs = specs_of([2300, 1700, 600, 30], 50)
    faults = _Faults(lent, draw)
    copy = copier._copy

    def flaky(*args: object) -> None:
        if faults.copies_fail and draw.random() < 0.3:
            raise InvalidOperation("a copy that fails")
        copy(*args)

    monkeypatch.setattr(copier, "_copy", flaky)
    faults.heal()
    requests = lent.engines[0].add(specs[0])
    lent.drive(lambda: bool(requests[0].lent))
    lent.servers[requests[0].lent[0].holder].close()
    lent.drive(lambda: requests[0].mending is not None)
    requests += [lent.engines[0].add(spec)[0] for spec in specs[1:]]
    faults.copies_fail = True
    for _ in range(25):
        at = lent.engines[0].num_computed_tokens + draw.choice([1, 30, 300])
        lent.drive(lambda at=at, e=lent.engines[0]: e.num_computed_tokens >= at or _is_stuck(e))
        faults.strike()
    faults.heal()
    lent.drive(faults.meet)
    assert tokens_of(requests) == expected_of(llama, specs)


def _is_stuck(engine: Engine) -> bool:
    return engine.scheduler.shortage is not None
