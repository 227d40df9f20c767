"""Rows -> one tar with its index, the same bytes in whichever process and however often."""

import errno
import io
import os
import stat
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mmfuse.data.manifest import PartFacts, gather_facts, index_name, index_path, local_version, update_manifest
from mmfuse.data.shard_index import SUFFIX, ShardIndex, build_index
from mmfuse.errors import DataError, SampleError, ShardError
from mmfuse.shards.row_store import RowStore
from mmfuse.shards.rows import Problem, Row

_MAX_MEMBER_BYTES = 1 << 31
"""A larger file is no picture, text or clip, and would have to fit into memory."""
_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN)
"""Of the machine or a file server; every file would seem to be bad."""


class ShardTask(NamedTuple):
    """A shard to be written: its name, and which places in the order of a split it takes."""

    shard: str
    split: str
    first: int
    last: int
    """One past the end."""


class ShardRecord(NamedTuple):
    """What became of a shard."""

    shard: str
    samples: int
    bytes: int
    left_out: int
    """Rows without a sample."""
    extensions: tuple[str, ...]
    """That any of its members has, sorted."""
    problems: tuple[Problem, ...] = ()
    changes: tuple[str, ...] = ()
    """What is different from the tar that it was made of, in words."""
    origin: str = ""
    """Which state of that tar it was made of."""


def write_shard(task: ShardTask, *, scratch: Path, folder: Path) -> ShardRecord:
    """Writes one shard of the rows stored in `scratch` and moves it with its index into `folder`.

    Raises:
        DataError: the shard cannot be written, or files cannot be read for a reason that is not theirs alone.
    """
    problems: list[Problem] = []
    extensions: set[str] = set()
    samples = 0
    temporary = scratch / task.shard
    try:
        with RowStore(scratch) as store, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for place in store.order(task.split)[task.first : task.last].tolist():
                row = store[place]
                members = read_members(row, problems)
                samples += bool(members)
                extensions |= members.keys()
                for extension, data in members.items():
                    add_member(tar, f"{row.key}.{extension}", data)
        size = publish_shard(temporary, folder, samples=samples)
    except OSError as error:
        raise DataError(
            f"{folder / task.shard}: cannot be written: {error}; run the same command again to go on"
        ) from error
    left_out = task.last - task.first - samples
    return ShardRecord(task.shard, samples, size, left_out, tuple(sorted(extensions)), tuple(problems))


def read_members(row: Row, problems: list[Problem]) -> dict[str, bytes]:
    """The members of a sample by extension, sorted; empty where nothing but metadata is left of it."""
    members = {}
    for file in row.files:
        try:
            members[file.extension] = read_file(file.path)
        except SampleError as error:
            problems.append(Problem(row.number, file.column, file.path, str(error)))
    if row.captions:
        members["txt"] = "".join(caption + "\n" for caption in row.captions).encode()
    if not members.keys() - {"json"}:
        return {}
    if row.extra:
        members["json"] = row.extra.encode()
    return dict(sorted(members.items()))


def read_file(path: str) -> bytes:
    """The bytes of one file.

    Raises:
        SampleError: this file is missing, empty, not to be read, or no file.
        DataError: the machine or the file system is in trouble: no file is to blame.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for its writer for ever
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SampleError("is not a file")
            if not 0 < status.st_size <= _MAX_MEMBER_BYTES:
                raise SampleError(f"has {status.st_size:,} bytes, too many" if status.st_size else "is empty")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise _blame(path, error) from error


def is_mended(problem: Problem) -> bool:
    """Whether the file that was left out looks as if it could be read now."""
    try:
        status = os.stat(problem.path)
    except (OSError, ValueError):
        return False
    fits = stat.S_ISREG(status.st_mode) and 0 < status.st_size <= _MAX_MEMBER_BYTES
    return fits and os.access(problem.path, os.R_OK)


def _blame(path: str, error: OSError | ValueError) -> SampleError | DataError:
    """A problem of this file alone, or of all of them: then none may be left out for it."""
    if isinstance(error, OSError) and error.errno in _TROUBLE:
        return DataError(f"{path}: cannot be read: {error.strerror}; when it can, run the same command again to go on")
    return SampleError(f"cannot be read: {error.strerror if isinstance(error, OSError) else error}")


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member without owner and time."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def publish_shard(temporary: Path, folder: Path, *, samples: int) -> int:
    """Indexes a whole tar, moves both into the folder under the tar's name, and gives its bytes.

    The index comes last: a tar without one is not complete.
    """
    index = build_index(temporary, temporary.with_name(temporary.name + SUFFIX))
    if len(index) != samples:
        raise ShardError(f"{temporary}: {samples} samples were written, {len(index)} are found")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    size = temporary.stat().st_size
    destination = folder / temporary.name
    destination.parent.mkdir(parents=True, exist_ok=True)
    index_place = destination.with_name(destination.name + SUFFIX)
    index_place.unlink(missing_ok=True)
    os.replace(temporary, destination)
    os.replace(temporary.with_name(temporary.name + SUFFIX), index_place)
    return size


def list_in_manifest(shards: Iterable[Path]) -> None:
    """Lists shards of one folder, whose indexes lie beside them, where training looks them up.

    Raises:
        DataError: the manifest cannot be written.
    """
    folder, facts = Path(), {}
    for shard in shards:
        folder, name = shard.parent, index_name((str(shard),), beside=True)
        index = ShardIndex(index_path(folder, name))
        facts[name] = gather_facts(index, (PartFacts(shard.name, *local_version(str(shard))),))
    update_manifest(folder, facts)
