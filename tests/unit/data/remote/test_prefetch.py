"""The prefetcher of a node: a real process, a real server, real kills."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from buckets import SHARD_BYTES, Bucket, content_of, serve_bucket
from caches import bytes_in, files_in
from helpers import REPOSITORY

from mmfuse.data.plan import ShardUse
from mmfuse.data.remote.cache import cache_name
from mmfuse.data.remote.cache_read import open_cached
from mmfuse.data.remote.fetch import FetchConfig
from mmfuse.data.remote.prefetch import CacheConfig, Prefetcher, Progress
from mmfuse.data.remote.prefetch_ahead import CachedShard, Copies
from mmfuse.errors import ConfigError, DataError

PATHS = ("/a/00000.tar", "/b/00000.tar", "/a/00001.tar", "/b/00001.tar", "/c/00000.tar", "/c/00001.tar")
RANK = """
import os, sys
from pathlib import Path
from buckets import content_of
from mmfuse.data.remote.cache_read import open_cached
from mmfuse.data.remote.prefetch_progress import Progress, owner_of
folder, place, slot = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
progress = Progress(place)
for step, read in enumerate(sys.argv[4:]):
    for item in read.split():
        name, path = item.split(":")
        descriptor = open_cached(folder, name, owner=owner_of(place))
        assert os.pread(descriptor, 1 << 20, 0) == content_of(path)
        assert os.fstat(descriptor).st_nlink == 1, "evicted while it is read"
        os.close(descriptor)
    progress.report(slot, step)
