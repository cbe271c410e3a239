"""The server's processes: started, watched, and never left behind."""

import contextlib
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...link import engine_process
from ...link.engine_process import EngineOrder

_GRACE_S = 5.0  # for a process whose lifeline was cut, before it is killed


class Child:
    """A process of this program, which ends when its standard input does.

    Args:
        module: whose `main` it runs.
        order: what it is told, pickled.
        descriptors: that it inherits.
    """

    def __init__(self, module: str, order: Any, descriptors: tuple[int, ...]) -> None:
        code = f"from {module} import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, pass_fds=descriptors
        )
        assert self._process.stdin is not None
        self._lifeline = self._process.stdin
        pickle.dump(order, self._lifeline)
        self._lifeline.flush()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def wait(self) -> int:
        """Wait for its end; returns its exit status, or minus a signal's number."""
        return self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Pass a signal on."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it. Harmless when repeated."""
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self._lifeline.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class EngineSocket:
    """Where an engine's process listens. It outlives the process, so that another may follow."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vkv-")  # nobody else may look in
        self.path = str(Path(self._directory.name) / "engine")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(64)

    def start(self, model: str | None, device: str, dtype: str, options: dict[str, Any]) -> Child:
        """Start an engine's process that listens here."""
        engine_process.ready_mark(self.path).unlink(missing_ok=True)
        order = EngineOrder(
            model=model,
            device=device,
            dtype=dtype,
            options=options,
            listener=self._listener.fileno(),
        )
        return Child(engine_process.__name__, order, (self._listener.fileno(),))

    @property
    def was_ready(self) -> bool:
        """Whether the last process that was started has loaded its model."""
        return engine_process.ready_mark(self.path).exists()

    def close(self) -> None:
        """Take the socket away."""
        self._listener.close()
        self._directory.cleanup()
