"""Instances on a Ray that is played here: what is left once a cluster has ended, and by whom."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import standin.process
from vkv.runtime.cluster.instances import launcher as launching
from vkv.runtime.cluster.instances.launcher import Launcher
from vkv.vmem.errors import InvalidOperation

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")


class RayError(Exception):
    """As of Ray."""


class _Ray:
    """A Ray whose actors never are ready, and that is told of their ends after a moment.

    Attributes:
        late: what it was asked after its end, at which the real one begins anew.
    """

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self) -> None:
        self.late: list[str] = []
        self._ended = threading.Event()
        self.is_there = False

    def is_initialized(self) -> bool:
        return self.is_there

    def init(self, **options: Any) -> None:
        self.is_there = True

    def shutdown(self) -> None:
        self.is_there = False

    def nodes(self) -> list[Any]:
        return []

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "ab" * 28)

    def remote(self, kind: type) -> Any:
        self._note("remote")
        actor = SimpleNamespace(ready=SimpleNamespace(remote=lambda: "ready"))
        begun = SimpleNamespace(remote=lambda order: actor)
        return SimpleNamespace(options=lambda **needs: begun)

    def wait(self, there: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self._note("wait")
        found = (there, []) if self._ended.wait(timeout) else ([], there)
        time.sleep(0.2)
        return found

    def get(self, there: Any) -> Any:
        self._note("get")
        raise RayError("it was killed")

    def kill(self, actor: Any) -> None:
        self._note("kill")
        threading.Timer(0.2, self._ended.set).start()

    def _note(self, what: str) -> None:
        if not self.is_there:
            self.late.append(what)


_ORDER: dict[str, Any] = {
    "model": None,
    "device": "cpu",
    "dtype": "float32",
    "options": {},
    "threads": 1,
}


def test_nobody_asks_a_ray_that_was_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start another: a cluster is closed while an instance starts, as by a policy."""
    ray = _Ray()
    monkeypatch.setattr(launching, "_import_ray", lambda: ray)
    launcher = Launcher()
    try:
        launcher.begin(0, **_ORDER)
        _close_while_one_starts(launcher)
    finally:
        launcher.close()
    for late in (lambda: launcher.begin(1, **_ORDER), lambda: launcher.wait(1)):
        with pytest.raises(InvalidOperation, match="has been closed"):
            late()
    launcher.kill(1)
    assert ray.late == []
    assert not Path(launcher.path(0)).parent.exists()


def _close_while_one_starts(launcher: Launcher) -> None:
    found: list[Exception] = []

    def wait() -> None:
        try:
            launcher.wait(0)
        except InvalidOperation as error:
            found.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    launcher.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert len(found) == 1


def test_a_forked_child_that_ends_takes_nothing_of_its_parents_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = _Ray()
    monkeypatch.setattr(launching, "_import_ray", lambda: ray)
    launcher = Launcher()
    folder = Path(launcher.path(0)).parent
    try:
        assert standin.process.run_in_fork(lambda: launcher.close() or 7 * ray.is_there) == 7
        assert folder.exists()
        assert launcher._caretaker._process.poll() is None
    finally:
        launcher.close()
    assert not folder.exists()