"""
PARENT = """
import functools, os, sys, time
from pathlib import Path
from mmfuse.data.plan import ShardUse
from mmfuse.data.remote.prefetch import CacheConfig, Prefetcher
from mmfuse.data.remote.prefetch_ahead import CachedShard
folder = Path(sys.argv[1])
config = CacheConfig(folder=folder / "cache", budget_gib=0.01)
shards = {(0, 0): (CachedShard(sys.argv[2], int(sys.argv[3]), ""),)}
uses = functools.partial(iter, [ShardUse(0, 0, 0, 0)])
with Prefetcher(config, shards, uses, progress=folder / "progress", num_ranks=1) as prefetcher:
    worker = os.fork()  # as a loader's: it inherits the parent's end of every pipe
    if worker:
        print(prefetcher.pid, worker, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with serve_bucket() as bucket:
        yield bucket


def version(path: str) -> str:
    return f'"{path}"'


def shards_at(bucket: Bucket, paths: Sequence[str] = PATHS) -> Copies:
    return {(0, n): (CachedShard(bucket.address + path, SHARD_BYTES, version(path)),) for n, path in enumerate(paths)}


def one_a_step(*shards: int, first_step: int = 0) -> list[ShardUse]:
    return [ShardUse(step, step, 0, shard) for step, shard in enumerate(shards, start=first_step)]


def make(
    folder: Path,
    shards: Copies,
    uses: list[ShardUse],
    *,
    room: int = 3,
    run: str = "run",
    num_ranks: int = 1,
    deadline_seconds: float = 30.0,
) -> Prefetcher:
    """A prefetcher with room for so many shards in `folder / "cache"`."""
    config = CacheConfig(
        folder=folder / "cache",
        budget_gib=room * SHARD_BYTES / 2**30,
        parallel_downloads=2,
        fetch=FetchConfig(deadline_seconds=deadline_seconds),
    )
    return Prefetcher(
        config, shards, functools.partial(iter, uses), progress=folder / run / "progress", num_ranks=num_ranks
    )


def read(prefetcher: Prefetcher, tars: tuple[CachedShard, ...]) -> bytes:
    """What a worker reads of a shard of one tar, when it is there."""
    (shard,) = tars
    name = cache_name(shard.url, shard.version)
    with open(open_cached(prefetcher.config.place, name, owner=prefetcher.owner), "rb") as file:
        return file.read()


def start_rank(prefetcher: Prefetcher, slot: int, steps: list[list[str]], bucket: Bucket) -> subprocess.Popen[bytes]:
    """A process that reads shards, step by step, each by its path, checks their bytes and reports its steps."""
    names = [[f"{cache_name(bucket.address + path, version(path))}:{path}" for path in paths] for paths in steps]
    command = [
        sys.executable,
        "-c",
        RANK,
        prefetcher.config.place,
        prefetcher.progress,
        str(slot),
        *map(" ".join, names),
    ]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")})


def wait_until(happened: Callable[[], object], *, seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def has_ended(pid: int) -> bool:
    """Also as a zombie that nobody has buried yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_two_ranks_read_the_right_bytes_of_one_cache_that_never_exceeds_its_budget(
    tmp_path: Path, bucket: Bucket
) -> None:
    order = [0, 1, 2, 3, 4, 5, 0, 2, 4, 1, 3, 5] * 2
    uses = [ShardUse(step, step + 1, 0, shard) for step, shard in enumerate(order)]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "00000.tar").write_bytes(b"a stranger's")
    most = 0
    with make(tmp_path, shards_at(bucket), uses, room=4, num_ranks=2) as prefetcher:
        maps = Path(f"/proc/{prefetcher.pid}/maps").read_text()
        assert "sqlite" in maps and "libtorch" not in maps
        even = [[PATHS[shard]] for shard in order]
        odd = [[PATHS[shard] for shard in order[max(0, step - 1) : step + 1]] for step in range(len(order))]
        ranks = [start_rank(prefetcher, slot, steps, bucket) for slot, steps in enumerate((even, odd))]
        while any(rank.poll() is None for rank in ranks):
            most = max(most, bytes_in(tmp_path / "cache"))
            time.sleep(0.002)
        assert [rank.returncode for rank in ranks] == [0, 0]
    assert 3 * SHARD_BYTES < most <= 4 * SHARD_BYTES + len("a stranger's")
    assert (tmp_path / "cache" / "00000.tar").read_bytes() == b"a stranger's"
    assert not [name for name in files_in(tmp_path / "cache") if name.endswith(".part")]


def test_a_cache_smaller_than_what_is_read_at_one_time_is_refused_with_the_formula(
    tmp_path: Path, bucket: Bucket
) -> None:
    uses = [*one_a_step(0, 1), *(ShardUse(5, 9, 0, shard) for shard in range(4))]
    formula = (
        r"data\.cache\.budget_gib = 0\.0002794 is too small: at step 5 this node reads 4 shards at a time "
        r"\(its lanes x data\.window_shards; .*\), and 4 x 9\.313e-05 GiB = 0\.0003725 GiB are needed; raise data"
    )
    with pytest.raises(ConfigError, match=formula):
        make(tmp_path, shards_at(bucket), uses, room=3).start()
    assert not files_in(tmp_path / "cache") and not os.listdir(tmp_path / "cache" / "owners")


def test_a_working_set_that_outgrows_the_budget_later_stops_the_run(tmp_path: Path, bucket: Bucket) -> None:
    # Beyond what is read ahead at the start.
    uses = [*one_a_step(*(step % 4 for step in range(1200))), *(ShardUse(1300, 1400, 0, shard) for shard in range(4))]
    shards = shards_at(bucket, PATHS[:4])
    with make(tmp_path, shards, uses, room=3, deadline_seconds=600.0) as prefetcher:
        Progress(prefetcher.progress).report(0, 1299)
        with pytest.raises(DataError, match=r"this step reads 4 shards, .* but data\.cache\.budget_gib"):
            for shard in shards.values():
                read(prefetcher, shard)


def test_two_runs_share_a_cache_and_never_lose_what_they_read(tmp_path: Path, bucket: Bucket) -> None:
    orders = {"one": [0, 1, 2, 3, 4, 5] * 3, "two": [5, 3, 1, 0, 2, 4] * 3}
    most, before = 0, bucket.downloads.total()
    with contextlib.ExitStack() as stack:
        ranks = []
        for run, order in orders.items():
            prefetcher = make(tmp_path, shards_at(bucket), one_a_step(*order), room=4, run=run)
            stack.enter_context(prefetcher)
            ranks.append(start_rank(prefetcher, 0, [[PATHS[shard]] for shard in order], bucket))
        while any(rank.poll() is None for rank in ranks):
            most = max(most, bytes_in(tmp_path / "cache"))
            time.sleep(0.002)
        assert [rank.returncode for rank in ranks] == [0, 0]
    assert most <= 4 * SHARD_BYTES
    assert bucket.downloads.total() - before < 36, "what one run has brought serves the other"


def test_a_kill_in_mid_download_costs_only_what_was_missing(tmp_path: Path, bucket: Bucket) -> None:
    paths = ["/quick/0.tar", "/quick/1.tar", "/slow/2.tar", "/slow/3.tar"]
    shards, folder = shards_at(bucket, paths), tmp_path / "cache"
    (tmp_path / "cache").mkdir()
    (folder / "2.tar.part").write_bytes(b"a stranger's")
    prefetcher = make(tmp_path, shards, one_a_step(0, 1, 2, 3), room=4).start()
    wait_until(lambda: bytes_in(folder) > 2.2 * SHARD_BYTES)
    os.kill(prefetcher.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DataError, match="the prefetcher of this run has ended or was killed"):
        read(prefetcher, shards[0, 2])
    with pytest.raises(DataError, match=r"has ended with exit code -9 \(killed: out of memory\?\)"):
        prefetcher.check()
    assert time.monotonic() - started < 60
    left = files_in(folder)
    assert len([name for name in left if name.endswith(".part")]) == 3
    with make(tmp_path, shards, one_a_step(0, 1, 2, 3), room=4) as again:
        assert [read(again, shard) for shard in shards.values()] == [content_of(path) for path in paths]
    assert files_in(folder) == {cache_name(shard.url, shard.version) for (shard,) in shards.values()} | {"2.tar.part"}
    assert [bucket.downloads[path] for path in paths] == [1, 1, 2, 2]
    assert (folder / "2.tar.part").read_bytes() == b"a stranger's"
    prefetcher.close()


def test_closing_takes_seconds_and_leaves_no_half_files(tmp_path: Path, bucket: Bucket) -> None:
    prefetcher = make(tmp_path, shards_at(bucket, ["/slow/4.tar", "/slow/5.tar"]), one_a_step(0, 1)).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(prefetcher.pid, number)  # as a scheduler does to all processes of a job
    wait_until(lambda: bytes_in(tmp_path / "cache") > 0)
    prefetcher.check()
    started, pid = time.monotonic(), prefetcher.pid
    prefetcher.close()
    prefetcher.close()
    assert has_ended(pid) and time.monotonic() - started < 20
    assert not files_in(tmp_path / "cache") and not os.listdir(tmp_path / "cache" / "owners")


def test_the_prefetcher_ends_with_a_parent_that_is_killed(tmp_path: Path, bucket: Bucket) -> None:
    url = f"{bucket.address}/slow/6.tar"
    command = [sys.executable, "-c", PARENT, tmp_path, url, str(SHARD_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid, worker = map(int, parent.stdout.readline().split())
        wait_until(lambda: bytes_in(tmp_path / "cache") > 0)
        assert not has_ended(pid)
        parent.kill()
    wait_until(lambda: has_ended(pid), seconds=10.0)
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    ("address", "path", "told"),
    [
        (None, "/missing/0.tar?X-Signature=s3cr3t", r"/missing/0\.tar: the server answers 404"),
        ("http://127.0.0.1:9", "/x/0.tar?X-Signature=s3cr3t", r"http://127\.0\.0\.1:9/x/0\.tar: cannot connect"),
    ],
    ids=["missing", "unreachable"],
)
def test_a_worker_is_told_why_its_shard_does_not_come(
    tmp_path: Path, bucket: Bucket, address: str | None, path: str, told: str
) -> None:
    shard = CachedShard((address or bucket.address) + path, SHARD_BYTES, "v")
    started = time.monotonic()
    with make(tmp_path, {(0, 0): (shard,)}, one_a_step(0), deadline_seconds=2.0) as prefetcher:
        with pytest.raises(DataError, match=told) as error:
            read(prefetcher, (shard,))
        prefetcher.check()
    assert "s3cr3t" not in str(error.value) and time.monotonic() - started < 60


def fewest_downloads(order: Sequence[int], room: int) -> int:
    """Of a cache that downloads when it must, and evicts what is used last; that is known to be the optimum."""
    held: set[int] = set()
    downloads = 0
    for step, shard in enumerate(order):
        if shard in held:
            continue
        downloads += 1
        if len(held) == room:
            later = [*order[step:], *held]
            held.remove(max(held - {order[step - 1]}, key=later.index))
        held.add(shard)
    return downloads


@pytest.mark.slow
def test_epochs_in_one_order_keep_what_fits_instead_of_downloading_all_again(tmp_path: Path, bucket: Bucket) -> None:
    paths = [f"/epochs/{number}.tar" for number in range(20)]
    shards, order = shards_at(bucket, paths), [*range(20)] * 5
    with make(tmp_path, shards, one_a_step(*order), room=12) as prefetcher:
        progress = Progress(prefetcher.progress)
        for step, shard in enumerate(order):
            assert read(prefetcher, shards[0, shard]) == content_of(paths[shard])
            time.sleep(0.1)
            progress.report(0, step)
    downloads = sum(bucket.downloads[path] for path in paths)
    assert fewest_downloads(order, 12) <= downloads <= fewest_downloads(order, 12 - 2 * 2), "2 downloads, twice"
