"""Pages that change hands one by one, as on a GPU: of use to anybody, but not to two at once."""

import os
from types import SimpleNamespace

import pytest
from allocator_model import KIND, FlakyStandInDriver, Model, make_cache, one_thread
from vkv.runtime.engine.migration.endpoints import page_format_of
from vkv.vmem.errors import DriverError, InvalidOperation

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


def test_pages_behind_the_tokens_go_when_no_kernel_touches_them_any_more(cuda_standin):
    """A kernel that loads whole tiles reads there; lending unmaps what the slot does not need."""
    model = movable()
    request = with_request(model, 20, first=1)
    slot, driver = request.slot, model.cache.pool.driver
    model.cache.reserve(slot, 120)
    model.cache._backing.extend(slot, 120)
    address = model.cache._backing._range_address(slot, 0)
    size = sum(map(len, slot.pages)) * driver.page_bytes
    cuda_standin.begin_work(address, size)
    model.cache.pin(slot, 20)
    lent = model.cache.loans.lend(slot, 20)
    assert sum(map(len, slot.pages)) * driver.page_bytes < size
    for fd in lent.descriptors:
        os.close(fd)
    model.cache.loans.take_back(slot)
    model.cache.unpin(slot)
    end(model)


def test_what_there_are_too_few_descriptors_for_is_copied(cuda_standin, monkeypatch):
    monkeypatch.setattr("vkv.vmem.linux.max_open_files", lambda: 2 * (64 + 2))
    near, far = movable(), movable()
    far._identities = near._identities
    request = with_request(near, 70, first=1)
    near.cache.pin(request.slot, 70)
    lent = near.cache.loans.lend(request.slot, 70)
    assert len(lent.descriptors) == lent.parcel.num_lent_pages == 2 < request.slot.num_pages
    slot = far.cache.open()
    far.cache.reserve(slot, 70)
    targets = far.cache.loans.borrow(slot, lent.parcel, lent.descriptors)
    for fd in lent.descriptors:
        os.close(fd)
    for source, target in zip(lent.copied, targets, strict=True):
        target.copy_(source)
    far.cache.loans.keep(slot)
    near.cache.loans.leave(request.slot)
    near.live.remove(request)
    near.cache.close(request.slot)
    moved = far._admit(slot, request.tokens, request.variant)
    with_request(near, 90, first=7)
    far.check()
    near.check()
    far.close(moved)
    end(near)
    end(far)


def test_a_loan_that_fails_leaves_no_descriptor_which_would_keep_the_memory(
    cuda_standin, monkeypatch
):
    model = movable()
    request = with_request(model, 70, first=1)
    model.cache.pin(request.slot, 70)
    before = len(os.listdir("/proc/self/fd")) - cuda_standin.num_files()

    def fail(*_):
        raise DriverError("no")

    monkeypatch.setattr(model.cache._backing, "_copied", fail)
    with pytest.raises(DriverError):
        model.cache.loans.lend(request.slot, 70)
    assert len(os.listdir("/proc/self/fd")) == before + cuda_standin.num_files()
    assert request.slot.loan is None
    model.cache.unpin(request.slot)
    model.close(request)
    end(model)
    assert cuda_standin.held()["memory_used"] == 0


def test_engines_exchange_pages_only_where_their_memory_is_one(cuda_standin):
    """Of one machine, two GPUs have two memories; their tokens are copied."""
    formats = []
    for name in ("GPU a", "GPU b", "GPU a"):
        model = movable()
        model.cache._backing.memory_name = name
        loop = SimpleNamespace(engine=SimpleNamespace(cache=model.cache))
        formats.append(page_format_of(loop, SimpleNamespace(moves_pages=True, node="")))
        end(model)
    assert formats[0] == formats[2] != formats[1]


def test_pages_of_another_gpu_are_refused_before_anything_is_mapped(cuda_standin):
    near, far = movable(), movable()
    request = with_request(near, 70, first=1)
    near.cache.pin(request.slot, 70)
    lent = near.cache.loans.lend(request.slot, 70)
    far.cache._backing.memory_name = "GPU b"
    slot = far.cache.open()
    far.cache.reserve(slot, 70)
    with pytest.raises(InvalidOperation, match="none of GPU b; copy"):
        far.cache.loans.borrow(slot, lent.parcel, lent.descriptors)
    assert far.cache.pool.driver.num_pages == slot.num_pages == 0
    for fd in lent.descriptors:
        os.close(fd)
    near.cache.loans.take_back(request.slot)
    near.cache.unpin(request.slot)
    far.cache.close(slot)
    end(near)
    end(far)
