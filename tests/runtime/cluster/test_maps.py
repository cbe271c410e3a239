"""Maps of several instances: none waits for one that is silent, and what was counted stays."""

import asyncio
import time
from typing import Any

import msgspec
import pytest
import zoo
from vkv import LLM
from vkv.allocator import PageRuns
from vkv.runtime.cluster.instances import maps
from vkv.runtime.cluster.instances.maps import Maps, Seen
from vkv.runtime.cluster.stats import ClusterStats, Done, Member, MoveUnderWay
from vkv.runtime.engine.memory.memory_map import (
    AdapterShown,
    Counters,
    LentSlot,
    MemoryMap,
    Stretch,
    Strip,
    Traffic,
)
from vkv.runtime.serving.cluster_map import ClusterMaps, Loans
from vkv.vmem.errors import EngineDied


@pytest.fixture(scope="module")
def drawn() -> MemoryMap:
    with LLM(zoo.tiny_model("llama"), **zoo.with_defaults({})) as llm:
        return llm.loop.memory_map()


class _Link:
    """The way to an instance that answers when it is told to."""

    def __init__(self, instance: int) -> None:
        self.instance = instance
        self.num_asked = 0
        self.answer: asyncio.Future[Any] | None = None

    def ask(self, question: str) -> "asyncio.Future[Any]":
        assert question == "memory_map"
        self.num_asked += 1
        self.answer = asyncio.get_running_loop().create_future()
        return self.answer


class _Quick(_Link):
    def __init__(self, instance: int, drawn: MemoryMap) -> None:
        super().__init__(instance)
        self._drawn = drawn

    def ask(self, question: str) -> "asyncio.Future[Any]":
        future = super().ask(question)
        future.set_result(msgspec.structs.replace(self._drawn, num_running=self.num_asked))
        return future


def test_one_that_is_silent_is_shown_as_it_was_and_asked_once(
    drawn: MemoryMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "_SILENT_S", 0.3)

    async def test() -> None:
        seen, quick, slow = Maps(), _Quick(0, drawn), _Link(1)
        links: Any = [quick, slow]
        assert set(await seen.look(links)) == {0}
        assert slow.answer is not None
        slow.answer.set_result(drawn)
        assert (await seen.look(links))[1] == Seen(drawn, False)
        began_s = time.monotonic()
        for _ in range(3):
            found = await seen.look(links)
        assert time.monotonic() - began_s < 5
        assert found[0].map.num_running == 5
        assert found[1] == Seen(drawn, True)
        assert slow.num_asked == 2
        slow.answer.set_exception(EngineDied("it is gone"))
        assert set(await seen.look(links)) == {0, 1}  # asked once more, and not there any longer
        assert set(await seen.look([links[0]])) == {0}
        assert set(await seen.look([])) == set()

    asyncio.run(test())


def test_an_instance_that_ends_while_it_is_asked_is_no_error() -> None:
    unheard: list[Any] = []

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(what))
        seen, gone, stays = Maps(), _Link(0), _Link(1)
        links: Any = [gone, stays]
        await seen.look(links)
        assert gone.answer is not None
        gone.answer.set_exception(EngineDied("it is gone"))
        gone.answer = None
        await seen.look(links[1:])

    asyncio.run(test())
    assert unheard == []


def _counting(drawn: MemoryMap, steps: int) -> Seen:
    counters = Counters(steps * 3, steps * 2, steps, 0, 0, 0, 0.0, 0.0)
    return Seen(msgspec.structs.replace(drawn, counters=counters), False)


def _stats(*ids: int, **more: Any) -> ClusterStats:
    loaded: Any = object()
    members = tuple(Member(id=number, role="both", pid=1, face=loaded) for number in ids)
    return ClusterStats(
        num_migrations=4, num_stayed=0, num_recomputed=1, done=Done(), instances=members, **more
    )


def test_counters_go_on_when_an_instance_ends_and_slots_are_found_again(drawn: MemoryMap) -> None:
    maps = ClusterMaps()
    assert maps.draw({}, _stats(0)) is None
    moves = (MoveUnderWay(key=("a-long-name-of-7", 1), source=0, target=2),)
    seen = {0: _counting(drawn, 5), 2: _counting(drawn, 7)}
    both = maps.draw(seen, _stats(0, 1, 2, moves=moves))
    assert both is not None
    assert both.map.counters.steps == 12
    assert [(one.id, one.state, one.first_slot) for one in both.instances] == [
        (0, "working", 0),
        (1, "loading", drawn.num_slots),
        (2, "working", drawn.num_slots),
    ]
    assert both.map.num_slots == 2 * drawn.num_slots
    assert [(m.request, m.source, m.target) for m in both.moves] == [("ng-name-of-7/1", 0, 2)]
    assert (both.num_moved, both.num_recomputed) == (4, 1)
    one = maps.draw({2: _counting(drawn, 9)}, _stats(2))
    assert one is not None
    assert one.map.counters.steps == 14
    assert one.instances[0].first_slot == 0
    one = maps.draw({2: _counting(drawn, 10)}, _stats(2))
    assert one is not None
    assert one.map.counters.steps == 15


def test_who_lends_what_to_whom_is_put_together_of_both_sides_maps(drawn: MemoryMap) -> None:
    strip = Strip(2, "lent", "", 512, 0, 0, (PageRuns(0, 0, 0, 4),))
    lends = msgspec.structs.replace(
        drawn,
        strips=(strip, msgspec.structs.replace(strip, slot=3)),
        lent=(LentSlot(2, 7), LentSlot(3, 8)),
    )
    borrows = msgspec.structs.replace(
        drawn,
        borrowed=(Stretch("one", "instance 4", 7, 512), Stretch("one", "a file", 9, 512)),
        traffic=(
            Traffic("instance 4", 3, 900),
            Traffic("instance 5", 0, 0),
            Traffic("a file", 1, 9),
        ),
        adapters=(AdapterShown("odd", 100, 1, 2, False), AdapterShown("even", 9, 0, 0, False)),
    )
    other = msgspec.structs.replace(drawn, adapters=(AdapterShown("odd", 100, 1, 1, True),))
    seen = {4: Seen(lends, False), 1: Seen(borrows, False), 5: Seen(other, False)}
    found = ClusterMaps().draw(seen, _stats(1, 4, 5))
    assert found is not None
    assert found.loans == (Loans(1, 4, 1, 512, 3, 900),)
    names = {strip.slot: strip.request for strip in found.map.strips}
    assert names == {drawn.num_slots + 2: "one", drawn.num_slots + 3: ""}  # whose nobody told
    assert found.map.lent == (
        LentSlot(drawn.num_slots + 2, 7),
        LentSlot(drawn.num_slots + 3, 8),
    )
    assert found.map.adapters == (
        AdapterShown("odd", 100, 2, 3, False),
        AdapterShown("even", 9, 0, 0, False),
    )
