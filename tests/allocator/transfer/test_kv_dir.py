"""A folder of files by content: what is written, found, given up and left out."""

import errno
import gc
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from allocator_model import KIND, Model, Request, make_cache, one_thread
from vkv.allocator import KVCache, KVFile
from vkv.allocator.transfer import KVDir, kv_dir
from vkv.vmem import janitor
from vkv.vmem.errors import InvalidConfig, InvalidOperation

__all__ = ["one_thread"]  # a fixture


@pytest.fixture
def cache() -> Iterator[KVCache]:
    with make_cache(KIND["even"], num_slots=6, rows=4.0) as cache:
        yield cache


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)


def _request(model: Model, tokens: list[int], variant: str = "") -> Request:
    request = model.open(variant)
    assert request is not None
    assert model.grow(request, tokens)
    return request


def _save(folder: KVDir, model: Model, tokens: list[int], variant: str = "") -> bool:
    """Save a request that then closes its slot; True if a file was begun."""
    request = _request(model, tokens, variant)
    begun = folder.save(request.slot, tokens, variant)
    model.close(request)
    for job, *_ in folder._jobs:
        job._done.wait()
    folder.settle()
    model.check()
    return begun


def _open(path: Path, cache: KVCache, *, limit: int = 1 << 30, name: str = "model") -> KVDir:
    return KVDir(path, limit, cache, name)


def test_what_one_process_saves_another_finds(tmp_path: Path, cache: KVCache) -> None:
    tokens = list(range(70))
    folder, model = _open(tmp_path / "a" / "kv", cache), Model(cache)
    assert _save(folder, model, tokens)
    folder.close()
    again = _open(tmp_path / "a" / "kv", cache)
    path, num_tokens = again.find([*tokens, 1, 2])
    assert num_tokens == 70
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert again.num_bytes == path.stat().st_size
    again.close()


def test_what_is_there_for_the_most_part_is_not_written_again(
    tmp_path: Path, cache: KVCache
) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    tokens = list(range(70))
    assert _save(folder, model, tokens)
    assert not _save(folder, model, tokens)
    assert not _save(folder, model, [*tokens, *[5] * 30])  # less than half as much again
    assert _save(folder, model, [*tokens, *[5] * 40])
    assert not _save(folder, model, [7] * 19)  # too few to be worth a file
    assert folder.num_saved == 2
    folder.close()


