"""How a benchmark's worker talks to the harness: JSON lines over its standard streams.

Only the standard library is used, since workers of other systems run in interpreters of their
own, where vkv is not installed. A worker is started as

    python WORKER.py '{"model": FOLDER, "threads": 2, "dtype": "bfloat16", …}'

It loads its system, says {"ready": true}, and then answers each line
{"prompts": [[token ids]], "output_lens": [n, …]} with the seconds that generating took and its
memory, or with the error that it met.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], None]


def serve(load: Callable[[dict[str, Any]], Generate]) -> None:
    """Load a system by `load(options)` and answer until the harness hangs up.

    Standard output is for answers alone: whatever else the process prints goes to its errors.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    try:
        generate = load(options)
    except Exception as error:  # noqa: BLE001 - told to the harness, whatever it is
        answers.write(json.dumps({"error": _describe(error)}) + "\n")
        return
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            start = time.perf_counter()
            generate(request["prompts"], request["output_lens"])
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
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
