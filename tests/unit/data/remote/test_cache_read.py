"""What workers see of the shard cache: whole files, or the reason why they never come."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from caches import join_cache, start_other, use

from mmfuse.data.remote.cache import ShardCache
from mmfuse.data.remote.cache_ledger import lock_of
from mmfuse.data.remote.cache_read import is_evicted, open_cached, wait_for_shard
from mmfuse.errors import DataError


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    cache = join_cache(tmp_path)
    yield cache
    cache.close()


def test_a_worker_waits_until_the_file_is_whole(cache: ShardCache) -> None:
    cache.begin(-1, [use("a", 0)], working_set={})
    cache.reserve("a", 10)
    cache.temporary("a").write_text("0123456789")
    threading.Timer(0.4, os.rename, (cache.temporary("a"), cache.folder / "a")).start()
    descriptor = open_cached(cache.folder, "a", owner="me")
    assert os.pread(descriptor, 99, 0) == b"0123456789" and not is_evicted(descriptor)
    (cache.folder / "a").unlink()
    assert is_evicted(descriptor)
    os.close(descriptor)


def test_a_worker_is_told_why_there_is_no_use_in_waiting(tmp_path: Path) -> None:
    cache = join_cache(tmp_path)
    cache.begin(-1, [use(name, 0) for name in "abc"], working_set={})
    cache.fail("a", "https://host/a.tar: the server answers 404")

    def told(name: str, quiet_seconds: float = 60.0) -> str:
        with pytest.raises(DataError) as error:
            wait_for_shard(tmp_path, name, owner="me", quiet_seconds=quiet_seconds)
        return str(error.value)

    assert told("a") == "https://host/a.tar: the server answers 404"
    os.utime(lock_of(tmp_path, "me"), (0, time.time() - 100))
    assert "the prefetcher me that should bring it has been stuck for 10" in told("b")
    cache.keep_alive()
    assert time.time() - lock_of(tmp_path, "me").stat().st_mtime < 60
    os.utime(lock_of(tmp_path, "me"), (0, time.time() + 60))
    assert "was not told that this step reads it" in told("x", quiet_seconds=0.3)
    cache.fail("", "the disk is gone")
    assert told("b") == "the disk is gone"
    cache.close()
    assert "has ended or was killed" in told("b")


def test_a_worker_without_a_cache_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/a: is not in the cache, whose ledger cannot be read: unable to open"):
        open_cached(tmp_path, "a", owner="me")


def test_a_worker_is_told_of_another_run_that_is_stuck_with_its_file(tmp_path: Path) -> None:
    other = start_other(tmp_path, lambda cache: cache.reserve("a", 10))
    cache = join_cache(tmp_path)
    cache.begin(-1, [use("a", 0)], working_set={})
    os.kill(other.pid or 0, signal.SIGSTOP)
    os.utime(lock_of(tmp_path, "other"), (0, time.time() - 100))
    with pytest.raises(DataError, match="the prefetcher other that should bring it has been stuck"):
        open_cached(tmp_path, "a", owner="me")
    other.kill()
    cache.close()
