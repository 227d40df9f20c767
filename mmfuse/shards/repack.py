"""A tar that cannot be read in place -> a clean one: unpacked, samples together, keys without dots, no pickles.

Streams: of a tar only its headers are in memory. Payloads are copied as they are and never looked into.
"""

import bz2
import gzip
import lzma
import shutil
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmfuse.data.tar import Member, walk_tar
from mmfuse.data.tar_samples import FORBIDDEN, split_name
from mmfuse.errors import DataError, ShardError
from mmfuse.shards.rows import clean_key
from mmfuse.shards.write import ShardRecord, publish_shard

_PACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_MAX_EXTENSIONS = 1000
"""More different ones in a tar are parts of keys."""
_COPIED_BYTES = 1 << 20
_UNPACKED = "unpacked"
_MOVED = "members moved to their sample"
_RENAMED = "keys renamed"
_TWICE = "members dropped that the sample has already"
_PICKLES = "pickles dropped"
_NAMELESS = "members dropped that have no KEY.EXTENSION"
_UNUSABLE = "members dropped whose names cannot be keys"


class RepackTask(NamedTuple):
    """A tar to be rewritten, and the name of the new one."""

    source: Path
    shard: str
    dotted_keys: bool
    """The extension begins at the last dot of a name, not at the first."""
    origin: str
    """The source's size and time of change: when they differ, it is rewritten again."""


class _Layout(NamedTuple):
    """What a rewritten tar will hold."""

    samples: dict[str, dict[str, Member]]
    """Key -> extension -> where it lies in the source."""
    changes: Counter[str]
    """What is different from the source, with how often."""


def find_changes(task: RepackTask) -> Counter[str] | ShardError:
    """What keeps a tar from being read as it is; empty where nothing does. An error where no clean tar can be made."""
    try:
        changes = Counter({_UNPACKED: 1}) if _packer(task.source) else _plan_layout(task, task.source).changes
    except OSError as error:
        raise DataError(f"{task.source}: cannot be read: {error.strerror}") from error
    except ShardError as error:
        return error
    needed = (_UNPACKED, _MOVED, _TWICE, _PICKLES, *((_RENAMED,) if task.dotted_keys else ()))
    return Counter({change: count for change, count in changes.items() if change in needed})


def repack_shard(task: RepackTask, *, scratch: Path, folder: Path) -> ShardRecord:
    """Writes the clean tar with its index into `folder`.

    Raises:
        ShardError: the tar is damaged, or no clean tar can be made of it.
        DataError: it cannot be read, or the new one not be written.
    """
    temporary, unpacked = scratch / task.shard, scratch / f"{task.shard}.unpacked"
    try:
        source = _unpack(task.source, unpacked)
        layout = _plan_layout(task, source)
        changes = layout.changes + Counter({_UNPACKED: int(source == unpacked)})
        with open(source, "rb") as file, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for key, members in layout.samples.items():
                for extension, member in members.items():
                    _copy_member(file, member, tar, f"{key}.{extension}")
        size = publish_shard(temporary, folder, samples=len(layout.samples))
    except OSError as error:
        raise DataError(f"{task.source}: cannot be rewritten: {error}; run the same command again to go on") from error
    except ShardError as error:
        raise ShardError(str(error).replace(str(unpacked), str(task.source))) from error
    finally:
        unpacked.unlink(missing_ok=True)
    extensions = sorted({extension for members in layout.samples.values() for extension in members})
    told = tuple(f"{what}: {count}" for what, count in sorted(changes.items()))
    return ShardRecord(task.shard, len(layout.samples), size, 0, tuple(extensions), changes=told, origin=task.origin)


def _packer(source: Path):
    """What opens a compressed tar, None for a plain one."""
    with open(source, "rb") as file:
        start = file.read(8)
    return next((packer for magic, packer in _PACKERS.items() if start.startswith(magic)), None)


def _unpack(source: Path, unpacked: Path) -> Path:
    """A plain tar: the source itself, or an unpacked copy."""
    packer = _packer(source)
    if packer is None:
        return source
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    try:
        with packer(source, "rb") as packed, open(unpacked, "wb") as file:
            shutil.copyfileobj(packed, file, _COPIED_BYTES)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ShardError(f"{source}: cannot be unpacked: {error}; copy or build it again") from error
    return unpacked


def _plan_layout(task: RepackTask, source: Path) -> _Layout:
    """Samples in the order in which they begin; every member is in it, or counted among the changes."""
    samples: dict[str, dict[str, Member]] = {}
    original: dict[str, str] = {}
    changes: Counter[str] = Counter()
    extensions: set[str] = set()
    last = ""
    for member in walk_tar(source):
        raw_key, extension = split_name(member.name)
        if task.dotted_keys and extension:
            raw_key, _, extension = member.name.rpartition(".")
            extension = extension.lower()
        key = _clean(raw_key)
        if reason := _reason_to_drop(raw_key, key, extension):
            changes[reason] += 1
            continue
        if original.setdefault(key, raw_key) != raw_key:
            raise ShardError(f"{task.source}: {original[key]!r} and {raw_key!r} would both become the key {key!r}")
        members = samples.setdefault(key, {})
        if extension in members:
            changes[_TWICE] += 1
            continue
        changes[_RENAMED] += key != raw_key and not members
        changes[_MOVED] += bool(members) and key != last
        members[extension] = member
        extensions.add(extension)
        last = key
    if len(extensions) > _MAX_EXTENSIONS:
        some = ", ".join(sorted(extensions)[:3])
        raise ShardError(
            f"{task.source}: has {len(extensions):,} different extensions, such as {some}: keys hold dots; "
            "convert with dotted_keys, so that the extension begins at the last one"
        )
    return _Layout(samples, +changes)


def _reason_to_drop(raw_key: str, key: str, extension: str) -> str:
    """Empty for a member that is kept."""
    if not extension or not raw_key.rpartition("/")[2]:
        return _NAMELESS
    if extension.rpartition(".")[2] in FORBIDDEN:
        return _PICKLES
    return "" if key else _UNUSABLE


def _clean(key: str) -> str:
    """The key as it may stand in a tar; empty where none can be made of it."""
    try:
        return clean_key(key)
    except ValueError:
        return ""


def _copy_member(file: BinaryIO, member: Member, tar: tarfile.TarFile, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = member.size
    file.seek(member.offset)
    tar.addfile(info, file)
