"""A transfer's verbs in every state, twice each, and what becomes of the slots."""

import pytest
from allocator_model import KIND, KINDS, Kind, Model, make_cache, make_paged, one_thread
from vkv.allocator import KVLayout, SlotCache
from vkv.allocator.slot import Slot
from vkv.allocator.transfer import Copier, CopyJob, TransferKey, Transfers, TransferState
from vkv.vmem.errors import InvalidOperation, OutOfPages

__all__ = ["one_thread"]  # a fixture

KEY = TransferKey("a", 0)


def _filled(cache: SlotCache, num_tokens: int = 70) -> Model:
    model = Model(cache)
    request = model.open()
    assert request is not None
    assert model.grow(request, list(range(num_tokens)))
    return model


def _copy(source, target, owner) -> CopyJob:
    job = CopyJob(source, target, after=owner.pool.driver.record_fence())
    job.run()
    assert job.error is None
    return job


# -- the bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tokens_arrive_as_they_left(kind: Kind) -> None:
    """Also where pages are of another size, and in one copy a range."""
    with make_cache(kind) as near, make_cache(kind) as far:
        model = _filled(near)
        (request,) = model.live
        there = Model(far)
        there._identities = model._identities
        outgoing = Transfers(near).send(KEY, request.slot, 70)
        incoming = Transfers(far).receive(KEY, request.tokens)
        job = _copy(outgoing.spans(0, 70), incoming.spans(0, 70), near)
        assert job.num_copies == near.geometry.num_ranges
        assert job.num_bytes == 70 * near.geometry.token_format.token_bytes
        outgoing.commit()
        incoming.commit()
        slot = incoming.claim()
        assert slot is not None
        there._admit(slot, request.tokens)
        there.check()
        model.check()


def test_blocks_become_ranges_and_come_back() -> None:
    """The paged baseline is copied block by block, into memory that is contiguous."""
    with make_paged(block_tokens=7) as near:
        geometry = near.geometry
        layout = KVLayout(
            near.layout.layers, near.layout.dtype, 150, 4096, layers_per_range=1, split_kv=True
        )
        kind = Kind("split alone", layout.layers, {"layers_per_range": 1, "split_kv": True})
        with make_cache(kind) as far:
            assert far.geometry.token_format == geometry.token_format
            model = _filled(near)
            (request,) = model.live
            incoming = Transfers(far).receive(KEY, request.tokens)
            job = _copy(near.spans(request.slot, 0, 70), incoming.spans(0, 70), near)
            assert job.num_copies == len(geometry.token_format.widths) * 10  # blocks of 7
            other = model.adopt([])
            assert other is not None
            near.grow(other.slot, 70)
            _copy(incoming.spans(0, 70), near.spans(other.slot, 0, 70), near)
            model._remember(other, request.tokens)
            model.check()
            incoming.abort()


def test_only_what_the_receiver_lacks_is_copied() -> None:
    with make_cache(KIND["even"]) as far:
        transfers = Transfers(far)
        first = transfers.receive(KEY, list(range(40)))
        first.commit()
        first.park()
        second = transfers.receive(TransferKey("a", 1), list(range(60)))
        assert second.num_held == 40
        second.abort()
        assert far.prefix_length(list(range(60))) == 40  # what it had is there still


# -- the states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_what_has_ended_is_remembered_without_its_slot(end: str) -> None:
    """A slot of many layers is large, and thousands of ends are remembered."""
    with make_cache(KIND["even"]) as near, make_cache(KIND["even"]) as far:
        (request,) = _filled(near).live
        here, there = Transfers(near), Transfers(far)
        outgoing, incoming = here.send(KEY, request.slot, 70), there.receive(KEY, request.tokens)
        for side in (incoming, outgoing):
            getattr(side, end)()
        slot = incoming.claim()
        if slot is not None:
            far.close(slot)
        assert here.send(KEY, request.slot, 70) is outgoing
        for side in (incoming, outgoing):
            assert not any(isinstance(held, Slot) for held in vars(side).values())


def test_what_ends_meanwhile_is_forgotten_beside_one_that_takes_long() -> None:
    with make_cache(KIND["even"]) as far:
        transfers = Transfers(far, most_ended=2)
        long = transfers.receive(TransferKey("long", 0), [1] * 20)
        ended = [transfers.receive(TransferKey(str(i), 0), [1] * 20) for i in range(4)]
        for one in ended:
            one.abort()
        transfers.receive(TransferKey("next", 0), [1] * 20).abort()
        again = transfers.receive(ended[1].key, [1] * 20)
        assert again is not ended[1]
        assert transfers.receive(long.key, [1] * 20) is long
        again.abort()
        long.abort()


def test_every_verb_may_come_twice() -> None:
    with make_cache(KIND["even"]) as near, make_cache(KIND["even"]) as far:
        (request,) = _filled(near).live
        here, there = Transfers(near), Transfers(far)
        outgoing = here.send(KEY, request.slot, 70)
        assert here.send(KEY, request.slot, 70) is outgoing
        assert request.slot.num_pins == 1
        incoming = there.receive(KEY, request.tokens)
        assert there.receive(KEY, request.tokens) is incoming
        assert there.num_under_way == here.num_under_way == 1
        assert incoming.claim() is None
        for side in (outgoing, incoming):
            side.commit()
            side.commit()
            side.abort()  # too late, and so without effect
            assert side.state is TransferState.COMMITTED
        assert request.slot.num_pins == 0
        slot = incoming.claim()
        assert slot is not None
        assert incoming.claim() is None
        far.close(slot)
        with pytest.raises(InvalidOperation, match="is committed"):
            outgoing.spans(0, 1)


