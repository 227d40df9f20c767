"""What the prefetcher process does: follows the plan, downloads what comes next, lets go of what is over.

It keeps nothing that a kill could spoil, so it ends by just ending: what it leaves behind is taken away by its parent
or by the next owner of the cache. One thread works on the ledger; the others only download.
"""

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from pydantic import PositiveFloat, PositiveInt

from mmfuse.config import Settings
from mmfuse.data.plan import ShardUse
from mmfuse.data.remote.cache import FileUse, ShardCache, gib
from mmfuse.data.remote.cache_ledger import index_of
from mmfuse.data.remote.fetch import FetchConfig, RemoteFile, download
from mmfuse.data.remote.prefetch_ahead import Copies, LookAhead, name_copies
from mmfuse.data.remote.prefetch_progress import Progress
from mmfuse.data.remote.urls import show_url
from mmfuse.data.shard_index import build_index
from mmfuse.errors import ConfigError, DataError, MmfuseError, ShardError

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.03
_STEP_SECONDS = 0.1
"""Not every step is worth a transaction of its own."""
_BEAT_SECONDS = 1.0
_WATCH_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Terminals and schedulers send them to every process of a job; what they mean is the parent's to decide."""


class CacheConfig(Settings):
    """Where copies of remote shards lie on a node, and how they get there."""

    folder: Path | None = None
    """On a disk of the node itself, never one that nodes share; runs may share it. null: `~/.cache/mmfuse/shards`."""
    budget_gib: PositiveFloat = 50
    """The copies of all runs together take no more."""
    parallel_downloads: PositiveInt = 8
    """Whole shards at a time, on each node."""
    fetch: FetchConfig = FetchConfig()

    @property
    def place(self) -> Path:
        return (self.folder or Path("~/.cache/mmfuse/shards")).expanduser().absolute()

    @property
    def budget_bytes(self) -> int:
        return int(self.budget_gib * 2**30)


class PrefetchJob(NamedTuple):
    """All that the process is told."""

    config: CacheConfig
    shards: Copies
    uses: Callable[[], Iterator[ShardUse]]
    progress: Path
    owner: str
    beside: Mapping[str, int]
    """Size by name of what the same run's evaluation will need meanwhile."""


def run_prefetcher(job: PrefetchJob, connection: Connection, parent: int) -> None:
    """The life of the process. Sends None when the run may begin, or the error that ends it; never returns."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(connection, parent), daemon=True).start()
    _set_up_logging()
    cache = None
    try:
        cache = ShardCache(job.config.place, budget_bytes=job.config.budget_bytes, owner=job.owner)
        feeder = Feeder(job, cache)
        connection.send(None)
        while True:
            feeder.turn()
            time.sleep(_TICK_SECONDS)
    except MmfuseError as error:
        problem = error
    except Exception as error:
        logger.exception("the prefetcher failed")
        problem = DataError(f"the prefetcher failed: {type(error).__name__}: {error}")
    try:
        connection.send(problem)
        if cache is not None:
            cache.fail("", str(problem))
    finally:
        os._exit(1)


def _set_up_logging() -> None:
    """To the stderr that all processes of the run share. Without tqdm, whose lock would outlive this process's end."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mmfuse").setLevel(logging.INFO)


def _end_with_parent(connection: Connection, parent: int) -> None:
    """Ends the process when the parent says so or is no more, whatever the main thread is busy with."""
    while os.getppid() == parent and not connection.poll(_WATCH_SECONDS):
        pass
    os._exit(0)


