"""How a benchmark's worker talks to the harness: JSON lines over its standard streams.

Only the standard library is used, since workers of other systems run in interpreters of their
own, where vkv is not installed. A worker is started as

    python WORKER.py '{"model": FOLDER, "threads": 2, "dtype": "bfloat16", …}'

It loads its system, says {"ready": true}, and then answers each line with its result and the
process's memory, or with the error that it met. A system that generates is asked
{"prompts": [[token ids]], "output_lens": [n, …]} and answers with the seconds that it took and the
bytes of its weights.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], None]
Answer = Callable[[dict[str, Any]], dict[str, Any]]


class System(NamedTuple):
    """A system that is loaded: how it generates, and the bytes of its weights if it knows."""

    generate: Generate
    weight_bytes: int | None = None


def serve(load: Callable[[dict[str, Any]], System]) -> None:
    """Answer with the time that the system loaded by `load(options)` takes to generate."""

    def load_timed(options: dict[str, Any]) -> Answer:
        system = load(options)

        def timed(request: dict[str, Any]) -> dict[str, Any]:
            start = time.perf_counter()
            system.generate(request["prompts"], request["output_lens"])
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "weight_bytes": system.weight_bytes}

        return timed

    answer_all(load_timed)


def answer_all(load: Callable[[dict[str, Any]], Answer]) -> None:
    """Load a system by `load(options)` and answer until the harness hangs up.

    Standard output is for answers alone: whatever else the process prints goes to its errors.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    try:
        system = load(options)
    except Exception as error:  # noqa: BLE001 - told to the harness, whatever it is
        answers.write(json.dumps({"error": _describe(error)}) + "\n")
        return
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        try:
            answer = system(json.loads(line))
        except Exception as error:  # noqa: BLE001 - told to the harness, whatever it is
            answer = {"error": _describe(error)}
        answers.write(json.dumps(answer | {"peak_rss_bytes": peak_rss_bytes()}) + "\n")


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024


def expect(found: int, wanted: int) -> None:
    """Complain of outputs that are not as long as asked: their time would mean nothing."""
    if found != wanted:
        raise RuntimeError(f"{found} tokens came out where {wanted} were asked for")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
