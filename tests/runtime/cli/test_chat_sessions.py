"""`vkv chat --session`: a conversation that goes on in another process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result
from vkv import SamplingParams
from vkv.allocator import KVFile
from vkv.runtime.cli import main as cli
from vkv.runtime.cli.chat import ChatSession
from vkv.runtime.frontend.llm import LLM
from vkv.vmem.errors import KVFileMismatch

torch.set_num_threads(1)

TOLD = "my gate code is 4821\n"
ASKED = "what is my gate code?\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.kv"


def chat(path: Path, stdin: str, *arguments: str) -> Result:
    arguments = ("chat", "--session", str(path), "--dtype", "float32", *arguments)
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def answers(path: Path, stdin: str, *arguments: str) -> list[str]:
    result = chat(path, stdin, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def whole() -> list[str]:
    """The same conversation without a pause."""
    result = CliRunner().invoke(cli.app, ["chat", "--dtype", "float32"], input=TOLD + ASKED)
    assert "4821" in result.stdout
    return result.stdout.splitlines()


def test_a_conversation_goes_on_in_another_process(path: Path, whole: list[str]) -> None:
    assert [*answers(path, TOLD), *answers(path, ASKED)] == whole
    with KVFile.open(path) as file:
        assert b"gate code" in file.header.extra


def test_its_keys_and_values_are_not_computed_again(path: Path) -> None:
    answers(path, TOLD)
    params = SamplingParams(temperature=0, max_tokens=16)
    with LLM(device="cpu", dtype="float32", max_seqs=1, page_bytes=4096) as llm:
        session = ChatSession(llm, params, path=path)
        held = llm.render_chat(session.turns, add_generation_prompt=False)
        assert "".join(session.answer(ASKED.strip()))
        assert llm.stats().prefix_hit_tokens == len(held)
        assert llm.stats().num_prompt_tokens < len(held)
        session.keep()
    with KVFile.open(path) as file:
        assert len(file.tokens) > len(held)


def test_a_system_message_is_kept_and_one_that_is_typed_goes_before(path: Path) -> None:
    answers(path, "hello\n", "--system", "be brief")
    with LLM(device="cpu", dtype="float32", max_seqs=1) as llm:
        params = SamplingParams(temperature=0)
        assert ChatSession(llm, params, path=path)._system[0]["content"] == "be brief"
        typed = ChatSession(llm, params, system="be long", path=path)
        assert typed._system[0]["content"] == "be long"
        assert len(typed.turns) == 2


def test_reset_resets_the_file_too(path: Path) -> None:
    answers(path, TOLD)
    shown = answers(path, "/reset\n" + ASKED)
    assert "4821" not in shown[-1]
    answers(path, "/reset\n")
    assert not path.exists()


def test_a_damaged_conversation_is_computed_again(path: Path, whole: list[str]) -> None:
    first = answers(path, TOLD)
    with KVFile.open(path) as file:
        place = file.offsets[1]
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 1
    path.write_bytes(content)
    assert [*first, *answers(path, ASKED)] == whole
    answers(path, ASKED)  # and the file is whole again
    with KVFile.open(path) as file:
        assert file.verify(0, len(file.tokens)) == len(file.tokens)


def test_a_conversation_that_cannot_be_read_is_set_aside(path: Path) -> None:
    answers(path, TOLD)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    result = chat(path, "hello\n")
    assert result.exit_code == 0
    assert "its header was changed" in result.stderr
    assert path.with_name("chat.kv.damaged").read_bytes() == content
    with KVFile.open(path) as file:
        assert b"gate code" not in file.header.extra


@pytest.mark.parametrize("content", [b"dear diary", b"\x89PNG\r\n" * 10])
def test_a_file_of_another_kind_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert isinstance(chat(path, "hello\n").exception, KVFileMismatch)
    assert path.read_bytes() == content


def test_a_session_that_is_no_conversation_is_left_alone(path: Path) -> None:
    with LLM(device="cpu", dtype="float32") as llm:
        llm.save_session(path, "once upon a time")
    before = path.read_bytes()
    error = chat(path, "hello\n").exception
    assert isinstance(error, KVFileMismatch)
    assert "no conversation" in str(error)
    assert path.read_bytes() == before


def test_what_cannot_be_saved_is_told_and_the_chat_goes_on(tmp_path: Path) -> None:
    result = chat(tmp_path / "none" / "chat.kv", TOLD + ASKED)
    assert result.exit_code == 0
    assert "4821" in result.stdout.splitlines()[1]
    assert "make the folder first" in result.stderr


def test_a_conversation_longer_than_the_slot_is_kept(path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    with LLM(device="cpu", dtype="float32", max_seqs=1, max_len=96) as llm:
        session = ChatSession(llm, params, path=path)
        for turn in range(6):
            assert "".join(session.answer(f"my locker number is {turn + 10}"))
            session.keep()
        assert session.num_dropped
        turns = list(session.turns)
    with LLM(device="cpu", dtype="float32", max_seqs=1, max_len=96) as llm:
        assert ChatSession(llm, params, path=path).turns == turns


@pytest.mark.timeout(120)
def test_ctrl_c_in_the_middle_of_an_answer_keeps_what_was_said(path: Path) -> None:
    source = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from vkv.runtime.cli.main import main; main()"
    )
    arguments = ["chat", "--session", str(path), "--max-tokens", "2000", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(TOLD.encode())
    process.stdin.flush()
    assert process.stdout.readline()
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.stdin.write(ASKED.encode())
    process.stdin.flush()
    assert process.stdout.read(1)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    with KVFile.open(path) as file:
        assert b"what is my gate code" in file.header.extra
        assert file.verify(0, len(file.tokens)) == len(file.tokens)
    assert [entry.name for entry in path.parent.iterdir()] == ["chat.kv"]
