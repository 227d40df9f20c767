"""What is in a shard cache and who needs it: one SQLite file, and locks that tell the living from the dead.

An *owner* is the prefetcher of one run on this node. It holds a lock on `owners/ID.lock` for as long as it lives; the
kernel frees the lock however it ends. A file is recorded before it is created and until after it is gone, so whatever a
kill leaves behind is known to be ours. Every change is one transaction.
"""

import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmfuse.data.shard_index import SUFFIX
from mmfuse.errors import ConfigError, DataError

_BUSY_SECONDS = 30
_RESTART_SECONDS = 5
"""How long the prefetcher of a killed run may take to notice and end."""
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse.sshfs"}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS owners (id TEXT PRIMARY KEY, pid INTEGER NOT NULL, step INTEGER NOT NULL);
-- owner: who downloads it now; NULL: it is whole and under its final name.
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, size INTEGER NOT NULL, owner TEXT,
    index_bytes INTEGER NOT NULL);
-- Uses to come, and those that are not over.
CREATE TABLE IF NOT EXISTS uses (
    owner TEXT NOT NULL, name TEXT NOT NULL, size INTEGER NOT NULL,
    first_step INTEGER NOT NULL, last_step INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS uses_by_name ON uses (name, owner, first_step);
CREATE INDEX IF NOT EXISTS uses_by_step ON uses (owner, first_step, name, size);
-- name '': the owner itself failed.
CREATE TABLE IF NOT EXISTS failures (
    owner TEXT NOT NULL, name TEXT NOT NULL, message TEXT NOT NULL, PRIMARY KEY (owner, name));
"""


class Ledger:
    """An open ledger; for one thread."""

    def __init__(self, folder: Path) -> None:
        """Makes the cache folder where it is missing.

        Raises:
            ConfigError: the folder cannot be written, or is shared over a network.
            DataError: the ledger is damaged.
        """
        self.folder = folder
        _check_local(folder)
        try:
            (folder / "owners").mkdir(parents=True, exist_ok=True)
            # Two processes that make one ledger at once would both find it locked and give up.
            with open(folder / "ledger.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._connection = _connect(folder)
        except OSError as error:
            raise ConfigError(
                f"data.cache.folder = {folder}: cannot be written: {error.strerror}; name one on a disk of this node"
            ) from error
        except sqlite3.Error as error:
            raise _damaged(folder, error) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside happens, or nothing of it.

        Raises:
            DataError: the disk is full, or the ledger is damaged.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise _damaged(self.folder, error) from error

    def close(self) -> None:
        self._connection.close()


def _connect(folder: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(folder / "ledger.sqlite", timeout=_BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for writers
    # Also a power cut must not leave a file that no row knows; changes are a few a second.
    connection.execute("PRAGMA synchronous = FULL")
    connection.executescript(_SCHEMA)
    return connection


def _damaged(folder: Path, error: sqlite3.Error) -> DataError:
    return DataError(
        f"{folder / 'ledger.sqlite'}: {error}; free some disk, or, if the file is damaged, "
        "end all runs that use this cache and delete the folder: it holds copies only"
    )


def _check_local(folder: Path) -> None:
    """Refuses a folder that other nodes see too: SQLite's shared memory, and often locks, end at the node."""
    mounts = Path("/proc/self/mountinfo")
    kind = file_system_of(folder.resolve(), mounts.read_text()) if mounts.is_file() else ""
    if kind in _NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"data.cache.folder = {folder}: lies on {kind}, which other nodes share, and each node needs a "
            "cache of its own; name a folder on a local disk, such as $TMPDIR or /scratch"
        )


def file_system_of(path: Path, mountinfo: str) -> str:
    """The kind of file system that an absolute path lies on, by the text of `/proc/self/mountinfo`."""
    kinds: dict[Path, str] = {}
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4])
        kinds[Path(place)] = rest.split()[0]
    return next((kinds[place] for place in (path, *path.parents) if place in kinds), "")


def lock_of(folder: Path, owner: str) -> Path:
    """The file whose lock says that an owner lives, and whose time says when it last did something."""
    return folder / "owners" / f"{owner}.lock"


def hold_lock(place: Path) -> int:
    """Takes an owner's lock; the descriptor that holds it.

    Raises:
        DataError: the owner is alive.
    """
    give_up = time.monotonic() + _RESTART_SECONDS
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), place.stat()):  # a cleaner may just have deleted it
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        if time.monotonic() > give_up:
            raise DataError(
                f"{place}: another prefetcher of this run is alive on this node; "
                "end the earlier run first, or give the new one a run directory of its own"
            )
        time.sleep(0.05)


def is_alive(place: Path) -> bool:
    """Whether the owner of this lock file holds it."""
    try:
        with _looking_at(place) as free:
            return free is None
    except FileNotFoundError:
        return False


def _delete_if_dead(place: Path) -> bool:
    """Deletes a lock file that nobody holds; whether its owner is dead."""
    try:
        with _looking_at(place) as free:
            # While locked: the same owner, starting anew in this moment, must see that its file has gone.
            if free is not None and os.path.samestat(os.fstat(free), place.stat()):
                place.unlink()
            return free is not None
    except FileNotFoundError:
        return True


@contextmanager
def _looking_at(place: Path) -> Iterator[int | None]:
    """A lock file's descriptor, which its owner cannot lock meanwhile; None where the owner holds it."""
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def temporary_of(folder: Path, name: str, owner: str) -> Path:
    """Where an owner downloads a file to."""
    return folder / f"{name}.{owner}.part"


def index_of(folder: Path, name: str) -> Path:
    """Where the index of a copy is, if one was made."""
    return folder / "indexes" / f"{name}{SUFFIX}"


def remove_dead_owners(ledger: Ledger) -> None:
    """Takes away what owners left that ended without a word: temporary files, reservations, uses and locks."""
    with ledger.transaction() as changes:
        for (owner,) in changes.execute("SELECT id FROM owners").fetchall():
            if _delete_if_dead(lock_of(ledger.folder, owner)):
                forget_owner(changes, ledger.folder, owner)


def forget_owner(changes: sqlite3.Connection, folder: Path, owner: str) -> None:
    """Removes an owner that does not live, inside a transaction; whole files stay."""
    for name, size in changes.execute("SELECT name, size FROM files WHERE owner = ?", (owner,)).fetchall():
        temporary_of(folder, name, owner).unlink(missing_ok=True)
        if size_of(folder / name) == size:  # killed between the move to its final name and the row that says so
            changes.execute("UPDATE files SET owner = NULL WHERE name = ?", (name,))
        else:
            for index in (folder / "indexes").glob(f"{name}{SUFFIX}*"):  # also one that was being written
                index.unlink(missing_ok=True)
            changes.execute("DELETE FROM files WHERE name = ?", (name,))
    for table, column in (("uses", "owner"), ("failures", "owner"), ("owners", "id")):
        changes.execute(f"DELETE FROM {table} WHERE {column} = ?", (owner,))


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
