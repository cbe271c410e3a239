"""A process that knows what is right: one plain engine a model, with none of what the soak tries.

Its engines have memory for all, reuse no prefix, guess nothing, move nothing, and compute one model
or adapter at a time. `python -m vkv.bench.soak.reference` is that process: it reads requests from
standard input, and writes what they should be answered.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ...runtime.frontend.llm import LLM
from ...vmem.errors import VkvError
from .asks import Ask
from .models import INT4, MAX_LEN, TUNED, Models
from .right import Turn, rights_of

_OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "repeatable": True,
    "max_len": MAX_LEN,
    "max_seqs": 8,
    "kv_memory": "256MiB",
    "prefix_reuse": False,
    "max_parked": 0,
    "record_decodes": False,
}


class ReferenceFailed(VkvError):
    """The process that knows what is right ended, or could not answer; `str()` says why."""


class Answers:
    """Computes what is right, in this process."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._engines: dict[str, LLM] = {}

    def to(self, asks: Sequence[Ask]) -> list[list[Turn]]:
        """What each of the requests should be answered, turn by turn."""
        found: list[list[Turn]] = [[] for _ in asks]
        by_voice: dict[str, list[int]] = {}
        for place, ask in enumerate(asks):
            by_voice.setdefault(ask.voice, []).append(place)
        for voice, places in by_voice.items():
            self._answer(voice, {place: asks[place] for place in places}, found)
        return found

    def _answer(self, voice: str, asks: Mapping[int, Ask], found: list[list[Turn]]) -> None:
        engine, adapter = self._engine(voice)
        said: dict[int, list[int]] = {place: [] for place in asks}
        turn = 0
        while left := [place for place, ask in asks.items() if len(ask.turns) > turn]:
            for place in left:
                said[place] += asks[place].turns[turn]
            outputs = engine.generate(
                [{"prompt_token_ids": said[place]} for place in left],
                [asks[place].params for place in left],
                adapter=adapter,
                on_error="raise",
                progress=False,
            )
            for place, output in zip(left, outputs, strict=True):
                found[place].append(rights_of(output))
                said[place] += output.outputs[0].token_ids
            turn += 1

    def _engine(self, voice: str) -> tuple[LLM, str | None]:
        """The engine of a model, or of an adapter's, and the adapter's name in it."""
        model, _, adapter = voice.rpartition("/") if "/" in voice else (voice, "", "")
        if model not in self._engines:
            folder = {TUNED: self._models.tuned, INT4: self._models.int4}.get(
                model, self._models.base
            )
            dtype = "bfloat16" if model == INT4 else "float32"
            self._engines[model] = LLM(
                folder, dtype=dtype, adapters=self._models.adapters, **_OPTIONS
            )
        return self._engines[model], adapter or None

    def close(self) -> None:
        """End all engines."""
        for engine in self._engines.values():
            engine.close()


class Reference:
    """That process, seen from here. For any thread.

    Args:
        log: what it says beside its answers goes there.
    """

    def __init__(self, models: Models, log: Path) -> None:
        self._log = log
        self._asking = threading.Lock()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self._ask(models)

    def answers(self, asks: Sequence[Ask]) -> list[list[Turn]]:
        """As of `Answers.to`. Raises ReferenceFailed."""
        return self._ask(asks)

    def _ask(self, what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            with self._asking:
                pickle.dump(what, self._process.stdin)
                self._process.stdin.flush()
                kind, answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError) as error:
            lines = self._log.read_text().strip().splitlines()
            raise ReferenceFailed(
                f"its process ended: {lines[-1] if lines else 'without a word'}"
            ) from error
        if kind == "failed":
            raise ReferenceFailed(answer)
        return answer

    def close(self) -> None:
        """End it. Closing twice is harmless."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _serve(read: Callable[[], Any], write: Callable[[Any], None]) -> None:
    answers = Answers(read())
    write(("ready", None))
    while True:
        try:
            asks: list[Ask] = read()
        except EOFError:
            answers.close()
            return
        try:
            # A client that goes away is no part of what is right.
            write(("answers", answers.to([replace(ask, cancel_after=None) for ask in asks])))
        except VkvError as error:
            write(("failed", str(error)))


def _main() -> None:
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whoever prints does not break what is written

    def write(what: Any) -> None:
        pickle.dump(what, out)
        out.flush()

    _serve(lambda: pickle.load(sys.stdin.buffer), write)


if __name__ == "__main__":
    _main()
