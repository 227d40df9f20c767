"""Members of one indexed shard on this machine: whole, or as files of which only the header is read."""

import io
import os
from pathlib import Path
from typing import NamedTuple, Self

from mmfuse.data.manifest import index_path
from mmfuse.data.recipe import Shard
from mmfuse.data.remote.urls import is_remote
from mmfuse.data.shard_index import ShardIndex
from mmfuse.errors import DataError, ShardError

_HEADER_BYTES = 16_384
"""Read at once: the header of most pictures and sounds, in one call."""


class Member(NamedTuple):
    """One member's place."""

    extension: str
    part: int
    """Which tar of the shard."""
    offset: int
    size: int


class MemberReader:
    """An open shard; a context manager.

    Raises:
        ShardError: its index is missing or damaged.
        DataError: one of its tars cannot be opened here.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.index = open_index(shard)
        self._files: list[int] = []
        try:
            self._files += [os.open(path, os.O_RDONLY) for path in local_parts(shard)]
        except OSError as error:
            self.close()
            raise DataError(f"{shard.shown}: cannot be read: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files."""
        for file in self._files:
            os.close(file)
        self._files.clear()
        self.index.close()

    def sample(self, number: int) -> tuple[str, list[Member]]:
        """Key and members of a sample, in the order of the index."""
        key, members, parts = self.index.sample(number)
        return key, [Member(extension, parts[extension], *place) for extension, place in members.items()]

    def read(self, member: Member) -> bytes:
        """All bytes of a member.

        Raises:
            ShardError: the tar ends before it does.
        """
        data = os.pread(self._files[member.part], member.size, member.offset)
        if len(data) != member.size:
            raise ShardError(f"{self.shard.parts[member.part]}: ends before byte {member.offset + member.size}")
        return data

    def open(self, member: Member) -> io.BufferedReader:
        """A member as a file; only what is read of it leaves the disk."""
        return io.BufferedReader(_Window(self._files[member.part], member.offset, member.size), _HEADER_BYTES)


class _Window(io.RawIOBase):
    """A part of a file that looks like a whole one."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + position)
        return self._position

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._file, wanted, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_index(shard: Shard) -> ShardIndex:
    """The index of a shard, whose tars may lie elsewhere.

    Raises:
        ShardError: there is none, or it is damaged.
    """
    path = index_path(shard.index_folder, shard.name)
    if not path.is_file():
        raise ShardError(f"{shard.shown}: is not indexed, or was found damaged then; run: mmfuse shards index")
    return ShardIndex(path)


def local_parts(shard: Shard) -> list[Path]:
    """The tars of a shard.

    Raises:
        DataError: one of them is not on this machine.
    """
    if any(map(is_remote, shard.parts)):
        raise DataError(f"{shard.shown}: is remote; this reads every byte, so copy it to a disk of this machine first")
    return [Path(part) for part in shard.parts]
