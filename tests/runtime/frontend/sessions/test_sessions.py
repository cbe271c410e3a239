"""Sessions through the front door: the same tokens, whatever became of the file."""

import asyncio
import contextlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import vkv
import zoo
from vkv import LLM
from vkv.allocator import KVFacts, KVFile, KVFileWriter
from vkv.vmem import errors
from vkv.vmem.errors import (
    InvalidConfig,
    InvalidOperation,
    InvalidPrompt,
    KVFileDamaged,
    KVFileError,
    KVFileInaccessible,
    KVFileMismatch,
    RequestTooLong,
    UnsupportedModel,
)

PAGE = 4096
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seqs": 4, "page_bytes": PAGE}
(PROMPT,) = zoo.random_prompts([300])
(TAIL,) = zoo.random_prompts([20], seed=5)

Make = Callable[..., LLM]


@pytest.fixture
def make_llm(llama_folder: Path) -> Iterator[Make]:
    """Makes models of the tiny checkpoint, closes them, and looks for what they leave."""
    before = _descriptors()
    made: list[LLM] = []

    def make(model: Any = llama_folder, **options: Any) -> LLM:
        made.append(LLM(model, **{**OPTIONS, **options}))
        return made[-1]

    yield make
    for llm in made:
        if not llm.is_closed:
            llm.engine.cache.check_invariants()
            pool = llm.engine.cache.pool
            llm.close()
            assert pool.num_of_files == pool.num_held == 0
    assert _descriptors() == before


def _descriptors() -> list[str]:
    """Open files that sessions and drivers may leave."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if "memfd:vkv" in target or ".kv" in target or "/.vkv-" in target:
            found.append(target)
    return sorted(found)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What follows the session's tokens and the tail."""
    return zoo.generate_alone(zoo.tiny_model("llama", attention="sdpa"), [*PROMPT, *TAIL], 12)


