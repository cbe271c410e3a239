"""Files of keys and values: written whole or not at all, and checked before they are believed."""

import errno
import logging
import os
import random
import resource
import stat
import subprocess
import threading

import msgspec
import pytest
import torch
from saved_files import (
    CHUNK,
    FORMAT,
    NUM_TOKENS,
    WIDTHS,
    check_whole,
    facts,
    joined,
    kill_writers,
    read,
    save,
    streams,
)
from vkv.allocator import KVFile, KVFileWriter, TokenFormat
from vkv.allocator.kv_file_format import PRELUDE_BYTES, KVFileHeader
from vkv.vmem.errors import (
    KVFileDamaged,
    KVFileError,
    KVFileInaccessible,
    KVFileMismatch,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "session.kv"


@pytest.fixture(autouse=True)
def no_descriptor_is_left(tmp_path):
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_was_written_is_read(path):
    writer = save(path, extra=b"my own", variant="salt")
    with KVFile.open(path) as file:
        assert file.num_bytes == writer.num_bytes == path.stat().st_size
        assert file.tokens.tolist() == list(range(NUM_TOKENS))
        assert file.header.extra == b"my own"
        assert file.header.token_format == FORMAT
        assert file.verify(0, NUM_TOKENS) == NUM_TOKENS
        assert read(file, NUM_TOKENS) == joined(streams())
        assert read(file, 7) == [s[: 7 * w] for s, w in zip(joined(streams()), WIDTHS, strict=True)]
        assert all(offset % 4096 == 0 for offset in file.offsets)
        assert file.damage is None


@pytest.mark.parametrize("chunk_bytes", [1, 96, 4096, 1 << 20])
@pytest.mark.parametrize("num_tokens", [1, 42, 43])
def test_chunks_of_any_size(path, chunk_bytes, num_tokens):
    save(path, chunk_bytes=chunk_bytes, num_tokens=num_tokens)
    with KVFile.open(path) as file:
        assert file.verify(0, num_tokens) == num_tokens
        assert read(file, num_tokens) == joined(streams(num_tokens))


def test_pieces_begin_anywhere_and_the_first_bytes_may_be_left_as_they_are(path):
    save(path)
    with KVFile.open(path) as file:
        spans = [
            [torch.full((n,), 9, dtype=torch.uint8) for n in (100, 0, 860)],
            [torch.full((n,), 9, dtype=torch.uint8) for n in (150, 50)],
        ]
        file.read_into(spans, [300, 7])
        expected = [s[: 10 * w] for s, w in zip(joined(streams()), WIDTHS, strict=True)]
        assert joined(spans) == [
            bytes([9] * 300) + expected[0][300:],
            bytes([9] * 7) + expected[1][7:],
        ]


def test_only_its_owner_may_read_it_from_the_first_moment(path):
    before = os.umask(0)
    try:
        with KVFileWriter(path, facts()) as writer:
            (part,) = path.parent.iterdir()
            assert stat.S_IMODE(part.stat().st_mode) == 0o600
            writer.write(streams())
            writer.commit()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_variant_is_known_to_those_alone_who_know_it(path):
    save(path, variant="tenant-7")
    assert b"tenant-7" not in path.read_bytes()
    with KVFile.open(path) as file:
        assert file.header.is_for("tenant-7")
        assert not file.header.is_for("")
        first = file.header.variant
    save(path, variant="tenant-7")
    with KVFile.open(path) as file:
        assert file.header.variant != first  # two files do not tell that they have the same


def test_opening_reads_the_header_alone(path, monkeypatch):
    save(path)
    places = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: places.append(at) or real(fd, b, at))
    with KVFile.open(path) as file:
        assert max(places) == 0
        file.verify(0, 10)
        assert len([at for at in places if at]) == 2  # a chunk of each stream
        file.verify(0, 10)
        assert len([at for at in places if at]) == 2  # once


def test_many_chunks_are_compared_by_several_threads(path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    save(path, chunk_bytes=64)
    names, are_two = set(), threading.Event()
    real = os.preadv

    def preadv(*args):
        names.add(threading.current_thread().name)
        if len(names) > 1:
            are_two.set()
        are_two.wait(10)  # or the first might be done with all before another begins
        return real(*args)

    with KVFile.open(path) as file:
        monkeypatch.setattr(os, "preadv", preadv)
        assert file.verify(0, NUM_TOKENS) == NUM_TOKENS
    assert len(names) > 1


def test_without_a_thread_to_spare_chunks_are_compared_all_the_same(path, monkeypatch):
    def no_more(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    save(path, chunk_bytes=64)
    with KVFile.open(path) as file, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        assert file.verify(0, NUM_TOKENS) == NUM_TOKENS


# -- damage ------------------------------------------------------------------------------------


def flip(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << random.Random(place).randrange(8)]))


def expected_sound(stream, chunk):
    """Tokens before a chunk."""
    return chunk * CHUNK // WIDTHS[stream]


