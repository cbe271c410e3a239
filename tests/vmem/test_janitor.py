"""Notes that finalisers leave, who carries them out, and how background threads end."""

import gc
import logging
import subprocess
import sys
import threading
import weakref

import standin.process
from vkv.vmem import at_exit, janitor
from vkv.vmem.janitor import Janitor


def test_notes_are_carried_out_in_order_on_a_thread_of_their_own():
    janitor.start()
    janitor.start()
    seen = []
    for number in range(100):
        janitor.later(lambda number=number: seen.append((number, threading.current_thread().name)))
    assert janitor.drain(20)
    assert seen == [(number, "vkv-janitor") for number in range(100)]


def test_a_finaliser_may_leave_a_note_wherever_it_runs():
    class Thing:
        pass

    janitor.start()
    seen = []
    thing = Thing()
    weakref.finalize(thing, janitor.later, lambda: seen.append(threading.current_thread().name))
    thing.itself = thing
    del thing
    gc.collect()
    assert janitor.drain(20)
    assert seen == ["vkv-janitor"]


def test_what_a_job_raises_is_logged_and_the_next_is_done(caplog):
    janitor.start()
    seen = []
    with caplog.at_level(logging.ERROR, "vkv"):
        janitor.later(lambda: 1 / 0)
        janitor.later(lambda: seen.append(1))
        assert janitor.drain(20)
    assert seen == [1]
    (record,) = caplog.records
    assert "ZeroDivisionError" in record.exc_text


def test_draining_waits_for_what_jobs_note_and_no_longer_than_told():
    janitor.start()
    seen, go_on = [], threading.Event()
    janitor.later(lambda: janitor.later(lambda: janitor.later(lambda: seen.append(1))))
    assert janitor.drain(20)
    assert seen == [1]
    janitor.later(lambda: go_on.wait(20))
    assert not janitor.drain(0.01)
    go_on.set()
    assert janitor.drain(20)


def test_stopping_carries_out_what_is_noted_and_starting_begins_anew():
    other, seen = Janitor(), []
    assert other.drain()  # nothing is noted
    other.later(lambda: seen.append(1))
    assert not other.drain()  # and nobody is there to do it
    other.start()
    other.stop()
    other.stop()
    assert seen == [1]
    other.start()
    other.later(lambda: seen.append(2))
    other.stop()
    assert seen == [1, 2]


def test_a_forked_child_has_its_own_notes_and_thread():
    janitor.start()
    at_work, go_on = threading.Event(), threading.Event()
    janitor.later(at_work.set)
    janitor.later(lambda: go_on.wait(20))
    janitor.later(lambda: seen.append("parent's"))
    assert at_work.wait(20)
    seen = []

    def child():
        if not janitor.drain(5) or seen:
            return 1
        janitor.later(lambda: seen.append("child's"))
        janitor.start()
        return 0 if janitor.drain(5) and seen == ["child's"] else 2

    assert standin.process.run_in_fork(child) == 0
    go_on.set()
    assert janitor.drain(20)
    assert seen == ["parent's"]


ENDING = """
import os, sys, threading
from vkv.vmem import janitor, stop_at_exit

class Thing:
    def __init__(self, name, fails=False):
        self.name, self.fails = name, fails
        stop_at_exit(self)

    def stop(self):
        print(os.getpid() == parent, self.name, flush=True)
        if self.fails:
            raise ValueError

parent = os.getpid()
first, gone, failing, last = Thing("first"), Thing("gone"), Thing("failing", True), Thing("last")
del gone
janitor.start()
child = os.fork()
if not child:
    Thing("child's")  # gone at once
    own = Thing("child's own")
    sys.exit()
os.waitpid(child, 0)
janitor.later(lambda: print("noted", flush=True))
"""


def test_at_exit_the_most_recent_is_stopped_first_and_a_child_stops_its_own():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDING], capture_output=True, timeout=120, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("False child's own") == 1
    lines = [line for line in lines if line not in ("False child's own", "noted")]
    assert lines == ["True last", "True failing", "True first"]
    assert "noted" in done.stdout
    assert "ValueError" in done.stderr


def test_whatever_several_threads_hand_over_at_once_is_stopped():
    class Thing:
        def stop(self):
            stopped.append(self)

    stopped, ending = [], at_exit._Ending()
    things = [[Thing() for _ in range(1000)] for _ in range(4)]
    all_at_once = threading.Barrier(len(things))

    def hand_over(some):
        all_at_once.wait()
        for thing in some:
            ending.add(thing)

    threads = [threading.Thread(target=hand_over, args=(some,)) for some in things]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    gone = things.pop()
    gone.clear()
    gc.collect()
    ending.stop_all()
    assert {id(thing) for thing in stopped} == {id(thing) for some in things for thing in some}
    ending.stop_all()
    assert len(stopped) == 3000
