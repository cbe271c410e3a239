"""A bounded number of places, for event loops that come and go."""

import asyncio
import gc
import threading

from vkv.runtime.frontend.driving.places import Place, Places
from vkv.vmem import janitor


def test_first_come_first_served_and_giving_up() -> None:
    places, order = Places(2), []

    async def take(number: int) -> None:
        place = places.line_up()
        try:
            if await place.wait():
                order.append(number)
                await asyncio.sleep(0)
        finally:
            place.release()
            place.release()

    async def main() -> None:
        tasks = [asyncio.create_task(take(number)) for number in range(6)]
        await asyncio.sleep(0)
        assert places.num_free == 0
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert order == [0, 1, 2, 4, 5]
    assert places.num_free == 2


def test_one_that_gives_up_is_told_so_and_a_held_place_is_kept() -> None:
    places = Places(1)

    async def main() -> None:
        held, waiting = places.line_up(), places.line_up()
        assert await held.wait()
        held.give_up()
        waiting.give_up()
        assert not await waiting.wait()
        waiting.release()
        assert held.is_held
        held.release()

    asyncio.run(main())
    assert places.num_free == 1


def test_the_line_passes_over_those_whose_loops_are_closed() -> None:
    places = Places(1)

    async def line_up() -> Place:
        return places.line_up()

    def on_a_loop_of_its_own() -> Place:
        loop = asyncio.new_event_loop()
        place = loop.run_until_complete(line_up())
        loop.close()
        return place

    first = on_a_loop_of_its_own()
    gone = [on_a_loop_of_its_own() for _ in range(3)]

    async def main() -> None:
        place = places.line_up()
        asyncio.get_running_loop().call_later(0.01, first.release)
        assert await place.wait()
        place.release()

    asyncio.run(main())
    assert places.num_free == 1
    assert not any(place.is_held for place in gone)


def test_a_dropped_place_returns() -> None:
    janitor.start()
    places = Places(1)

    async def main() -> None:
        place = places.line_up()
        assert await place.wait()

    asyncio.run(main())
    gc.collect()
    assert janitor.drain(20)
    assert places.num_free == 1


def test_places_of_many_threads() -> None:
    places, most, now = Places(3), [0], [0]
    lock = threading.Lock()

    async def take() -> None:
        place = places.line_up()
        await place.wait()
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        await asyncio.sleep(0)
        with lock:
            now[0] -= 1
        place.release()

    async def main() -> None:
        await asyncio.gather(*(take() for _ in range(50)))

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert places.num_free == 3
    assert most[0] <= 3
