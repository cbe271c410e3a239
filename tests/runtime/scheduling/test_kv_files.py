"""Which file a request begins with, and what is left where that goes wrong."""

import errno
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from allocator_model import KIND, FlakyHostDriver, Model, make_cache, one_thread
from vkv.allocator import Exits, KVFacts, KVFile, KVFileWriter
from vkv.allocator.transfer import KVDir, kv_dir
from vkv.runtime.scheduling.kv_files import KVFiles
from vkv.vmem.errors import DriverError, InvalidConfig, OutOfSlots, Shortage

__all__ = ["one_thread"]  # a fixture

ROOMY = {"rows": 12, "num_slots": 8, "max_parked": 4}


def tokens(count: int) -> list[int]:
    return [index % 3 for index in range(count)]


def save(model: Model, path: Path, count: int, variant: str = "") -> None:
    """What a request of so many tokens has."""
    request = model.open(variant)
    assert request is not None
    assert model.grow(request, tokens(count))
    geometry = model.cache.geometry
    facts = KVFacts(
        model="m",
        token_format=geometry.token_format,
        tokens=request.tokens,
        variant=variant,
        chunk_bytes=512,
    )
    with KVFileWriter(path, facts) as writer:
        writer.write(model.cache.spans(request.slot, 0, count))
        writer.commit()
    model.close(request)
    model.cache.trim()


class CacheExits(Exits):
    """Of a cache that is made later."""

    def __init__(self) -> None:
        self._stuck = deque()


def make_model(files: KVFiles, kind: str, driver: FlakyHostDriver, **options: float) -> Model:
    model = Model(make_cache(KIND[kind], driver, **options))
    files._exits._cache = model.cache
    return model


@pytest.fixture
def files() -> Iterator[KVFiles]:
    before = len(os.listdir("/proc/self/fd"))
    files = KVFiles(CacheExits())
    yield files
    files.forget()
    assert len(files) == 0
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def driver() -> Iterator[FlakyHostDriver]:
    with FlakyHostDriver() as driver:
        yield driver


def test_the_longest_of_the_variant_is_found(
    driver: FlakyHostDriver, files: KVFiles, tmp_path: Path
) -> None:
    model = make_model(files, "ragged", driver, **ROOMY)
    assert files.longest_prefix(tokens(50)) == 0
    assert not files
    for name, count, variant in (("a", 40, ""), ("b", 120, "adapter"), ("c", 90, "")):
        save(model, tmp_path / name, count, variant)
        files.add(KVFile.open(tmp_path / name))
    assert len(files) == 3
    assert files.longest_prefix(tokens(150)) == 90
    assert files.longest_prefix([*tokens(60), 7, *tokens(60)]) == 60
    assert files.longest_prefix(tokens(150), "adapter") == 120
    assert files.longest_prefix(tokens(150), "other") == files.longest_prefix([7]) == 0
    assert files.open_slot(model.cache, tokens(150), least=91) is None
    for variant, count in (("", 90), ("adapter", 120)):
        found = files.open_slot(model.cache, tokens(150), variant, least=count)
        assert found is not None
        slot, num_tokens = found
        assert num_tokens == count
        model._admit(slot, tokens(count), variant)
        model.check()
    model.cache.shutdown()


def test_a_path_that_is_opened_again_is_the_new_file(
    driver: FlakyHostDriver, files: KVFiles, tmp_path: Path
) -> None:
    model = make_model(files, "even", driver, **ROOMY)
    for count in (40, 70):
        save(model, tmp_path / "a", count)
        files.add(KVFile.open(tmp_path / "a"))
        assert files.longest_prefix(tokens(150)) == count
    assert len(files) == 1
    model.cache.shutdown()


@pytest.mark.parametrize("kind", ["split", "windows", "tiles", "wide"])
def test_every_call_failed_in_turn(files: KVFiles, tmp_path: Path, kind: str) -> None:
    """The slot is there whole, or none is; a call that fails is made up for by reading."""
    for short in (False, True):
        for call in range(1000):
            with FlakyHostDriver() as driver:
                model = make_model(files, kind, driver, **ROOMY)
                save(model, tmp_path / "a", 130)
                files.add(KVFile.open(tmp_path / "a"))
                driver.fail_after, driver.fail_short = call, short
                found = None
                try:
                    found = files.open_slot(model.cache, tokens(140))
                except (DriverError, Shortage):
                    assert model.cache.stats().slots_open == 0
                    assert model.cache.pool.num_of_files == model.cache.pool.num_held == 0
                    model.cache.check_invariants()
                finished = driver.fail_after is not None
                driver.fail_after = None
                slot, num_tokens = found or files.open_slot(model.cache, tokens(140)) or (None, 0)
                assert slot is not None
                model._admit(slot, tokens(num_tokens))
                model.check()
                model.cache.shutdown()
                assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
            if finished:
                break
        assert call > 3


