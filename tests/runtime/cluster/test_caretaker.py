"""A front end that is killed leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from served import is_alive
from vkv.runtime.cluster.instances.caretaker import Caretaker


def _until(is_so: Callable[[], bool], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.02)


def _sleeper(*arguments: str) -> "subprocess.Popen[bytes]":
    code = "import sys, time; file = sys.argv[1:] and open(sys.argv[1], 'w'); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", code, *arguments])


_OWNER = """
import os, sys, time
from vkv.runtime.cluster.instances.caretaker import Caretaker
caretaker = Caretaker(sys.argv[1])
for pid in sys.argv[2:]:
    caretaker.watch(int(pid))
mine = open(sys.argv[1] + "/mine", "w")
print(caretaker._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_an_owner_leaves_is_ended_and_removed(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "folder"
    (folder / "session").mkdir(parents=True)
    watched, user = _sleeper(), _sleeper(str(folder / "session" / "log"))
    stranger = _sleeper(str(tmp_path / "folder-of-another"))
    os.kill(watched.pid, signal.SIGSTOP)
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(folder), str(watched.pid)], stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    caretaker = int(owner.stdout.readline())
    _until((folder / "session" / "log").exists)
    owner.send_signal(number)
    owner.wait()
    owner.stdout.close()
    assert watched.wait(15) == user.wait(15) == -signal.SIGKILL
    _until(lambda: not folder.exists() and not is_alive(caretaker))
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_an_owner_that_tidies_up_itself_outlives_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    caretaker = Caretaker(str(folder))
    watched, ended = _sleeper(), _sleeper()
    ended.kill()
    ended.wait()
    caretaker.watch(ended.pid)
    caretaker.watch(watched.pid)
    with (folder / "mine").open("w"):
        caretaker.close()
    assert watched.wait(15) == -signal.SIGKILL
    assert not folder.exists()
    caretaker.close()
    caretaker.watch(watched.pid)  # without effect


def test_who_ended_long_ago_costs_nothing(tmp_path: Path) -> None:
    """Or it would run out of descriptors, and then nobody tidies up."""

    def num_watched() -> int:
        found = 0
        for link in Path(f"/proc/{caretaker._process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found += os.readlink(link) == "anon_inode:[pidfd]"
        return found

    folder = tmp_path / "folder"
    folder.mkdir()
    caretaker = Caretaker(str(folder))
    first, second, last = _sleeper(), _sleeper(), _sleeper()
    caretaker.watch(first.pid)
    caretaker.watch(second.pid)
    _until(lambda: num_watched() == 3)  # this process's, too
    for ended in (first, second):
        ended.kill()
        ended.wait()
    caretaker.watch(last.pid)
    _until(lambda: num_watched() == 2)
    caretaker.close()
    assert last.wait(15) == -signal.SIGKILL