@pytest.mark.parametrize("stream", [0, 1])
def test_a_bit_flipped_in_every_chunk_is_found_and_spares_what_is_before(path, stream, caplog):
    save(path)
    with KVFile.open(path) as file:
        offsets, num_chunks = file.offsets, file.header.num_chunks(stream)
    whole = path.read_bytes()
    for chunk in range(num_chunks):
        size = min(CHUNK, NUM_TOKENS * WIDTHS[stream] - chunk * CHUNK)
        path.write_bytes(whole)
        flip(path, offsets[stream] + chunk * CHUNK + random.Random(chunk).randrange(size))
        caplog.clear()
        with KVFile.open(path) as file:
            sound = expected_sound(stream, chunk)
            assert file.verify(0, NUM_TOKENS) == sound
            assert file.num_sound == sound
            assert f"chunk {chunk} of stream {stream}" in file.damage
            (record,) = caplog.records
            assert record.levelno == logging.WARNING
            assert str(path) in record.getMessage()
            assert file.verify(0, NUM_TOKENS) == sound
            assert read(file, sound) == [
                s[: sound * w] for s, w in zip(joined(streams()), WIDTHS, strict=True)
            ]


def test_of_several_damaged_chunks_the_first_counts(path, caplog):
    save(path)
    with KVFile.open(path) as file:
        places = [file.offsets[0] + 20_500, file.offsets[0] + 5500, file.offsets[1] + 4500]
    for place in places:
        flip(path, place)
    with KVFile.open(path) as file:
        assert file.verify(0, 40) == 40
        assert file.verify(0, NUM_TOKENS) == 5000 // 96
    assert len(caplog.records) == 1


def test_a_bit_flipped_anywhere_in_the_header_is_found(path):
    save(path, extra=b"x" * 50)
    size = len(KVFileHeader.of(facts(extra=b"x" * 50)).encode())
    whole = path.read_bytes()
    for place in [*range(PRELUDE_BYTES), *range(PRELUDE_BYTES, size, 13)]:
        path.write_bytes(whole)
        flip(path, place)
        with pytest.raises(KVFileError, match=str(path)):
            KVFile.open(path)


def test_a_file_cut_short_anywhere_gives_what_is_left_of_it(path, caplog):
    save(path)
    whole = path.read_bytes()
    with KVFile.open(path) as file:
        offsets = file.offsets
    header_size = len(KVFileHeader.of(facts()).encode())
    end = offsets[1] + NUM_TOKENS * WIDTHS[1]  # what lies behind is padding
    borders = range(0, len(whole), 4096)
    for size in sorted({*borders, *(b + 1 for b in borders), *(b + 2048 for b in borders), 8, 20}):
        path.write_bytes(whole[:size])
        caplog.clear()
        if size < header_size:
            with pytest.raises(KVFileDamaged, match="cut short"):
                KVFile.open(path)
            continue
        with KVFile.open(path) as file:
            if size < end:
                assert "cut short" in caplog.text
            sound = file.verify(0, NUM_TOKENS)
            held = min(
                max(0, min(size, end) - at) // width
                for at, width in zip(offsets, WIDTHS, strict=True)
            )
            assert sound <= held
            assert sound >= min(NUM_TOKENS, held) - 1000 // 20 - 1  # but for a chunk
            assert read(file, sound) == [
                s[: sound * w] for s, w in zip(joined(streams()), WIDTHS, strict=True)
            ]


def test_a_file_that_is_cut_short_while_it_is_open_is_told(path):
    save(path)
    with KVFile.open(path) as file:
        os.truncate(path, file.offsets[1] + 40)
        with pytest.raises(KVFileDamaged, match="cut short"):
            read(file, NUM_TOKENS)
        assert file.verify(0, NUM_TOKENS) == 0


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"", KVFileDamaged, "cut short"),
        (b"\x89vkv", KVFileDamaged, "cut short"),
        (b"hello", KVFileMismatch, "no file of keys and values"),
        (b"PK\x03\x04" + bytes(500), KVFileMismatch, "no file of keys and values"),
        (bytes(10_000), KVFileMismatch, "no file of keys and values"),
    ],
)
def test_what_is_no_such_file_is_refused(path, content, kind, words):
    path.write_bytes(content)
    with pytest.raises(kind, match=words) as caught:
        KVFile.open(path)
    assert str(path) in str(caught.value)


def test_a_newer_format_is_refused_by_its_number(path):
    save(path)
    with path.open("r+b") as file:
        file.seek(8)
        file.write((7).to_bytes(4, "little"))
    with pytest.raises(KVFileMismatch, match=r"number 7.* reads 1; use the vkv"):
        KVFile.open(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "nonsense"},
        {"dtype": "nn"},
        {"chunk_bytes": 0},
        {"streams": (((0, "key", 2, 6),), ((0, "value", 0, 6),))},
        {"streams": (((0, "key", 2, -6),),)},
        {"streams": ()},
        {"tokens": b""},
        {"tokens": b"123"},
        {"checksums": b""},
        {"tokens": bytes(4 * 301)},
    ],
)
def test_a_header_that_cannot_be_is_refused(path, change):
    """As nobody writes it but on purpose: its checksum is right."""
    with KVFileWriter(path, facts()) as writer:
        header = msgspec.structs.replace(KVFileHeader.of(facts()), **change)
        path.write_bytes(header.encode() + bytes(20_000))
        del writer
    with pytest.raises(KVFileDamaged, match=r"cannot be|contradicts itself|of nothing"):
        KVFile.open(path)


