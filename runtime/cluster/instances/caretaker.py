"""A process that outlives a front end by a moment: ends what that leaves, removes its folder.

A front end that is killed cannot tidy up. Ray ends by itself then, but its agents only after a
minute, and an instance that is stopped never does. So each front end has such a process beside it.
It needs nothing but Python's own library, and holds some 10 MB.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_TIDYING_S = 10.0  # until it gives up
_LOOK_S = 0.05


class Caretaker:
    """The caller's end of it.

    Args:
        folder: all in it belongs to the caller, and so do processes that have files of it open.
    """

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, folder, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # what is sent to the caller's group is not for it
        )

    def watch(self, pid: int) -> None:
        """A process that is to end with the caller."""
        with suppress(OSError, ValueError):  # it has ended; then nobody tidies up
            assert self._process.stdin is not None
            self._process.stdin.write(f"{pid}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """Have it end what is left, and wait until it has. Closing twice is harmless."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()


def main(folder: str, owner: int) -> None:
    """Wait until the owner has ended or wants no more, then tidy up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the owner decides
    watched: list[int] = []  # descriptors of processes, whose numbers may come again
    text, end = b"", _descriptor(owner)
    while True:
        heard = [0] if end is None else [0, end]
        ready, _, _ = select.select(heard, [], [], 0 if end is None else None)
        if 0 not in ready:  # the owner has ended, and all that it said is read
            break
        said = os.read(0, 4096)
        if not said:
            break
        *lines, text = (text + said).split(b"\n")
        found = (_descriptor(int(line)) for line in lines)
        watched = _living(watched)  # or descriptors would run out in time
        watched += [descriptor for descriptor in found if descriptor is not None]
    for descriptor in watched:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    _remove(folder, owner)


def _descriptor(pid: int) -> int | None:
    """Of a process; None of one that has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _living(descriptors: list[int]) -> list[int]:
    """Those of processes that have not ended; the others are closed."""
    ended, _, _ = select.select(descriptors, [], [], 0)
    for descriptor in ended:
        os.close(descriptor)
    return [descriptor for descriptor in descriptors if descriptor not in ended]


def _remove(folder: str, owner: int) -> None:
    """End who uses a folder, its owner apart, and remove it; who is ending may write there yet."""
    deadline = time.monotonic() + _TIDYING_S
    while time.monotonic() < deadline:
        users = [pid for pid in _users(folder) if pid != owner]
        for pid in users:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if not users and not Path(folder).exists():
            return
        time.sleep(_LOOK_S)


def _users(folder: str) -> list[int]:
    """Processes that have files of a folder open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is another user's, or has ended
            if any(_is_in(folder, link) for link in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def _is_in(folder: str, link: Path) -> bool:
    with suppress(OSError):  # closed meanwhile
        return os.readlink(link).startswith(f"{folder}/")
    return False


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
