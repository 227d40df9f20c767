"""The ledger of the shard cache: who lives, what the dead leave behind, and where a cache cannot be."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from caches import files_in, join_cache, start_other, use

from mmfuse.data.remote import cache_ledger
from mmfuse.data.remote.cache import ShardCache
from mmfuse.data.remote.cache_ledger import Ledger, file_system_of
from mmfuse.errors import ConfigError, DataError


def test_a_run_has_one_living_prefetcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = start_other(tmp_path, lambda _: None)
    threading.Timer(0.2, other.kill).start()
    join_cache(tmp_path, owner="other").close()  # the killed one of an earlier start may need a moment
    cache = join_cache(tmp_path, owner="other")
    monkeypatch.setattr(cache_ledger, "_RESTART_SECONDS", 0.2)
    with pytest.raises(DataError, match="another prefetcher of this run is alive"):
        join_cache(tmp_path, owner="other")
    cache.close()


def begin(cache: ShardCache) -> None:
    cache.reserve("a", 10)


def write_half(cache: ShardCache) -> None:
    begin(cache)
    cache.temporary("a").write_bytes(b"half")


def move(cache: ShardCache) -> None:
    begin(cache)
    cache.temporary("a").write_bytes(bytes(10))
    cache.temporary("a").rename(cache.folder / "a")


@pytest.mark.parametrize(("deed", "left"), [(begin, set()), (write_half, set()), (move, {"a"})])
def test_what_a_killed_owner_was_downloading_is_known(
    tmp_path: Path, deed: Callable[[ShardCache], None], left: set[str]
) -> None:
    (tmp_path / "a.stranger.part").write_text("not ours")
    other = start_other(tmp_path, deed)
    cache = join_cache(tmp_path)
    cache.begin(-1, [use("a", 0)], working_set={})
    cache.keep_alive()
    assert not cache.reserve("a", 10) and cache.missing(9) == [], "the other one is at it"
    other.kill()
    other.join()
    cache.keep_alive()
    assert files_in(tmp_path) == left | {"a.stranger.part"} and os.listdir(tmp_path / "owners") == ["me.lock"]
    assert cache.reserve("a", 10) == (not left)
    cache.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache\.folder = .*/file/cache: cannot be written: Not a directory"):
        join_cache(tmp_path / "file" / "cache")


def test_a_budget_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache\.budget_gib = 1\.049e\+06, but the disk of .* GiB free"):
        join_cache(tmp_path, budget=1 << 50)


def test_a_damaged_ledger_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"garbage" * 1000)
    told = r"ledger\.sqlite: file is not a database.*delete the folder: it holds copies only"
    with pytest.raises(DataError, match=told):
        join_cache(tmp_path)


def test_the_file_system_of_a_path_is_that_of_the_innermost_mount() -> None:
    mounts = (
        "22 1 0:21 / / rw shared:1 - ext4 /dev/sda rw\n"
        "23 22 0:22 / /home rw - nfs4 server:/home rw\n"
        "24 23 0:23 / /home/a\\040b rw shared:2 master:3 - tmpfs tmpfs rw\n"
    )
    kinds = {"/x": "ext4", "/home/x": "nfs4", "/home/a b": "tmpfs", "/home/a b/c": "tmpfs", "/homes": "ext4"}
    assert {path: file_system_of(Path(path), mounts) for path in kinds} == kinds


def test_an_interrupted_change_did_not_happen(tmp_path: Path) -> None:
    cache = join_cache(tmp_path)
    with pytest.raises(KeyboardInterrupt), cache._ledger.transaction() as changes:
        changes.execute("INSERT INTO files VALUES ('a', 30, NULL, 0)")
        raise KeyboardInterrupt
    assert cache.reserve("b", 30)
    cache.close()
    Ledger(tmp_path).close()
