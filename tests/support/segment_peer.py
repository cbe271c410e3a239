"""An engine in a process of its own that lends memory, while it runs a request of its own.

Told on stdin, a line at a time; says on stdout what came of it.
"""

import json
import select
import socket
import sys
from typing import Any

import moved
import zoo
from vkv import LLM
from vkv.attention_backends import choose_backend, partial_attention
from vkv.runtime.model.segments import SegmentServer


def main(options: dict[str, Any], model: dict[str, Any], descriptor: int, length: int) -> None:
    """Serve on a connected socket; after each step look whether stdin ends."""
    with LLM(zoo.tiny_model("llama", **model), device="cpu", **zoo.with_defaults(options)) as llm:
        engine, loaded = llm.engine, llm.loaded
        partial = partial_attention(choose_backend(loaded.needs(paged=False)))
        server = SegmentServer(
            engine.cache, partial, loaded.attention, loaded.dtype, spare_tokens=2 * length
        )
        engine.scheduler.tiers.guests.append(server)
        server.serve(socket.socket(fileno=descriptor))
        say({"ready": True})
        while not select.select([sys.stdin], [], [], 0)[0]:
            (spec,) = moved.specs(zoo.random_prompts([length]), max_tokens=8, mixed=False)
            (request,) = engine.add(spec)
            while engine.has_work:
                engine.step()
            engine.take_outputs()
        say({"tokens": request.output_token_ids, "lent": len(server.loans)})
        server.close()


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
