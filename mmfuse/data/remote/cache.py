"""A folder of whole shards on a disk of the node, bounded in bytes, that all runs of the node may share.

Prefetchers download into it through `ShardCache`; workers only ever read its files (`cache_read.py`). What must make
room is the file whose next use is farthest away, over all living runs; what a run reads now is never touched.
Files stay when a run ends, and the next run uses them again. Only files that the ledger knows as ours are deleted.
"""

import hashlib
import os
import re
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mmfuse.data.remote.cache_ledger import (
    Ledger,
    forget_owner,
    hold_lock,
    index_of,
    lock_of,
    remove_dead_owners,
    size_of,
    temporary_of,
)
from mmfuse.data.remote.urls import show_url
from mmfuse.errors import ConfigError, DataError

_NEVER = 1 << 62


def cache_name(url: str, version: str, *, indexed: bool = False) -> str:
    """The name of a shard's copy: of its whole address and version, with the base name for people to read.

    Args:
        indexed: whether an index is made of it, as of a shard that is not one of several aligned tars.
    """
    shown = show_url(url)
    identity = f"{shown}\0{version}" + "\0indexed" * indexed
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    base = re.sub(r"[^A-Za-z0-9._-]", "_", shown.rstrip("/").rpartition("/")[2])
    return f"{digest}-{base[-48:]}"


def gib(num_bytes: float) -> str:
    """Bytes as `1.5 GiB`."""
    return f"{num_bytes / 2**30:.4g} GiB"


class FileUse(NamedTuple):
    """A file of the cache is read from its first step to its last."""

    name: str
    size: int
    first_step: int
    last_step: int


