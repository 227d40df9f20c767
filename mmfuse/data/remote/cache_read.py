"""How workers read the shard cache: plain files that are there, or will be soon, or never."""

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from mmfuse.data.remote.cache_ledger import index_of, is_alive, lock_of
from mmfuse.errors import DataError

_POLL_SECONDS = 0.02
_LOOK_SECONDS = 0.25
"""A waiting worker asks the ledger this often whether there is any use in waiting."""
QUIET_SECONDS = 60.0
"""A prefetcher shows every second that it is not stuck; a busy machine may delay that."""


def open_cached(folder: Path, name: str, *, owner: str, quiet_seconds: float = QUIET_SECONDS) -> int:
    """A descriptor for reading a file of the cache; waits until the file is there.

    The file's bytes stay readable, and take disk space, until the descriptor is closed: ask `is_evicted` now and then.

    Raises:
        DataError: as of `wait_for_shard`.
    """
    while True:
        try:
            return os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # also when it was evicted since it was waited for
            wait_for_shard(folder, name, owner=owner, quiet_seconds=quiet_seconds)
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read: {error.strerror}") from error


def is_evicted(descriptor: int) -> bool:
    """Whether an open file of the cache has been deleted since: its disk space is free only once nobody has it open."""
    return os.fstat(descriptor).st_nlink == 0


def wait_for_shard(
    folder: Path, name: str, *, owner: str, with_index: bool = False, quiet_seconds: float = QUIET_SECONDS
) -> Path:
    """The path of a file of the cache, once it is there, and its index.

    How long that takes is not limited as such: where the cache is full, it lasts until the ranks have gone on, and
    they may be evaluating. What is limited is how long a prefetcher may be silent.

    Args:
        owner: the run's prefetcher.
    Raises:
        DataError: the download failed, the prefetcher has ended or is silent, or it does not know of this file.
    """
    place, asked = folder / name, time.monotonic()
    needed = (place, index_of(folder, name)) if with_index else (place,)
    next_look = asked + _LOOK_SECONDS
    while not all(path.exists() for path in needed):
        if time.monotonic() >= next_look:
            waited = time.monotonic() - asked
            problem = _find_problem(folder, name, owner, waited=waited, quiet_seconds=quiet_seconds)
            if problem and not all(path.exists() for path in needed):
                raise DataError(problem)
            next_look = time.monotonic() + _LOOK_SECONDS
        time.sleep(_POLL_SECONDS)
    return place


def _find_problem(folder: Path, name: str, owner: str, *, waited: float, quiet_seconds: float) -> str | None:
    """Why there is no use in waiting."""
    try:
        address = f"{(folder / 'ledger.sqlite').absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=quiet_seconds)) as ledger:
            failed = ledger.execute(
                "SELECT message FROM failures WHERE owner = ? AND name IN (?, '') ORDER BY name DESC", (owner, name)
            ).fetchone()
            known = ledger.execute("SELECT 1 FROM uses WHERE owner = ? AND name = ?", (owner, name)).fetchone()
            server = ledger.execute("SELECT owner FROM files WHERE name = ?", (name,)).fetchone()
    except sqlite3.Error as error:
        return f"{folder / name}: is not in the cache, whose ledger cannot be read: {error}"
    if failed:
        return failed[0]
    if not is_alive(lock_of(folder, owner)):
        return (
            f"{folder / name}: is not in the cache, and the prefetcher of this run has ended or was killed "
            "(out of memory?); its last words are in the job's log; start the run again"
        )
    for other in {owner, server[0] if server and server[0] else owner}:
        silent = _seconds_since_sign(folder, other)
        if silent > quiet_seconds:
            return (
                f"{folder / name}: is not in the cache, and the prefetcher {other} that should bring it has been stuck "
                f"for {silent:.0f} s; start the run again"
            )
    if not known and waited > quiet_seconds:
        return f"{folder / name}: is not in the cache, and the prefetcher was not told that this step reads it"
    return None


def _seconds_since_sign(folder: Path, owner: str) -> float:
    try:
        return time.time() - lock_of(folder, owner).stat().st_mtime
    except FileNotFoundError:  # it has just ended; who takes over has to notice first
        return 0.0