def test_another_model_or_format_is_refused(path):
    save(path)
    other = TokenFormat("bfloat16", FORMAT.streams)
    with KVFile.open(path) as file:
        file.check_fits("m", FORMAT)
        with pytest.raises(KVFileMismatch, match="another model"):
            file.check_fits("n", FORMAT)
        with pytest.raises(KVFileMismatch, match=r"116 bytes a token as float32.* 58 as bfloat16"):
            file.check_fits("m", other)


def test_what_cannot_be_opened_says_why(path):
    with pytest.raises(KVFileInaccessible, match=r"No such file.*save one there first"):
        KVFile.open(path)
    with pytest.raises(KVFileInaccessible, match="no regular file"):
        KVFile.open(path.parent)
    os.mkfifo(path)
    with pytest.raises(KVFileInaccessible, match="no regular file"):
        KVFile.open(path)  # and does not wait for a writer
    with pytest.raises(KVFileInaccessible, match="no regular file"):
        save(path)
    with pytest.raises(KVFileInaccessible, match="no regular file"):
        save("/dev/null")


def test_a_file_that_may_not_be_read_says_so(path, monkeypatch):
    save(path)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "injected")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KVFileInaccessible, match="Permission denied; it is its owner's alone"):
        KVFile.open(path)


# -- writing -------------------------------------------------------------------------------------


def test_a_file_of_another_kind_is_not_replaced(path):
    path.write_text("dear diary")
    with pytest.raises(KVFileMismatch, match="left as it is"):
        save(path)
    assert path.read_text() == "dear diary"


def test_a_link_is_followed(path, tmp_path):
    path.symlink_to(tmp_path / "real.kv")
    save(path)
    assert path.is_symlink()
    with KVFile.open(tmp_path / "real.kv") as file:
        assert file.num_sound == NUM_TOKENS


def test_without_a_commit_nothing_is_left(path):
    save(path, seed=3)
    before = path.read_bytes()
    with KVFileWriter(path, facts(first=5)) as writer:
        writer.write(streams())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace", "ftruncate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_call_that_fails_leaves_the_old_file(path, monkeypatch, name, code):
    save(path)
    before = path.read_bytes()
    calls = 0
    real = getattr(os, name)

    def fail(*args):
        nonlocal calls
        calls += 1
        if calls == 5 or name != "pwrite":
            raise OSError(code, "injected")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(KVFileInaccessible, match=os.strerror(code)) as caught:
            save(path, first=9)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_limit_on_the_size_of_files_leaves_nothing(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(KVFileInaccessible, match="too large; raise the limit"):
            save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(path.parent.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path):
    """A real one: a file system of 32 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(disk)],
        check=False,
        capture_output=True,
    )
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        save(disk / "small", num_tokens=20)
        before = (disk / "small").read_bytes()
        for name in ("large", "small"):
            with pytest.raises(KVFileInaccessible, match=r"No space left.*free some space"):
                save(disk / name)
        assert [entry.name for entry in disk.iterdir()] == ["small"]
        assert (disk / "small").read_bytes() == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written_to_says_so(path, tmp_path, monkeypatch):
    with pytest.raises(KVFileInaccessible, match=r"No such file.*make the folder first"):
        save(tmp_path / "missing" / "file")
    real = os.open

    def refuse(name, flags, *more, **others):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "injected")
        return real(name, flags, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KVFileInaccessible, match=r"Read-only.*choose a folder"):
        save(path)


def test_what_a_dead_writer_left_is_removed_and_a_live_one_is_not(path):
    (path.parent / ".vkv-0123456789abcdef.part").write_bytes(b"left")
    with KVFileWriter(path, facts()) as alive:
        (part,) = path.parent.iterdir()
        save(path.parent / "other")
        assert sorted(path.parent.iterdir()) == sorted([part, path.parent / "other"])
        alive.write(streams())
        alive.commit()
    with KVFile.open(path) as file:
        assert file.verify(0, NUM_TOKENS) == NUM_TOKENS


def test_of_writers_of_one_path_one_wins(path):
    """Whatever the order, one whole file is there."""
    errors = []

    def work(number):
        try:
            for _ in range(10):
                save(path, first=number, seed=number)
        except KVFileError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (100, 200, 300)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            check_whole(path, (100, 200, 300))
    for thread in threads:
        thread.join()
    assert not errors
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.timeout(300)
def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(path):
    kill_writers(path, 20, seed=1)  # tests/attacks/sessions.py does so for longer
