"""Pages that change hands one by one, as on a GPU: of use to anybody, but not to two at once."""

import os

import pytest
from allocator_model import KIND, FlakyStandInDriver, Model, make_cache, one_thread

__all__ = ["one_thread"]  # a fixture


def movable() -> Model:
    return Model(make_cache(KIND["even"], FlakyStandInDriver(), movable=True))


def with_request(model: Model, count: int, first: int):
    request = model.open()
    assert request is not None
    assert model.grow(request, [first] * count)
    return request


def end(model: Model) -> None:
    driver = model.cache.pool.driver
    model.cache.shutdown()
    assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
    driver.close()


@pytest.mark.parametrize("moves", [False, True], ids=["given up", "moved"])
def test_memory_that_another_process_has_serves_nobody_here(cuda_standin, moves):
    near, far = movable(), movable()
    far._identities = near._identities
    request = with_request(near, 70, first=1)
    near.cache.pin(request.slot, 70)
    lent = near.cache.loans.lend(request.slot, 70)
    slot = far.cache.open()
    far.cache.reserve(slot, 70)
    far.cache.loans.borrow(slot, lent.parcel, lent.descriptors)
    for fd in lent.descriptors:
        os.close(fd)
    if moves:
        far.cache.loans.keep(slot)
        near.cache.loans.leave(request.slot)
        near.live.remove(request)
        near.cache.close(request.slot)
        request = far._admit(slot, request.tokens, request.variant)
    else:
        far.cache.close(slot)
        near.cache.loans.take_back(request.slot)
        near.cache.unpin(request.slot)
    owner, other = (far, near) if moves else (near, far)
    assert other.cache.pool.num_created == other.cache.pool.driver.num_pages == 0
    with_request(other, 90, first=7)
    other.check()
    owner.check()
    owner.close(request)
    assert owner.cache.pool.num_free, "what was kept is free now, as any other page"
    end(near)
    end(far)
