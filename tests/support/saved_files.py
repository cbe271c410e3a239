"""Small files of keys and values, and writers of them that are killed."""

import os
import random
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from vkv.allocator import KVFacts, KVFile, KVFileWriter, TokenFormat

FORMAT = TokenFormat("float32", (((0, "key", 2, 6), (0, "value", 2, 6)), ((1, "key", 1, 5),)))
WIDTHS = FORMAT.widths  # 96 and 20 bytes
NUM_TOKENS = 300
CHUNK = 1000


def facts(num_tokens: int = NUM_TOKENS, first: int = 0, **more: Any) -> KVFacts:
    tokens = range(first, first + num_tokens)
    given = {"model": "m", "token_format": FORMAT, "tokens": tokens, "chunk_bytes": CHUNK}
    return KVFacts(**{**given, **more})


def streams(num_tokens: int = NUM_TOKENS, seed: int = 1) -> list[list[torch.Tensor]]:
    """Random bytes, each stream in several pieces of uneven lengths."""
    generator = random.Random(seed)
    return [
        [
            torch.frombuffer(bytearray(part), dtype=torch.uint8)
            for part in _cut(generator.randbytes(num_tokens * width), generator)
        ]
        for width in WIDTHS
    ]


def _cut(content: bytes, generator: random.Random) -> Iterator[bytes]:
    places = sorted(generator.sample(range(1, len(content)), 5))
    yield from (content[a:b] for a, b in zip([0, *places], [*places, len(content)], strict=True))


def save(path: str | Path, *, seed: int = 1, **more: Any) -> KVFileWriter:
    with KVFileWriter(path, facts(**more)) as writer:
        writer.write(streams(more.get("num_tokens", NUM_TOKENS), seed))
        writer.commit()
    return writer


def joined(pieces: Sequence[Sequence[torch.Tensor]]) -> list[bytes]:
    return [bytes(torch.cat(list(stream)).numpy()) for stream in pieces]


def read(file: KVFile, num_tokens: int) -> list[bytes]:
    spans = [[torch.zeros(num_tokens * width, dtype=torch.uint8)] for width in WIDTHS]
    file.read_into(spans)
    return joined(spans)


def check_whole(path: Path, seeds: Collection[int]) -> None:
    """It is one of the files that were written, and all of it."""
    with KVFile.open(path) as file:
        first = int(file.tokens[0])
        assert first in seeds
        assert file.verify(0, NUM_TOKENS) == NUM_TOKENS
        assert read(file, NUM_TOKENS) == joined(streams(seed=first))


def kill_writers(path: Path, times: int, seed: int) -> int:
    """Kill a process that saves, again and again; returns how many leftovers that made."""
    generator = random.Random(seed)
    left = 0
    for number in range(times):
        ready, begun = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(begun, b".")
            while True:
                number += 1
                save(path, first=number % 100, seed=number % 100)
        os.read(ready, 1)
        os.close(ready)
        os.close(begun)
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if path.exists():
            check_whole(path, range(100))
        left += len([p for p in path.parent.iterdir() if p != path])
    save(path, first=1)
    assert list(path.parent.iterdir()) == [path], "a leftover was not removed"
    return left