class ShardCache:
    """One prefetcher's hand on the cache; for one thread. It lives until its process does, or until `close`."""

    def __init__(self, folder: Path, *, budget_bytes: int, owner: str) -> None:
        """Joins the cache, takes away what dead owners left, and checks the files that are there by their sizes.

        Raises:
            ConfigError: the folder cannot be written, lies on a network, or its disk is smaller than the budget.
            DataError: the ledger is damaged, or this owner is alive already.
        """
        self.folder, self.budget_bytes, self.owner = folder, budget_bytes, owner
        self._ledger = Ledger(folder)
        self._lock = hold_lock(lock_of(folder, owner))
        with self._ledger.transaction() as changes:
            forget_owner(changes, folder, owner)
            changes.execute("INSERT INTO owners VALUES (?, ?, -1)", (owner, os.getpid()))
        remove_dead_owners(self._ledger)
        self._drop_damaged()
        self._check_disk()

    def close(self) -> None:
        """Leaves the cache; its whole files stay."""
        with self._ledger.transaction() as changes:
            forget_owner(changes, self.folder, self.owner)
            lock_of(self.folder, self.owner).unlink(missing_ok=True)
        self._ledger.close()
        os.close(self._lock)

    def drop_changed(self, sizes: Mapping[str, int]) -> None:
        """Deletes files whose size is not what their shard has now: without a version, a name may outlive its content.

        Raises:
            DataError: another living run reads the old one.
        """
        with self._ledger.transaction() as changes:
            for name, size in changes.execute("SELECT name, size FROM files").fetchall():
                if sizes.get(name, size) == size:
                    continue
                reader = changes.execute(
                    "SELECT pid FROM owners WHERE id IN (SELECT owner FROM uses WHERE name = ?1"
                    " UNION SELECT owner FROM files WHERE name = ?1)",
                    (name,),
                ).fetchone()
                if reader:
                    raise DataError(
                        f"{self.folder / name}: has {size} bytes, its shard has {sizes[name]} now, and the run of "
                        f"process {reader[0]} reads the old one; wait for it, or name another data.cache.folder"
                    )
                self._delete(changes, name)

    def begin(self, step: int, uses: Iterable[FileUse], *, working_set: Mapping[str, int]) -> None:
        """Says what the run needs first, and shrinks the cache to the budget.

        Args:
            step: the one before the first.
            working_set: size by name of the largest set of files that must be there at one time.
        Raises:
            ConfigError: it does not fit beside what other living runs read now.
        """
        with self._ledger.transaction() as changes:
            self._note(changes, step, uses)
            if problem := self._find_crowd(changes, working_set):
                raise ConfigError(problem)
            self._make_room(changes, 0, distance=1)

    def advance(self, step: int, uses: Iterable[FileUse] = ()) -> None:
        """Notes that all ranks have finished a step, and further uses; those that ended before the step are over."""
        with self._ledger.transaction() as changes:
            self._note(changes, step, uses)

    def missing(self, limit: int) -> list[FileUse]:
        """Files that this owner needs and nobody has or downloads, by first use; not those that failed."""
        with self._ledger.transaction() as reading:
            rows = reading.execute(
                "SELECT name, size, first_step, last_step FROM uses WHERE owner = ?1"
                " AND name NOT IN (SELECT name FROM files)"
                " AND name NOT IN (SELECT name FROM failures WHERE owner = ?1) ORDER BY first_step LIMIT ?2",
                (self.owner, limit),
            ).fetchall()
        first: dict[str, FileUse] = {}
        for row in rows:
            first.setdefault(row[0], FileUse(*row))
        return list(first.values())

    def reserve(self, name: str, size: int, *, index_bytes: int = 0, only_unused: bool = False) -> bool:
        """Whether this owner may download a file now; evicts what is needed later than it, farthest first.

        Args:
            index_bytes: size of the index that will be made of it.
            only_unused: evict only what no living run will use.
        Returns:
            False where the file is there or being downloaded, or where there is no room; then nothing was evicted.
        Raises:
            DataError: a file that is not ours has that name.
        """
        with self._ledger.transaction() as changes:
            if changes.execute("SELECT 1 FROM files WHERE name = ?", (name,)).fetchone():
                return False
            if (self.folder / name).exists():
                raise DataError(f"{self.folder / name}: is in the way and not in the ledger; take it out of the folder")
            distance = changes.execute(
                "SELECT MIN(first_step) - owners.step FROM uses JOIN owners ON owners.id = uses.owner"
                " WHERE uses.owner = ? AND name = ?",
                (self.owner, name),
            ).fetchone()[0]
            if distance is None or only_unused:
                distance = _NEVER
            if not self._make_room(changes, size + index_bytes, distance=max(1, distance)):
                return False
            changes.execute("INSERT INTO files VALUES (?, ?, ?, ?)", (name, size, self.owner, index_bytes))
        return True

    def temporary(self, name: str) -> Path:
        """Where to download a reserved file to."""
        return temporary_of(self.folder, name, self.owner)

    def publish(self, name: str) -> Path:
        """Gives a downloaded file its final name; its path."""
        with self._ledger.transaction() as changes:
            done = changes.execute("UPDATE files SET owner = NULL WHERE name = ? AND owner = ?", (name, self.owner))
            if not done.rowcount:
                raise DataError(f"{self.folder / name}: its reservation has gone; was the ledger deleted?")
            # Before the commit: a kill in between leaves a file that is known by its size, not a row without a file.
            return self.temporary(name).replace(self.folder / name)

    def fail(self, name: str, message: str) -> None:
        """Gives a reservation back; workers of this run that wait for the file raise the message.

        Args:
            name: empty where it is about the whole run.
        """
        with self._ledger.transaction() as changes:
            if changes.execute("DELETE FROM files WHERE name = ? AND owner = ?", (name, self.owner)).rowcount:
                self.temporary(name).unlink(missing_ok=True)
                index_of(self.folder, name).unlink(missing_ok=True)
            changes.execute("INSERT OR REPLACE INTO failures VALUES (?, ?, ?)", (self.owner, name, message))

    def keep_alive(self) -> None:
        """Shows that this owner is not stuck, takes over from the dead, and forgets needed files that were deleted."""
        os.utime(self._lock)
        remove_dead_owners(self._ledger)
        with self._ledger.transaction() as changes:
            needed = changes.execute(
                "SELECT name, index_bytes FROM files WHERE owner IS NULL AND name IN (SELECT name FROM uses JOIN owners"
                " ON owners.id = uses.owner WHERE owners.id = ? AND first_step <= owners.step + 1)",
                (self.owner,),
            ).fetchall()
            for name, index_bytes in needed:
                if not (self.folder / name).exists() or self._lacks_index(name, index_bytes):
                    self._delete(changes, name)

    def find_overflow(self) -> tuple[str, bool] | None:
        """Why what is needed now can never fit, and whether that is for another run's files, which may yet go."""
        with self._ledger.transaction() as reading:
            mine = {name: size for name, size, owner, _ in self._active(reading) if owner == self.owner}
            needed = sum(mine.values())
            if needed > self.budget_bytes:
                return (
                    f"{self.folder}: this step reads {len(mine)} shards, {gib(needed)} together, but "
                    f"{self._budget()}; raise it, or lower data.window_shards or data.lanes"
                ), False
            crowd = self._find_crowd(reading, mine)
        return (crowd, True) if crowd else None

    def _note(self, changes: sqlite3.Connection, step: int, uses: Iterable[FileUse]) -> None:
        rows = ((self.owner, name, size, first, min(last, _NEVER)) for name, size, first, last in uses)
        changes.executemany("INSERT INTO uses VALUES (?, ?, ?, ?, ?)", rows)
        changes.execute("UPDATE owners SET step = ? WHERE id = ?", (step, self.owner))
        changes.execute("DELETE FROM uses WHERE owner = ? AND last_step < ?", (self.owner, step))

    def _active(self, reading: sqlite3.Connection) -> list[tuple[str, int, str, int]]:
        """What every owner reads now: name, size, owner and its process."""
        return reading.execute(
            "SELECT DISTINCT name, size, owner, pid FROM uses JOIN owners ON owners.id = uses.owner"
            " WHERE first_step <= owners.step + 1"
        ).fetchall()

    def _find_crowd(self, reading: sqlite3.Connection, mine: Mapping[str, int]) -> str | None:
        active = [row for row in self._active(reading) if row[2] != self.owner and row[0] not in mine]
        theirs = sum({name: size for name, size, _, _ in active}.values())
        needed = sum(mine.values())
        if not active or needed + theirs <= self.budget_bytes:
            return None
        pids = ", ".join(str(pid) for pid in sorted({row[3] for row in active}))
        return (
            f"{self.folder}: this run reads shards of {gib(needed)} at a time, and another run that shares the cache "
            f"(process {pids}) reads {gib(theirs)}, but {self._budget()}; raise it, or give one of them another "
            "data.cache.folder"
        )

    def _make_room(self, changes: sqlite3.Connection, size: int, *, distance: int) -> bool:
        """Evicts files that are needed in more than `distance` steps, farthest first, until `size` more bytes fit."""
        excess = changes.execute("SELECT TOTAL(size + index_bytes) FROM files").fetchone()[0] + size - self.budget_bytes
        if excess <= 0:
            return True
        victims = []
        for name, freed, _ in changes.execute(
            "SELECT files.name, files.size + index_bytes, MIN(first_step - step) AS distance FROM files"
            " LEFT JOIN uses ON uses.name = files.name LEFT JOIN owners ON owners.id = uses.owner"
            " WHERE files.owner IS NULL GROUP BY files.name HAVING distance IS NULL OR distance > ?"
            " ORDER BY distance IS NULL DESC, distance DESC, files.rowid",
            (distance,),
        ):
            victims.append(name)
            excess -= freed
            if excess <= 0:
                break
        if excess > 0 and size:
            return False
        for name in victims:
            self._delete(changes, name)
        return excess <= 0

    def _delete(self, changes: sqlite3.Connection, name: str) -> None:
        # Before the commit: a kill in between leaves a row without a file, which is seen, not a file without a row.
        (self.folder / name).unlink(missing_ok=True)
        index_of(self.folder, name).unlink(missing_ok=True)
        changes.execute("DELETE FROM files WHERE name = ?", (name,))

    def _drop_damaged(self) -> None:
        with self._ledger.transaction() as changes:
            rows = changes.execute("SELECT name, size, index_bytes FROM files WHERE owner IS NULL").fetchall()
            for name, size, index_bytes in rows:
                if size_of(self.folder / name) != size or self._lacks_index(name, index_bytes):
                    self._delete(changes, name)

    def _lacks_index(self, name: str, index_bytes: int) -> bool:
        return index_bytes > 0 and not index_of(self.folder, name).exists()

    def _check_disk(self) -> None:
        with self._ledger.transaction() as reading:
            held = reading.execute("SELECT TOTAL(size + index_bytes) FROM files WHERE owner IS NULL").fetchone()[0]
        free = shutil.disk_usage(self.folder).free
        if self.budget_bytes > free + held:
            raise ConfigError(
                f"{self._budget()}, but the disk of {self.folder} has {gib(free)} free and the cache on it holds "
                f"{gib(held)}; lower the budget, or name a folder on a larger disk"
            )

    def _budget(self) -> str:
        return f"data.cache.budget_gib = {self.budget_bytes / 2**30:.4g}"