def test_what_was_aborted_cannot_be_committed() -> None:
    with make_cache(KIND["even"]) as near, make_cache(KIND["even"]) as far:
        (request,) = _filled(near).live
        outgoing = Transfers(near).send(KEY, request.slot, 70)
        incoming = Transfers(far).receive(KEY, request.tokens)
        for side in (outgoing, incoming):
            side.abort()
            side.abort()
            with pytest.raises(InvalidOperation, match="was aborted"):
                side.commit()
        assert request.slot.num_pins == 0
        assert far.stats().slots_open == 0


def test_epochs_overtake_each_other() -> None:
    with make_cache(KIND["even"]) as near:
        (request,) = _filled(near).live
        transfers = Transfers(near)
        first = transfers.send(TransferKey("a", 1), request.slot, 70)
        with pytest.raises(InvalidOperation, match="under way"):
            transfers.send(TransferKey("a", 2), request.slot, 70)
        first.abort()
        second = transfers.send(TransferKey("a", 2), request.slot, 70)
        with pytest.raises(InvalidOperation, match="overtaken"):
            transfers.send(TransferKey("a", 1), request.slot, 70)
        second.commit()


def test_a_receiver_without_memory_changes_nothing() -> None:
    with make_cache(KIND["even"], rows=1.0) as far:
        model = _filled(far, 100)
        with pytest.raises(OutOfPages):
            Transfers(far).receive(KEY, [7] * 120)
        model.check()


# -- what is pinned ------------------------------------------------------------------------------


def test_a_closed_slot_stays_until_it_is_copied() -> None:
    with make_cache(KIND["even"], max_parked=0) as near:
        model = _filled(near)
        (request,) = model.live
        pin = model.pin(request, 50)
        model.close(request)
        model.check()
        near.trim()
        model.check()
        assert near.stats().pages_held
        model.unpin(pin)
        model.check()
        assert near.stats().slots_parked == near.stats().pages_held == 0


def test_what_cannot_be_unmapped_at_the_end_is_reclaimed_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with make_cache(KIND["even"], max_parked=0) as near:
        model = _filled(near)
        (request,) = model.live
        outgoing = Transfers(near).send(KEY, request.slot, 70)
        model.close(request)
        near.pool.driver.fail_after = 0
        outgoing.commit()
        near.pool.driver.fail_after = None
        assert "will be reclaimed" in caplog.text
        assert near.stats().pages_parked
        model.check()
        near.trim()
        model.check()
        assert near.stats().slots_parked == near.stats().physical_bytes == 0


def test_a_pinned_prefix_is_shared_and_not_taken_over() -> None:
    with make_cache(KIND["even"]) as near:
        model = _filled(near)
        (request,) = model.live
        tokens = list(request.tokens)
        pin = model.pin(request, 70)
        model.park(request, 70)
        heir = model.adopt(tokens)
        assert heir is not None
        assert heir.tokens == tokens
        assert heir.slot.index != pin.slot.index
        model.grow(heir, [5] * 20)
        model.check()
        model.unpin(pin)
        model.check()


def test_a_shutdown_during_a_transfer_is_refused() -> None:
    cache = make_cache(KIND["even"])
    (request,) = _filled(cache).live
    outgoing = Transfers(cache).send(KEY, request.slot, 70)
    with pytest.raises(InvalidOperation, match="read by a transfer"):
        cache.shutdown()
    outgoing.abort()
    cache.shutdown()


# -- the copier ----------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", [False, True])
def test_copies_come_in_order_and_end_with_the_copier(synchronous: bool) -> None:
    with make_cache(KIND["even"]) as near, make_cache(KIND["even"]) as far:
        (request,) = _filled(near).live
        incoming = Transfers(far).receive(KEY, request.tokens)
        copier = Copier(near.layer(0)[0].device, synchronous=synchronous, max_bytes=1)
        assert copier.has_room(1 << 40)  # nothing is under way, so it is as good as ever
        jobs = [
            copier.submit(
                CopyJob(
                    near.spans(request.slot, 0, 70),
                    incoming.spans(0, 70),
                    after=near.pool.driver.record_fence(),
                )
            )
            for _ in range(3)
        ]
        copier.stop()
        copier.stop()
        assert all(job.is_done and job.error is None for job in jobs)
        with pytest.raises(InvalidOperation, match="stopped"):
            copier.submit(jobs[0])
        incoming.abort()


def test_a_failed_copy_says_so() -> None:
    class Broken:
        def wait(self) -> None:
            raise InvalidOperation("the device is gone")

    job = CopyJob([], [], after=Broken())
    job.run()
    assert job.is_done
    assert "gone" in str(job.error)


def test_unequal_bytes_are_refused() -> None:
    with make_cache(KIND["even"]) as near:
        (request,) = _filled(near).live
        spans = near.spans(request.slot, 0, 70), near.spans(request.slot, 0, 60)
        with pytest.raises(InvalidOperation, match="cannot be copied"):
            CopyJob(*spans, after=near.pool.driver.record_fence())