def test_without_a_slot_nothing_is_done(
    driver: FlakyHostDriver, files: KVFiles, tmp_path: Path
) -> None:
    model = make_model(files, "even", driver, num_slots=1, max_parked=0)
    save(model, tmp_path / "a", 100)
    files.add(KVFile.open(tmp_path / "a"))
    model.open()
    with pytest.raises(OutOfSlots):
        files.open_slot(model.cache, tokens(120))
    model.check()
    model.cache.shutdown()


def test_what_is_damaged_is_found_once_and_not_offered_again(
    driver: FlakyHostDriver, files: KVFiles, tmp_path: Path
) -> None:
    model = make_model(files, "even", driver, **ROOMY)
    save(model, tmp_path / "a", 100)
    content = bytearray((tmp_path / "a").read_bytes())
    with KVFile.open(tmp_path / "a") as file:
        place = file.offsets[0]
    content[place + 60 * 256] ^= 1
    (tmp_path / "a").write_bytes(content)
    files.add(KVFile.open(tmp_path / "a"))
    assert files.longest_prefix(tokens(100)) == 100
    assert files.open_slot(model.cache, tokens(100), least=80) is None
    assert files.longest_prefix(tokens(100)) == 60
    found = files.open_slot(model.cache, tokens(100), least=60)
    assert found is not None
    model._admit(found[0], tokens(60))
    model.check()
    model.cache.shutdown()


def test_a_slot_that_can_neither_be_filled_nor_closed_is_closed_later(
    driver: FlakyHostDriver, files: KVFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(files, "even", driver, **ROOMY)
    save(model, tmp_path / "a", 100)
    files.add(KVFile.open(tmp_path / "a"))

    def refuse(*_: object) -> None:
        raise DriverError("injected")

    with monkeypatch.context() as patch:
        for name in ("attach", "grow", "close"):
            patch.setattr(model.cache, name, refuse)
        with pytest.raises(DriverError):
            files.open_slot(model.cache, tokens(100))
    assert model.cache.stats().slots_open == 1
    files._exits.retry()
    assert model.cache.stats().slots_open == 0
    model.cache.shutdown()


def test_what_the_folder_gives_up_takes_no_room_on_the_disk(
    driver: FlakyHostDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)
    model = Model(make_cache(KIND["even"], driver, **ROOMY))
    folder = KVDir(tmp_path / "kv", 1 << 30, model.cache, "m")
    files = KVFiles(Exits(model.cache), folder)
    save(model, tmp_path / "session", 90)
    files.add(KVFile.open(tmp_path / "session"))
    for first in (7, 8):
        request = model.open()
        assert request is not None
        assert model.grow(request, [first] * 60)
        files.save(request.slot, request.tokens)
        folder._jobs[0][0]._done.wait()
        files.settle()
        model.close(request)
        found = files.open_slot(model.cache, request.tokens)
        assert found is not None
        model.cache.close(found[0])
        assert len(files) == 2  # with the session
        folder.limit_bytes = folder.num_bytes + 1000  # there is no room for a second
    opened = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not [path for path in opened if str(tmp_path) in path and "deleted" in path]
    assert files.longest_prefix(tokens(90)) == 90
    files.forget()
    model.cache.shutdown()


def test_where_pages_are_larger_than_a_files_steps_it_is_read(
    driver: FlakyHostDriver, files: KVFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on ARM with pages of 64 KiB: streams begin at multiples of 4 KiB."""
    model = make_model(files, "even", driver, **ROOMY)
    save(model, tmp_path / "a", 100)
    files.add(KVFile.open(tmp_path / "a"))

    def refuse(fd: int, offset: int, num_pages: int) -> None:
        raise InvalidConfig(f"offset {offset} of a file is not a multiple of 65536")

    monkeypatch.setattr(driver, "_attach_file", refuse)
    found = files.open_slot(model.cache, tokens(120))
    assert found is not None
    slot, num_tokens = found
    assert num_tokens == 100
    model._admit(slot, tokens(100))
    model.check()
    model.cache.shutdown()


def test_a_file_of_the_folder_outlives_a_moment_without_descriptors(
    driver: FlakyHostDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)
    model = Model(make_cache(KIND["even"], driver, **ROOMY))
    folder = KVDir(tmp_path, 1 << 30, model.cache, "m")
    files = KVFiles(Exits(model.cache), folder)
    request = model.open()
    assert request is not None
    assert model.grow(request, [7] * 60)
    files.save(request.slot, request.tokens)
    folder._jobs[0][0]._done.wait()
    files.settle()

    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_more)
        assert files.longest_prefix(request.tokens) == 0
    assert len(list(tmp_path.iterdir())) == 1
    files.forget()
    model.close(request)
    model.cache.shutdown()