@pytest.fixture(scope="module")
def saved(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A session of the prompt, saved by the tiny checkpoint, as bytes."""
    path = tmp_path_factory.mktemp("saved") / "session.kv"
    with LLM(llama_folder, **OPTIONS) as llm:
        llm.save_session(path, PROMPT)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, saved: bytes) -> Path:
    path = tmp_path / "session.kv"
    path.write_bytes(saved)
    return path


def go_on(llm: LLM, prompt: Sequence[int] = (*PROMPT, *TAIL)) -> tuple[list[int], int]:
    """The output's tokens, and how many of the prompt's were found."""
    (out,) = llm.generate([list(prompt)], zoo.greedy())
    return list(out.outputs[0].token_ids), out.num_cached_tokens or 0


# -- saved and opened ----------------------------------------------------------------------------


def test_another_model_of_the_same_numbers_goes_on(
    make_llm: Make, tmp_path: Path, expected: list[int]
) -> None:
    path = tmp_path / "session.kv"
    session = make_llm().save_session(path, PROMPT, extra=b"mine")
    assert (session.path, session.num_tokens) == (path, 300)
    assert session.num_bytes == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    llm = make_llm()
    opened = llm.open_session(path)
    assert opened == session
    assert opened.tokens == tuple(PROMPT)
    assert go_on(llm) == (expected, 300)
    stats = llm.stats()
    assert stats.num_prompt_tokens == len(TAIL)
    assert stats.pages_of_files == 2 * (300 * 128 // PAGE)  # both layers' whole pages
    assert make_llm().stats().pages_of_files == 0


def test_a_text_a_conversation_and_an_output_are_saved(make_llm: Make, tmp_path: Path) -> None:
    llm = make_llm()
    messages = [{"role": "user", "content": "hello"}]
    (answer,) = llm.chat(messages, zoo.greedy())
    path = tmp_path / "session.kv"
    assert llm.save_session(path, "hello there").num_tokens == 11
    assert llm.save_session(path, messages).tokens == answer.prompt_token_ids
    whole = answer.prompt_token_ids + answer.outputs[0].token_ids
    before = llm.stats().num_computed_tokens
    assert llm.save_session(path, answer).tokens == whole
    assert llm.stats().num_computed_tokens <= before + 10  # the rest was held
    assert llm.open_session(path).tokens == whole


def test_what_is_not_held_any_more_is_computed_first(
    make_llm: Make, tmp_path: Path, expected: list[int]
) -> None:
    llm = make_llm()
    (out,) = llm.generate([PROMPT], zoo.greedy())
    llm.trim()
    session = llm.save_session(tmp_path / "session.kv", out)
    assert session.num_tokens == 312
    other = make_llm()
    other.open_session(session.path)
    tokens = [*session.tokens, *TAIL]
    assert go_on(other, tokens) == (go_on(make_llm(), tokens)[0], 312)


def test_a_full_slot_is_saved_but_for_its_last_token(make_llm: Make, tmp_path: Path) -> None:
    llm = make_llm(max_len=312)
    (out,) = llm.generate([PROMPT], zoo.greedy())
    assert llm.save_session(tmp_path / "session.kv", out).num_tokens == 311


def test_what_is_saved_again_replaces_what_was(make_llm: Make, path: Path) -> None:
    llm = make_llm()
    llm.open_session(path)
    assert go_on(llm)[1] == 300
    session = llm.save_session(path, [*PROMPT, *TAIL])  # while it is open and mapped
    assert llm.open_session(path) == session
    other = make_llm()
    other.open_session(path)
    assert go_on(other, [*PROMPT, *TAIL, 7])[1] == 320


def test_a_prompt_that_has_only_a_part_in_common_finds_that(make_llm: Make, path: Path) -> None:
    llm, plain = make_llm(), make_llm()
    llm.open_session(path)
    for common in (299, 200, 128, 33):
        prompt = [*PROMPT[:common], (PROMPT[common] + 1) % 90, *TAIL]
        assert go_on(llm, prompt) == (go_on(plain, prompt)[0], common)
        llm.trim()
        plain.trim()
    assert go_on(llm, [*PROMPT[:20], 93, *TAIL])[1] == 0  # less than a page is not worth it


def test_what_is_parked_goes_before_the_file(make_llm: Make, path: Path) -> None:
    llm = make_llm()
    llm.open_session(path)
    go_on(llm)
    before = llm.stats().driver_calls["attach"]
    assert go_on(llm, [*PROMPT, *TAIL, 3])[1] == 320
    assert llm.stats().driver_calls["attach"] == before


def test_many_requests_and_several_outputs_share_the_file(
    make_llm: Make, path: Path, expected: list[int]
) -> None:
    llm = make_llm()
    llm.open_session(path)
    outs = llm.generate([[*PROMPT, *TAIL]] * 3, [zoo.greedy(), zoo.greedy(), zoo.greedy()])
    assert [list(out.outputs[0].token_ids) for out in outs] == [expected] * 3
    params = vkv.SamplingParams(n=3, seed=4, max_tokens=10, ignore_eos=True)
    (sampled,) = llm.generate([[*PROMPT, *TAIL]], params)
    (plain,) = make_llm().generate([[*PROMPT, *TAIL]], params)
    assert [o.token_ids for o in sampled.outputs] == [o.token_ids for o in plain.outputs]


@pytest.mark.parametrize("page_bytes", [4096, 8192, 65536])
@pytest.mark.parametrize("options", [{}, {"sanitize": "zero"}])
def test_pages_of_any_size(
    make_llm: Make, path: Path, expected: list[int], page_bytes: int, options: dict[str, Any]
) -> None:
    llm = make_llm(page_bytes=page_bytes, **options)
    llm.open_session(path)
    assert go_on(llm) == (expected, 300 if page_bytes < 65536 else 0)


@pytest.mark.parametrize("options", [{"split_kv": True}, {"layers_per_range": 2}])
def test_slots_of_another_shape_are_saved_too(
    make_llm: Make, tmp_path: Path, path: Path, expected: list[int], options: dict[str, Any]
) -> None:
    llm = make_llm(**options)
    assert not llm.open_session(path).is_usable
    llm.save_session(tmp_path / "other.kv", PROMPT)
    other = make_llm(**options)
    assert other.open_session(tmp_path / "other.kv").is_usable
    assert go_on(other) == (expected, 300)


def test_the_paged_baseline_saves_and_reads(
    make_llm: Make, tmp_path: Path, path: Path, expected: list[int]
) -> None:
    options = {"kv": "paged", "page_bytes": None}
    llm = make_llm(**options)
    assert not llm.open_session(path).is_usable
    llm.save_session(tmp_path / "paged.kv", PROMPT)
    other = make_llm(**options)
    assert other.open_session(tmp_path / "paged.kv").is_usable
    assert go_on(other) == (expected, 300)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_windows_sinks_and_latent_attention(make_llm: Make, tmp_path: Path, name: str) -> None:
    """Of models that are handed over, whose numbers are known by their parameters."""
    path = tmp_path / "session.kv"
    make_llm(zoo.tiny_model(name)).save_session(path, PROMPT)
    llm = make_llm(zoo.tiny_model(name))
    assert llm.open_session(path).is_usable
    prompt = [*PROMPT, *TAIL]
    assert go_on(llm) == (zoo.generate_alone(zoo.tiny_model(name), prompt, 12), 300)


def test_tenants_are_kept_apart(make_llm: Make, tmp_path: Path) -> None:
    path = tmp_path / "session.kv"
    llm = make_llm()
    llm.save_session(path, {"prompt_token_ids": PROMPT, "cache_salt": "one"})
    assert b"one" not in path.read_bytes()[:200]
    other = make_llm()
    other.open_session(path)
    found = {}
    for salt in ("two", "", "one"):
        prompt = {"prompt_token_ids": [*PROMPT, *TAIL], "cache_salt": salt}
        (out,) = other.generate([prompt], zoo.greedy())
        found[salt] = out.num_cached_tokens
    assert found == {"two": 0, "": 0, "one": 300}


def test_sleep_and_trim_leave_a_session_open(
    make_llm: Make, path: Path, expected: list[int]
) -> None:
    llm = make_llm()
    llm.open_session(path)
    go_on(llm)
    llm.trim()
    assert llm.stats().pages_of_files == 0
    assert go_on(llm) == (expected, 300)
    llm.sleep()
    with pytest.raises(InvalidOperation, match="asleep"):
        llm.open_session(path)
    llm.wake()
    assert go_on(llm) == (expected, 300)


def test_the_file_may_go_once_it_is_open(make_llm: Make, path: Path, expected: list[int]) -> None:
    llm = make_llm()
    llm.open_session(path)
    path.unlink()
    assert go_on(llm) == (expected, 300)


def test_memory_too_small_for_the_prompt_alone_is_enough_with_the_file(
    make_llm: Make, path: Path, expected: list[int]
) -> None:
    """Pages of the file come under no limit, so two of these run at once."""
    llm = make_llm(kv_memory=24 * PAGE, max_len=336, max_seqs=2)
    llm.open_session(path)
    outs = llm.generate([[*PROMPT, *TAIL]] * 2, zoo.greedy())
    assert [list(out.outputs[0].token_ids) for out in outs] == [expected] * 2
    assert llm.stats().num_preemptions == 0


def test_async(llama_folder: Path, tmp_path: Path, expected: list[int]) -> None:
    async def main() -> tuple[list[int], int | None]:
        path = tmp_path / "session.kv"
        async with vkv.AsyncLLM(llama_folder, **OPTIONS) as llm:
            beside = asyncio.create_task(_last(llm, TAIL))
            session, again = await asyncio.gather(
                llm.save_session(path, PROMPT), llm.save_session(tmp_path / "other.kv", PROMPT)
            )
            assert session.tokens == again.tokens
            await beside
        async with vkv.AsyncLLM(llama_folder, **OPTIONS) as llm:
            assert await llm.open_session(path) == session
            out = await _last(llm, [*PROMPT, *TAIL])
            return list(out.outputs[0].token_ids), out.num_cached_tokens

    assert asyncio.run(main()) == (expected, 300)


async def _last(llm: vkv.AsyncLLM, prompt: Sequence[int]) -> vkv.RequestOutput:
    last = None
    async for output in llm.generate(list(prompt), zoo.greedy()):
        last = output
    assert last is not None
    return last


# -- damage --------------------------------------------------------------------------------------


def test_a_bit_flipped_in_any_chunk_costs_a_warning_and_time(
    make_llm: Make, tmp_path: Path, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm()
    llm.save_session(tmp_path / "whole.kv", PROMPT)
    path = tmp_path / "session.kv"
    _with_small_chunks(tmp_path / "whole.kv", path)
    whole = path.read_bytes()
    with KVFile.open(path) as file:
        header, offsets = file.header, file.offsets
    for stream in range(len(offsets)):
        for chunk in range(header.num_chunks(stream)):
            damaged = bytearray(whole)
            damaged[offsets[stream] + chunk * header.chunk_bytes + 11] ^= 16
            path.write_bytes(damaged)
            caplog.clear()
            other = make_llm()
            other.open_session(path)
            tokens, num_found = go_on(other)
            assert tokens == expected
            sound = chunk * header.chunk_bytes // header.token_format.widths[stream]
            assert num_found in (sound, 0 if sound <= 64 else sound)
            (warning,) = [r.getMessage() for r in caplog.records if "kv" in r.name]
            assert str(path) in warning
            assert f"chunk {chunk} of stream {stream}" in warning
            other.close()


def _with_small_chunks(source: Path, target: Path) -> None:
    """The same session, with a checksum for 4 KiB."""
    import torch

    with KVFile.open(source) as file:
        facts = KVFacts(
            model=file.header.model,
            token_format=file.header.token_format,
            tokens=file.tokens.tolist(),
            chunk_bytes=4096,
        )
        spans = [
            [torch.zeros(len(file.tokens) * width, dtype=torch.uint8)]
            for width in file.header.token_format.widths
        ]
        file.read_into(spans)
    with KVFileWriter(target, facts) as writer:
        writer.write(spans)
        writer.commit()


def test_a_file_cut_short_at_any_page_is_made_up_for(
    make_llm: Make, path: Path, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    whole = path.read_bytes()
    llm = make_llm()
    for size in range(0, len(whole), PAGE):
        path.write_bytes(whole[:size])
        caplog.clear()
        llm.trim()
        if size < PAGE:
            with pytest.raises(KVFileDamaged, match="cut short"):
                llm.open_session(path)
        else:
            session = llm.open_session(path)
            assert session.tokens == tuple(PROMPT)
            assert "cut short" in caplog.text
        assert go_on(llm)[0] == expected
        llm.engine.cache.check_invariants()


def test_a_file_cut_short_while_it_is_open_is_made_up_for(
    make_llm: Make, path: Path, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm()
    llm.open_session(path)
    os.truncate(path, PAGE * 3)
    assert go_on(llm) == (expected, 0)
    assert str(path) in caplog.text


def test_a_header_of_which_a_bit_is_flipped_is_refused(
    make_llm: Make, path: Path, expected: list[int]
) -> None:
    whole = path.read_bytes()
    llm = make_llm()
    for place in (0, 9, 13, 20, 30, 100, 700):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(KVFileError, match=str(path)):
            llm.open_session(path)
    assert go_on(llm) == (expected, 0)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"rms_norm_eps": 1e-3}, {"num_key_value_heads": 1}],
)
def test_a_session_of_another_model_is_computed_again(
    make_llm: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    path = tmp_path / "session.kv"
    make_llm(zoo.tiny_model("llama")).save_session(path, PROMPT)
    llm = make_llm(zoo.tiny_model("llama", **change))
    session = llm.open_session(path)
    assert not session.is_usable
    assert session.tokens == tuple(PROMPT)
    assert "saved by another model" in caplog.text
    prompt = [*PROMPT, *TAIL]
    expected = zoo.generate_alone(zoo.tiny_model("llama", **change), prompt, 12)
    assert go_on(llm) == (expected, 0)


def test_a_model_that_changes_lets_go_of_its_sessions(make_llm: Make, tmp_path: Path) -> None:
    path = tmp_path / "session.kv"
    model = zoo.tiny_model("llama")
    llm = make_llm(model)
    llm.save_session(path, PROMPT)
    llm.trim()
    assert llm.open_session(path).is_usable
    model.model.norm.weight.data.mul_(1.5)
    model.model.layers[0].input_layernorm.weight.data.mul_(0.5)
    llm.weights_changed()
    expected = zoo.generate_alone(model_like(model), [*PROMPT, *TAIL], 12)
    assert go_on(llm) == (expected, 0)
    llm.trim()
    assert not llm.open_session(path).is_usable
    llm.save_session(path, PROMPT)
    llm.trim()
    assert llm.open_session(path).is_usable
    assert go_on(llm) == (expected, 300)


def model_like(model: Any) -> Any:
    """The same weights, under transformers' own attention."""
    other = zoo.tiny_model("llama")
    other.load_state_dict(model.state_dict())
    return other


def test_another_dtype_is_another_format(
    make_llm: Make, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(dtype="bfloat16")
    assert not llm.open_session(path).is_usable
    assert "computed again" in caplog.text


def test_what_cannot_be_is_refused(make_llm: Make, tmp_path: Path, path: Path) -> None:
    llm = make_llm(max_len=200)
    with pytest.raises(KVFileInaccessible, match=r"missing.kv.*save one there first"):
        llm.open_session(tmp_path / "missing.kv")
    with pytest.raises(KVFileInaccessible, match="make the folder first"):
        llm.save_session(tmp_path / "none" / "session.kv", PROMPT[:50])
    with pytest.raises(RequestTooLong):
        llm.save_session(path, PROMPT)
    with pytest.raises(InvalidPrompt):
        llm.save_session(path, [])
    with pytest.raises(InvalidConfig, match="max_parked is 0"):
        make_llm(max_parked=0).save_session(path, PROMPT)
    with pytest.raises(InvalidConfig, match="prefix_reuse is False"):
        make_llm(prefix_reuse=False).open_session(path)
    llm.close()
    for call in (lambda: llm.open_session(path), lambda: llm.save_session(path, PROMPT)):
        with pytest.raises(InvalidOperation, match="closed"):
            call()


def test_hybrids_are_refused_by_name(make_llm: Make, path: Path) -> None:
    llm = make_llm(zoo.tiny_model("lfm2"))
    for call in (lambda: llm.open_session(path), lambda: llm.save_session(path, PROMPT)):
        with pytest.raises(UnsupportedModel, match="Lfm2ForCausalLM has layers with recurrent"):
            call()


def test_a_write_that_fails_leaves_the_engine_whole(
    make_llm: Make, path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    llm = make_llm()
    before = path.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(28, "injected")

    for name in ("pwrite", "fsync", "ftruncate", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(KVFileInaccessible, match="No space left"):
                llm.save_session(path, PROMPT)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
        zoo.assert_idle(llm)
    assert go_on(llm) == (expected, 300)  # parked all the while


def test_ctrl_c_while_a_file_is_written_leaves_nothing_of_it(
    make_llm: Make, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until all is written, and comes where the file is handed over."""
    llm, write = make_llm(), KVFileWriter.write
    before = path.read_bytes()

    def write_interrupted(writer: KVFileWriter, streams: Any) -> None:
        write(writer, streams)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(KVFileWriter, "write", write_interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.save_session(path, PROMPT)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before
    assert not [name for name in _descriptors() if ".part" in name]
    zoo.assert_idle(llm)


@pytest.mark.parametrize("is_usable", [True, False])
def test_ctrl_c_while_a_file_is_taken_in_closes_no_descriptor_twice(
    make_llm: Make,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: list[int],
    is_usable: bool,
) -> None:
    llm, close = make_llm(), KVFile.close
    closed: list[KVFile] = []

    def note_close(file: KVFile) -> None:
        closed.append(file)
        close(file)

    def check(file: KVFile, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        if not is_usable:
            raise KVFileMismatch("injected")

    monkeypatch.setattr(KVFile, "close", note_close)
    monkeypatch.setattr(KVFile, "check_fits", check)
    with pytest.raises(KeyboardInterrupt):
        llm.open_session(path)
    assert len(closed) == (not is_usable)
    assert go_on(llm) == (expected, 300 if is_usable else 0)


def test_a_file_that_cannot_be_mapped_is_read(
    make_llm: Make, path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    """As on a device, or where no mapping is to spare."""
    for error in (errors.OutOfMappings, errors.InvalidOperation, errors.DriverError):
        llm = make_llm()
        llm.open_session(path)

        def refuse(*_: object, kind: type[Exception] = error) -> None:
            raise kind("injected")

        monkeypatch.setattr(llm.engine.cache.pool, "attach_file", refuse)
        assert go_on(llm) == (expected, 300)
        assert llm.stats().pages_of_files == 0


def test_the_file_used_last_is_kept_open_longest(
    make_llm: Make, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vkv.runtime.scheduling.kv_files.MOST_FILES", 2)
    llm = make_llm()
    names = [tmp_path / f"{number}.kv" for number in range(2)]
    for number, name in enumerate(names):
        llm.save_session(name, [number, *PROMPT[:50]])
    llm.trim()
    for name in (path, names[0]):
        llm.open_session(name)
    assert go_on(llm)[1] == 300
    llm.open_session(names[1])  # in place of the first of the names
    llm.trim()
    assert go_on(llm)[1] == 300
    assert go_on(llm, [0, *PROMPT[:50], 1])[1] == 0


# -- processes -----------------------------------------------------------------------------------

_READERS = """
import json, multiprocessing, sys
import torch
import vkv
from vkv.runtime.frontend import llm  # loaded once, before the others are made of this process

folder, path = sys.argv[1:]
context = multiprocessing.get_context("fork")
barrier, found = context.Barrier(8), context.SimpleQueue()

def read():
    torch.set_num_threads(1)
    options = {"device": "cpu", "dtype": "float32", "max_seqs": 2, "page_bytes": 4096}
    with vkv.LLM(folder, **options) as llm:
        session = llm.open_session(path)
        params = vkv.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        (out,) = llm.generate([[*session.tokens, 1, 2, 3]], params, progress=False)
        barrier.wait(200)
        total, ours = {"Rss:": 0, "Pss:": 0}, False
        for line in open("/proc/self/smaps"):
            fields = line.split()
            if "-" in fields[0] and not fields[0].endswith(":"):
                ours = path in line
            elif ours and fields[0] in total:
                total[fields[0]] += int(fields[1])
        barrier.wait(200)
        tokens = out.outputs[0].token_ids
        found.put([out.num_cached_tokens, tokens, total["Rss:"], total["Pss:"]])

readers = [context.Process(target=read) for _ in range(8)]
for reader in readers:
    reader.start()
print(json.dumps([found.get() for _ in readers]))
for reader in readers:
    reader.join()
    assert not reader.exitcode
"""


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.timeout(240)
def test_eight_processes_share_one_copy(llama_folder: Path, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _READERS, str(llama_folder), str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 8
    for num_cached, tokens, rss, pss in found:
        assert num_cached == 300
        assert tokens == found[0][1]
        assert rss >= 2 * (300 * 128 // PAGE) * 4
        assert abs(pss - rss / 8) <= 2  # KiB; each mapping's share is rounded down


def test_random_changes_of_the_file_never_change_a_token(
    make_llm: Make, path: Path, expected: list[int]
) -> None:
    """Bits, runs of zeros, cuts and exchanged pages, anywhere."""
    generator = random.Random(7)
    whole = path.read_bytes()
    llm = make_llm()
    for _ in range(40):
        damaged = bytearray(whole)
        place = generator.randrange(len(whole))
        match generator.randrange(4):
            case 0:
                damaged[place] ^= 1 << generator.randrange(8)
            case 1:
                damaged[place : place + 600] = bytes(len(damaged[place : place + 600]))
            case 2:
                del damaged[place:]
            case 3:
                damaged[place : place + PAGE] = damaged[:PAGE]
        path.write_bytes(damaged)
        with contextlib.suppress(KVFileError):
            assert llm.open_session(path).tokens == tuple(PROMPT)
        assert go_on(llm)[0] == expected
        llm.trim()