def test_requests_that_finish_together_write_one_file(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    tokens = list(range(70))
    requests = [_request(model, [*tokens, number]) for number in range(2)]
    assert [folder.save(r.slot, r.tokens) for r in requests] == [True, False]
    folder.close()
    assert folder.num_files == 1


def test_variants_and_models_stay_apart(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    tokens = list(range(70))
    assert _save(folder, model, tokens, "adapter")
    assert folder.find(tokens) == (None, 0)
    assert folder.find(tokens, "adapter")[1] == 70
    folder.close()
    other = _open(tmp_path, cache, name="another model")
    assert other.find(tokens, "adapter") == (None, 0)
    assert other.num_bytes == folder.num_bytes  # it takes its part of the limit
    other.close()


def test_the_limit_is_kept_by_giving_up_what_was_used_least(tmp_path: Path, cache: KVCache) -> None:
    probe, model = _open(tmp_path / "probe", cache), Model(cache)
    assert _save(probe, model, list(range(100)))
    one_file = probe.num_bytes
    probe.close()
    folder = _open(tmp_path / "kv", cache, limit=2 * one_file + one_file // 2)
    for first in (0, 1000, 2000):
        assert _save(folder, model, list(range(first, first + 100)))
        path, _ = folder.find(list(range(100)))
        if path is not None:
            folder.use(path)  # so it is the second that goes
        assert folder.num_bytes <= folder.limit_bytes
    assert folder.find(list(range(100)))[1] == 100
    assert folder.find(list(range(1000, 1100)))[1] == 0
    assert folder.find(list(range(2000, 2100)))[1] == 100
    assert len(list((tmp_path / "kv").iterdir())) == 2
    folder.close()


def test_nothing_stays_of_files_that_went(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    for first in (1, 2, 2):
        assert _save(folder, model, [first] * 16 + [len(folder._entries)] * 30)
    assert [len(some) for some in folder._buckets.values()] == [1, 2]
    for path in list(folder._entries):
        folder.discard(path)
    assert not folder._buckets
    folder.close()


def test_what_exceeds_the_limit_alone_is_not_written(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache, limit=1000), Model(cache)
    assert not _save(folder, model, list(range(100)))
    folder.close()
    assert not list(tmp_path.iterdir())


def test_memory_that_is_short_is_given_back_at_once(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    request = _request(model, list(range(100)))

    class Slow:
        def wait(self) -> None:
            while not folder._jobs[0][0]._is_cancelled:
                pass

    cache.pool.driver.record_fence = Slow  # type: ignore[method-assign]
    assert folder.save(request.slot, request.tokens)
    assert request.slot.num_pins == 1
    assert folder.give_way()
    del cache.pool.driver.record_fence  # type: ignore[method-assign]
    assert request.slot.num_pins == 0
    assert not folder.give_way()
    folder.close()
    assert (folder.num_saved, folder.num_failed) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_left_alone_for_a_while(
    tmp_path: Path,
    cache: KVCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)

    def full(*args: object) -> int:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert _save(folder, model, list(range(100)))
    assert folder.num_failed == 1
    assert "free some space" in caplog.text
    assert not list(tmp_path.iterdir())
    assert not _save(folder, model, list(range(100)))
    folder._rests_until_s = 0.0
    assert _save(folder, model, list(range(100)))
    folder.close()
    assert folder.num_saved == 1


def test_damaged_files_go_and_foreign_ones_stay(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    for first in (0, 1000, 2000):
        assert _save(folder, model, list(range(first, first + 100)))
    folder.close()
    cut, flipped, whole = sorted(tmp_path.iterdir())
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 5000)
    content = bytearray(flipped.read_bytes())
    content[30] ^= 1
    flipped.write_bytes(content)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.vkv").write_text("no file of keys and values")
    again = _open(tmp_path, cache)
    assert again.num_files == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert {whole.name, "notes.txt", "other.vkv"} <= left
    assert cut.name not in left
    again.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, cache: KVCache) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="cannot be used"):
        _open(tmp_path / "file" / "kv", cache)


def test_a_closed_folder_holds_no_slot(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    request = _request(model, list(range(100)))
    assert folder.save(request.slot, request.tokens)
    folder.close()
    assert request.slot.num_pins == 0
    assert folder.num_saved == 1
    with pytest.raises(InvalidOperation, match="stopped"):
        folder.save(request.slot, [*request.tokens[:50]] + [9] * 50)


def test_an_error_that_nobody_foresaw_ends_one_file_alone(
    tmp_path: Path, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the thread: what is to be written next would stay pinned for good."""
    folder, model = _open(tmp_path, cache), Model(cache)

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(kv_dir.KVFileWriter, "write", fails)
        assert _save(folder, model, list(range(100)))
    assert (folder.num_saved, folder.num_failed) == (0, 1)
    assert not list(tmp_path.iterdir())
    folder._rests_until_s = 0.0
    assert _save(folder, model, list(range(100)))
    folder.close()
    assert folder.num_saved == 1


def test_what_is_dropped_is_written_before_it_is_unmapped(tmp_path: Path) -> None:
    cache, go_on = make_cache(KIND["even"], num_slots=6, rows=4.0), threading.Event()
    folder, model = _open(tmp_path, cache), Model(cache)
    request = _request(model, list(range(100)))
    cache.pool.driver.record_fence = lambda: SimpleNamespace(wait=go_on.wait)  # type: ignore[method-assign]
    assert folder.save(request.slot, request.tokens)
    ((job, *_),) = folder._jobs
    left = weakref.ref(cache)
    del cache, folder, model, request, _
    gc.collect()
    assert left() is not None
    go_on.set()
    job._done.wait()
    gc.collect()
    assert left() is None
    assert job.error is None
    with KVFile.open(job.path) as file:
        assert file.verify(0, 100) == 100
    assert janitor.drain()


def test_a_file_that_is_done_between_two_looks_is_not_lost(tmp_path: Path, cache: KVCache) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    first, second = (_request(model, list(range(at, at + 60))) for at in (0, 1000))
    assert folder.save(first.slot, first.tokens)
    folder._jobs[0][0]._done.wait()
    go_on = threading.Event()
    cache.pool.driver.record_fence = lambda: SimpleNamespace(wait=go_on.wait)  # type: ignore[method-assign]
    assert folder.save(second.slot, second.tokens)
    del cache.pool.driver.record_fence  # type: ignore[method-assign]
    folder._jobs.reverse()
    (late, *_), (_, outgoing, *_) = folder._jobs
    commit = outgoing.commit

    def commit_later() -> None:
        go_on.set()
        late._done.wait()
        commit()

    outgoing.commit = commit_later  # type: ignore[method-assign]
    for _ in range(2):
        folder.settle()
    assert (first.slot.num_pins, second.slot.num_pins) == (0, 0)
    assert folder.num_saved == folder.num_files == 2
    assert not folder.is_saving
    folder.close()


def test_a_file_that_is_gone_by_now_does_not_keep_the_folder_from_opening(
    tmp_path: Path, cache: KVCache
) -> None:
    """Another process gives files up while this one looks at all of them."""
    (tmp_path / "gone.vkv").symlink_to(tmp_path / "nowhere")
    folder, model = _open(tmp_path, cache), Model(cache)
    assert _save(folder, model, list(range(70)))
    assert folder.num_files == 1
    folder.close()


def _may_not(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_what_may_not_be_removed_stays_and_counts(
    tmp_path: Path, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    assert _save(folder, model, list(range(70)))
    one_file = folder.num_bytes
    folder.limit_bytes = one_file + one_file // 2
    monkeypatch.setattr(Path, "unlink", _may_not)
    assert not _save(folder, model, list(range(1000, 1070)))
    assert folder._rests_until_s > 0  # or each request would try again
    path, num_tokens = folder.find(list(range(70)))
    assert num_tokens == 70
    assert path is not None
    folder.discard(path)
    assert folder.find(list(range(70))) == (None, 0)
    assert folder.num_bytes == one_file
    folder.close()
    with path.open("r+b") as file:
        file.truncate(one_file - 5000)
    again = _open(tmp_path, cache)
    assert (again.num_files, again.num_bytes) == (0, one_file)
    again.close()


def test_a_whole_file_outlives_a_moment_without_descriptors(
    tmp_path: Path, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = _open(tmp_path, cache), Model(cache)
    tokens = list(range(70))
    assert _save(folder, model, tokens)
    path, _ = folder.find(tokens)
    assert path is not None
    one_file = folder.num_bytes

    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_more)
        assert folder.open(path) is None
    assert path.exists()
    assert folder.find(tokens) == (None, 0)
    assert folder.num_bytes == one_file
    assert _save(folder, model, tokens)
    assert folder.find(tokens) == (path, 70)
    assert folder.num_bytes == one_file
    path.unlink()
    assert folder.open(path) is None
    assert (folder.find(tokens), folder.num_bytes) == ((None, 0), 0)
    folder.close()


def test_another_models_file_in_a_files_place_is_not_ours(tmp_path: Path, cache: KVCache) -> None:
    tokens = list(range(70))
    other, model = _open(tmp_path / "other", cache, name="another model"), Model(cache)
    assert _save(other, model, tokens)
    other.close()
    folder = _open(tmp_path / "kv", cache)
    assert _save(folder, model, tokens)
    path, _ = folder.find(tokens)
    assert path is not None
    (theirs,) = (tmp_path / "other").iterdir()
    theirs.replace(path)
    assert folder.open(path) is None
    assert folder.find(tokens) == (None, 0)
    assert path.exists()
    folder.close()
