"""The prefetcher of a node, as the run that starts it sees it.

One process a node copies remote shards into the node's cache, in the order in which the plan will read them. It is
spawned, never forked: asynchronous file systems hang after a fork. It writes its log to the stderr that it inherits,
not to a file of its own: there its last words stand in the job's log, between what the run did before and after.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

from mmfuse.data.plan import ShardUse
from mmfuse.data.remote.cache_ledger import Ledger, remove_dead_owners
from mmfuse.data.remote.prefetch_ahead import Copies
from mmfuse.data.remote.prefetch_loop import CacheConfig, PrefetchJob, run_prefetcher
from mmfuse.data.remote.prefetch_progress import Progress, owner_of
from mmfuse.errors import ConfigError, DataError, MmfuseError

logger = logging.getLogger(__name__)

_START_SECONDS = 300.0
"""For importing, and for reading the plan ahead, on a busy machine."""
_END_SECONDS = 5.0


class Prefetcher:
    """Started by one process of a node, for all its ranks; a context manager."""

    def __init__(
        self,
        config: CacheConfig,
        shards: Copies,
        uses: Callable[[], Iterator[ShardUse]],
        *,
        progress: Path,
        num_ranks: int,
        beside: Mapping[str, int] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            shards: those that must be copied.
            uses: what the node's ranks read from their first step on; called in the process, so it must pickle.
            beside: size by name of copies that this run's evaluation will need meanwhile.
            progress: a file that is made here, for this node alone; each rank reports there (`Progress`).
        """
        self.config, self.progress, self.num_ranks = config, progress, num_ranks
        self.owner = owner_of(progress)
        """What workers must know of it (`open_cached`); other ranks find it with `owner_of`."""
        self._job = PrefetchJob(config, dict(shards), uses, progress, self.owner, dict(beside or {}))
        self._process: BaseProcess | None = None
        self._parent = 0

    @property
    def pid(self) -> int:
        """Of the process; 0 while there is none."""
        return (self._process and self._process.pid) or 0

    def start(self) -> Self:
        """Starts the process and waits until the run may begin.

        Raises:
            ConfigError: the budget is too small or larger than the disk, or the folder cannot be used.
            DataError: the process ended by itself.
        """
        try:
            Progress.create(self.progress, num_ranks=self.num_ranks)
        except OSError as error:
            raise ConfigError(
                f"data.cache.folder = {self.config.place}: cannot be written: {error.strerror}"
            ) from error
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._parent = os.getpid()
        self._process = context.Process(
            target=run_prefetcher, args=(self._job, theirs, self._parent), name="mmfuse-prefetcher", daemon=True
        )
        self._process.start()
        theirs.close()
        # Before multiprocessing's own turn, which would send a signal that the process ignores, and wait.
        atexit.register(self.close)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def check(self) -> None:
        """Raises what ended the process, if it has ended.

        Raises:
            DataError: it was killed, or the cache cannot be used any more.
        """
        process = self._process
        if process is None:
            raise DataError("the prefetcher was not started")
        alive = process.is_alive()
        try:
            if self._connection.poll() and (problem := self._connection.recv()) is not None:
                raise problem
        except (EOFError, ConnectionResetError):
            alive = False
        if not alive:
            process.join(_END_SECONDS)
            raise DataError(
                f"the prefetcher (process {process.pid}) has ended with exit code {process.exitcode}"
                f"{' (killed: out of memory?)' if process.exitcode == -signal.SIGKILL else ''}; start the run again"
            )

    def close(self) -> None:
        """Ends the process, within seconds, and takes away what it was downloading; whole files stay."""
        process = self._process
        if process is None or os.getpid() != self._parent:  # a forked worker of ours
            return
        self._process = None
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.send(None)
        process.join(_END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        self._connection.close()
        try:
            ledger = Ledger(self.config.place)
            remove_dead_owners(ledger)
            ledger.close()
        except MmfuseError as error:
            logger.warning("%s", error)  # the next owner of the cache will do it

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + _START_SECONDS
        while not self._connection.poll(0.1):
            if not self._process.is_alive():
                break
            if time.monotonic() > give_up:
                raise DataError(f"the prefetcher was not ready after {_START_SECONDS:.0f} s; is the node overloaded?")
        self.check()