class Feeder:
    """Keeps the cache filled for one run."""

    def __init__(self, job: PrefetchJob, cache: ShardCache) -> None:
        """Reads the plan ahead and says in the ledger what the run needs.

        Raises:
            ConfigError: what is read at one time does not fit in the budget, alone or beside another run.
        """
        self.config, self.cache = job.config, cache
        self._progress = Progress(job.progress)
        self._shards = name_copies(job.shards)
        cache.drop_changed({name: shard.size for name, shard in self._shards.items()})
        self._ahead = LookAhead(job.shards, job.uses())
        largest = self._ahead.working_set()
        self._check_budget(largest.sizes, step=largest.step, beside=job.beside)
        cache.begin(self._ahead.step, self._ahead.uses, working_set=largest.sizes)
        # Downloads that push out what will be used again go no further ahead than lanes need when all of them change
        # their windows at once. Going as far as fits would push out everything before its next use: of 100 shards in a
        # fixed order and room for 50, all are downloaded in every epoch instead of half.
        in_flight = self.config.parallel_downloads * max((shard.size for shard in self._shards.values()), default=0)
        self._reach = max(sum(largest.sizes.values()), 2 * in_flight)
        self._pool = ThreadPoolExecutor(self.config.parallel_downloads)
        self._running: dict[str, Future[None]] = {}
        self._next_step = self._next_beat = 0.0
        self._blocked: tuple[str, float] | None = None
        logger.info(
            "prefetcher (process %d): %d shards of %s through %s, data.cache.budget_gib = %.4g",
            os.getpid(),
            len(self._shards),
            gib(sum(shard.size for shard in self._shards.values())),
            cache.folder,
            self.config.budget_gib,
        )

    def turn(self) -> None:
        """Does what has become possible since the last turn."""
        now = time.monotonic()
        changed = self._finish_downloads()
        if now >= self._next_step:
            before, fresh = self._ahead.step, self._ahead.advance(self._progress.slowest())
            if fresh or self._ahead.step > before:
                self.cache.advance(self._ahead.step, fresh)
                changed = True
            self._next_step = now + _STEP_SECONDS
        if now >= self._next_beat:
            self.cache.keep_alive()
            self._next_beat, changed = now + _BEAT_SECONDS, True  # others may have made room
        if changed:
            self._start_downloads()

    def _check_budget(self, sizes: Mapping[str, int], *, step: int, beside: Mapping[str, int]) -> None:
        needed = sum(sizes.values())
        more = sum(size for name, size in beside.items() if name not in sizes)
        if needed + more <= self.config.budget_bytes:
            return
        what = f"data.cache.budget_gib = {self.config.budget_gib:.4g} is too small: "
        if needed:
            what += (
                f"at step {step} this node reads {len(sizes)} shards at a time (its lanes x data.window_shards; two "
                f"windows while they change), and {len(sizes)} x {gib(needed / len(sizes))} = {gib(needed)}"
            )
        what += f"{', and' * (needed > 0)} {gib(more)} that evaluation reads at a time" if more else ""
        raise ConfigError(
            f"{what} are needed; raise data.cache.budget_gib, lower data.window_shards or data.lanes, use more nodes, "
            "or make smaller shards"
        )

    def _start_downloads(self) -> None:
        near = self._ahead.step_after(self._reach)
        while len(self._running) < self.config.parallel_downloads:
            wanted = next(iter(self.cache.missing(1)), None)
            if wanted is None:
                return
            if not self._reserve(wanted, only_unused=wanted.first_step > near):
                self._look_at_lack_of_room(wanted)
                return
            shard = self._shards[wanted.name]
            file, place = RemoteFile(shard.url, shard.size, shard.version), self.cache.temporary(wanted.name)
            index = index_of(self.cache.folder, wanted.name) if shard.index_bytes else None
            logger.debug("%s: downloading for step %d", show_url(shard.url), wanted.first_step)
            self._running[wanted.name] = self._pool.submit(
                _copy, file, place, config=self.config.fetch, checksum=shard.checksum, index=index
            )

    def _reserve(self, wanted: FileUse, *, only_unused: bool) -> bool:
        shard = self._shards[wanted.name]
        return self.cache.reserve(wanted.name, shard.size, index_bytes=shard.index_bytes, only_unused=only_unused)

    def _look_at_lack_of_room(self, wanted: FileUse) -> None:
        """Gives up where a rank needs a file now that cannot fit; room that others hold is waited for, with a limit."""
        overflow = self.cache.find_overflow() if wanted.first_step <= self._ahead.step + 1 else None
        if overflow is None:
            self._blocked = None
            return
        problem, may_pass = overflow
        if self._blocked is None or self._blocked[0] != wanted.name:
            self._blocked = wanted.name, time.monotonic()
            logger.warning("%s", problem)
        if not may_pass or time.monotonic() - self._blocked[1] > self.config.fetch.deadline_seconds:
            self._fail(wanted.name, problem)

    def _finish_downloads(self) -> bool:
        done = [name for name, future in self._running.items() if future.done()]
        for name in done:
            error = self._running.pop(name).exception()
            try:
                if error is None:
                    self.cache.publish(name)
            except OSError as problem:
                error = problem
            if error is not None:
                self._fail(name, explain_failure(error, url=self._shards[name].url, config=self.config))
        return bool(done)

    def _fail(self, name: str, message: str) -> None:
        logger.error("%s", message)
        self.cache.fail(name, message)


def explain_failure(error: BaseException, *, url: str, config: CacheConfig) -> str:
    """Why a shard could not be copied, without secrets: in errors that are not ours, the text may hold the URL."""
    if _is_disk_full(error):
        return (
            f"{show_url(url)}: no space left on the disk of {config.place}: something else fills it, and "
            f"data.cache.budget_gib = {config.budget_gib:.4g} counts on it; free it, or lower the budget"
        )
    if isinstance(error, MmfuseError):
        return str(error)
    reason = error.strerror if isinstance(error, OSError) else None
    return f"{show_url(url)}: cannot be copied to {config.place}: {reason or type(error).__name__}"


def _copy(file: RemoteFile, place: Path, *, config: FetchConfig, checksum: str | None, index: Path | None) -> None:
    """Downloads a tar and indexes it: once for all workers of the node, who would each do it."""
    download(file, place, config=config, checksum=checksum)
    if index is not None:
        try:
            build_index(place, index)
        except ShardError as error:
            raise ShardError(str(error).replace(str(place), show_url(file.url))) from None


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
