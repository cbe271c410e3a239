"""Servers driven over HTTP: what a client makes of an answer, and a whole run."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from vkv.bench.load.http_client import Endpoint, drive_server
from vkv.bench.load.http_servers import checked, named
from vkv.bench.load.options import ServeOptions
from vkv.bench.load.serve import run
from vkv.bench.load.workloads import WorkItem
from vkv.vmem.errors import InvalidConfig

WORK = [WorkItem((1, 2, 3), 3)] * 4
END = b"data: [DONE]\n\n"


def chunk(text: str, **more: object) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": None, **more}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def usage(num_tokens: int) -> bytes:
    told = {"choices": [], "usage": {"completion_tokens": num_tokens}}
    return b"data: " + json.dumps(told).encode() + b"\n\n"


def answers(body: list[bytes], status: str = "200 OK", cut: int = 1 << 20) -> object:
    """What a client makes of a server that says this, in pieces of `cut` bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        whole = b"".join(body)
        for at in range(0, len(whole), cut):
            piece = whole[at : at + cut]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def ask() -> object:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await drive_server(Endpoint(url=f"http://127.0.0.1:{port}"), WORK, [0.0, 0.0])

    return asyncio.run(ask())


@pytest.mark.parametrize("cut", [7, 1 << 20])
@pytest.mark.parametrize(
    "body",
    [
        [chunk("a"), chunk("b"), chunk("", finish_reason="length"), usage(3), END],
        [chunk("a"), chunk("b"), chunk("c"), chunk("", finish_reason="length"), END],
        [chunk("abc", token_ids=[1, 2, 3], finish_reason="length"), b": comment\n\n", END],
        [chunk("", token_ids=[1]), chunk("b", token_ids=[2, 3]), usage(3), END],
    ],
    ids=["usage tells of more", "one an event", "several an event", "tokens without text"],
)
def test_each_token_has_its_time(body: list[bytes], cut: int) -> None:
    trace = answers(body, cut=cut)
    assert [len(request.token_times_s) for request in trace.requests] == [3] * 4
    for request in trace.requests:
        assert request.arrival_s <= request.token_times_s[0]
        assert request.token_times_s == sorted(request.token_times_s)
    assert trace.duration_s == max(r.token_times_s[-1] for r in trace.requests)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ([b'{"error": "no"}'], "400 Bad Request", "answered 400"),
        ([chunk("a"), b'data: {"error": {"message": "lost"}}\n\n', END], "200 OK", "lost"),
        ([chunk("a"), chunk("b"), chunk("c")], "200 OK", "no end"),
        ([chunk("a"), END], "200 OK", "1 tokens of 3"),
    ],
)
def test_what_is_no_whole_answer_counts_for_nothing(
    body: list[bytes], status: str, words: str
) -> None:
    with pytest.raises(ExceptionGroup) as told:
        answers(body, status)
    assert words in str(told.value.exceptions[0])


def test_names_of_servers() -> None:
    assert named(["http://a:1/v1", "mine=https://b"]) == {
        "server-1": "http://a:1",
        "mine": "https://b",
    }
    with pytest.raises(InvalidConfig, match="NAME=URL"):
        named(["localhost:8000"])
    with pytest.raises(InvalidConfig, match="unknown"):
        checked({"other": sys.executable})


def test_a_run_beside_the_library(tmp_path: Path) -> None:
    systems = {"vkv", "vkv-cluster"} if importlib.util.find_spec("ray") else {"vkv"}
    options = ServeOptions(
        shape="llama-tiny",
        dtype=torch.float32,
        device=torch.device("cpu"),
        workloads=("sharegpt",),
        num_requests=3,
        scale=0.05,
        clients=(2,),
        peers=dict.fromkeys(systems, sys.executable),
    )
    path, tables = run(options, tmp_path, "a command")
    record = json.loads(path.read_text())
    runs = {entry["system"]: entry for entry in record["results"]["runs"]}
    assert set(runs) == {"library", *systems}, record["results"]["failures"]
    assert record["is_complete"]
    assert runs["vkv"]["output_lens"] != []
    assert sorted(runs["vkv"]["output_lens"]) == sorted(runs["library"]["output_lens"])
    assert any(row[2] == "vkv" for row in tables[1].rows)
    footprints = record["results"]["footprints"]
    assert set(footprints) == systems
    for system in systems:
        (footprint,) = footprints[system]
        assert footprint["ready_s"] > 0
        assert all(num_bytes > 0 for _, num_bytes in footprint["processes"])
        has_ray = any(name == "raylet" for name, _ in footprint["processes"])
        assert has_ray == (system == "vkv-cluster")
