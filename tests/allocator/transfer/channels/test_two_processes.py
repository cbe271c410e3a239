"""Pages and copies between two processes, of which one may stop or die at any time."""

import os
import signal

import pytest
from allocator_model import one_thread
from kv_peer import two_processes

__all__ = ["one_thread"]  # a fixture


def nothing_left(counts: dict[str, int]) -> bool:
    return not any(counts.values())


@pytest.fixture(params=["host", "standin", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Whose memory it is; a GPU's pages go one by one."""
    if request.param == "standin":
        request.getfixturevalue("cuda_standin")
    return request.param


def test_pages_move_there_and_back_and_outlive_who_lent_them(device: str) -> None:
    with two_processes("pages", device=device) as (here, there):
        whole = here.fill("a", 90)
        num_pages = here.slots["a"].num_pages
        there.begin("receive", "a", 0, 90, num_reserved=140)
        assert here.send("a", 0, 90) == ("''", 0, num_pages)
        assert there.result() == ("''", 0, num_pages)
        assert there.call("commit_receipt", "a", 90) == whole
        here.end_sending("a", is_done=True)
        here.close("a")
        assert nothing_left(here.counts())
        here.fill("b", 150, seed=7)  # the lender goes on, in memory of its own
        assert there.call("digest", "a") == whole
        longer = there.call("fill", "a", 140)  # and so does the borrower, in what it was given

        here.transfers, before = type(here.transfers)(here.cache), here.digest("b")
        there.begin("fork", "a", "c", 100)
        there.result()
        copied = sum(here.cache.layout.whole_pages_per_range(100)) * here.driver.page_bytes
        there.begin("send", "c", 0, 100)
        sent, received = here.receive("c", 0, 100), there.result()
        assert sent == received
        assert sent[:2] == ("''", copied)
        first = here.commit_receipt("c", 100)
        there.call("end_sending", "c", is_done=True)
        there.kill()  # with the only copy of "a", and of nothing else
        assert here.digest("c") == first
        assert here.digest("b") == before
        assert longer != whole
        here.fill("c", 150)
        here.cache.check_invariants()
        for name in ("b", "c"):
            here.close(name)
        assert nothing_left(here.counts())


@pytest.mark.parametrize(
    "device", ["standin", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
def test_pages_that_came_one_by_one_move_on(device: str) -> None:
    """What was imported is exported, and comes back to who made it: all of it is there."""
    with two_processes("pages", device=device) as (here, there):
        whole = here.fill("a", 90)
        num_pages = here.slots["a"].num_pages
        there.begin("receive", "a", 0, 90)
        assert here.send("a", 0, 90) == ("''", 0, num_pages)
        assert there.result() == ("''", 0, num_pages)
        assert there.call("commit_receipt", "a", 90) == whole
        here.end_sending("a", is_done=True)
        here.close("a")
        there.begin("send", "a", 0, 90)
        assert here.receive("a", 0, 90) == ("''", 0, num_pages)
        assert there.result() == ("''", 0, num_pages)
        assert here.commit_receipt("a", 90) == whole
        there.call("end_sending", "a", is_done=True)
        there.call("close", "a")
        assert nothing_left(there.call("counts"))
        assert here.digest("a") == whole
        here.fill("a", 150)
        here.cache.check_invariants()
        here.close("a")
        assert nothing_left(here.counts())


def test_pages_that_were_kept_stay_when_the_lender_is_killed(device: str) -> None:
    with two_processes("pages", device=device) as (here, there):
        whole = there.call("fill", "a", 120)
        there.begin("send", "a", 0, 120)
        assert here.receive("a", 0, 120)[0] == "''"
        assert there.result()[0] == "''"
        assert here.commit_receipt("a", 120) == whole
        there.kill()  # before it has heard of the commit
        assert here.digest("a") == whole
        here.fill("a", 150)
        here.close("a")
        assert nothing_left(here.counts())


def test_a_borrower_that_dies_before_the_end_takes_nothing_with_it(device: str) -> None:
    with two_processes("pages", device=device) as (here, there):
        whole = here.fill("a", 120)
        there.begin("receive", "a", 0, 120)
        assert here.send("a", 0, 120)[0] == "''"
        assert there.result()[0] == "''"
        there.kill()
        here.end_sending("a", is_done=False)
        assert here.digest("a") == whole
        here.fill("a", 150)
        here.cache.check_invariants()
        here.close("a")
        assert nothing_left(here.counts())


@pytest.mark.parametrize("channel", ["copies", "pages"])
def test_a_peer_that_stops_is_given_up_and_one_that_dies_is_noticed(channel: str) -> None:
    with two_processes(channel, timeout_s=0.5) as (here, there):
        assert there.process.pid is not None
        whole = here.fill("a", 120)
        os.kill(there.process.pid, signal.SIGSTOP)
        assert "silent" in here.send("a", 0, 120)[0]
        os.kill(there.process.pid, signal.SIGCONT)
        here.end_sending("a", is_done=False)
        assert here.digest("a") == whole
    with two_processes(channel) as (here, there):
        there.kill()
        assert "TransferError" in here.receive("a", 0, 60)[0]
        here.abort_receipt("a", 60)
        assert nothing_left({**here.counts(), "descriptors": 0})
        assert here.counts()["descriptors"] == -1  # the channel's own, which is closed


@pytest.mark.parametrize("tcp", [False, True])
def test_copies_go_over_any_stream(tcp: bool) -> None:
    with two_processes("copies", tcp=tcp, is_checked=True) as (here, there):
        for stop in (60, 100):
            whole = there.call("fill", "a", stop)
            start = 60 if stop == 100 else 0
            there.begin("send", "a", start, stop)
            assert here.receive("a", start, stop)[0] == "''"
            assert there.result()[0] == "''"
        assert here.commit_receipt("a", 100) == whole
        there.call("end_sending", "a", is_done=True)
        there.call("close", "a")
        assert nothing_left(there.call("counts"))
        here.close("a")
        assert nothing_left(here.counts())
