"""Systems to compare with, each in a process and an interpreter of its own (`workers/`)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...vmem.errors import InvalidConfig, VkvError

WORKERS = Path(__file__).parent / "workers"


def interpreter_of(name: str, interpreter: str, known: Iterable[str]) -> str:
    """The interpreter of a peer. Raises InvalidConfig if the peer or the file is unknown."""
    if name not in known:
        raise InvalidConfig(f"peer {name!r} is unknown; use some of {', '.join(known)}")
    if not Path(interpreter).is_file():
        raise InvalidConfig(f"peer {name} has no interpreter at {interpreter}")
    return str(Path(interpreter).absolute())  # not resolved: an environment is where its link is


class WorkerFailed(VkvError):
    """A system did not answer, or answered with an error; `str()` says what."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a system that generates answers.

    Attributes:
        seconds: that it took.
        decode_tokens, decode_seconds: of the time in which all requests decoded, by the time
            stamps of their tokens.
        first_tokens: of each prompt's output.
        peak_rss_bytes: of its process so far.
        weight_bytes: of its weights as it keeps them; None if it does not say.
        read_bytes: of those weights that a decode step reads; None likewise.
    """

    seconds: float
    decode_tokens: int
    decode_seconds: float
    first_tokens: Sequence[int]
    peak_rss_bytes: int
    weight_bytes: int | None
    read_bytes: int | None


class Worker:
    """A system in a process of its own.

    Attributes:
        versions: of the packages that matter in its environment, by name.
    """

    def __init__(self, command: Sequence[str], options: Mapping[str, Any], log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(options["threads"])}
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*command, json.dumps(dict(options))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        try:
            self.versions: dict[str, str] = self._answer().get("versions", {})
        except BaseException:
            self.close()
            raise

    def run(self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int]) -> Timing:
        """Generate, and say how long it took."""
        return Timing(**self.ask({"prompts": prompts, "output_lens": output_lens}))

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request. Raises WorkerFailed with what the process says is wrong."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerFailed(self._last_words()) from error
        return self._answer()

    def close(self) -> None:
        """End the process, gently if it goes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(_with_remedy(answer["error"]))
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text().strip().splitlines()
        return _with_remedy(f"its process ended: {lines[-1] if lines else 'without a word'}")


def _with_remedy(said: str) -> str:
    """What a worker says, and what to do about a package that is not there, unless it says so."""
    if "No module named" not in said or "pip install" in said:
        return said
    return (
        f"{said}; install it in the peer's environment: benchmarks/README.md says what each needs"
    )


def import_bytes() -> int:
    """Peak resident bytes of a process that loads vkv, PyTorch and transformers, and no model."""
    program = "import vkv; vkv.LLM; from protocol import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=WORKERS, capture_output=True, text=True, check=True
    )
    return int(done.stdout)
