"""One request to a server, bounded in time: some bytes of a file, or the list of a folder.

fsspec starts its event loop, a thread of its own, at the first request and never at import: a process that imports this
may still be forked. Any thread of any process may ask.
"""

import contextlib
import re
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec.asyn
from pydantic import PositiveFloat, PositiveInt

from mmfuse.config import Settings
from mmfuse.data.remote.retry import Deadline, RemoteError
from mmfuse.data.remote.stores import READ_BYTES, Answer, Entry, Store, find_store

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_MIN_CHUNK_BYTES = 64 << 10

T = TypeVar("T")


class FetchConfig(Settings):
    """How remote files are read."""

    deadline_seconds: PositiveFloat = 900.0
    """For one whole file, with all attempts and pauses."""
    timeout_seconds: PositiveFloat = 30.0
    """In which a server must answer, or send the next 64 KiB: one that trickles fails as one that is silent."""
    piece_bytes: PositiveInt = 64 << 20
    """Asked for in one request."""


class Piece(NamedTuple):
    """Some bytes of a remote file, on their way."""

    start: int
    """Of the first byte, in the file."""
    end: int | None
    """Behind the last byte, or unknown."""
    size: int | None
    """Of the whole file, or unknown."""
    version: str
    """Etag without its mark for weakness, else the time of the last change, else empty."""
    chunks: Iterator[bytes]
    """Raises RemoteError where the connection breaks."""


@contextlib.contextmanager
def open_piece(url: str, *, start: int, end: int, deadline: Deadline, config: FetchConfig) -> Iterator[Piece]:
    """The bytes from `start` to `end`, or fewer of them; all bytes of the file from a server that knows no ranges.

    Raises:
        RemoteError: any failure of the request.
        ConfigError: the scheme needs an extra that is not installed.
    """
    store = find_store(url, timeout_seconds=config.timeout_seconds)
    answer = _run(store, lambda: store.open(url, start, end), deadline=deadline, config=config)

    def read_chunks() -> Iterator[bytes]:
        while chunk := _run(store, lambda: _read_enough(answer), deadline=deadline, config=config):
            yield chunk

    try:
        yield _describe(answer.headers, start, read_chunks())
    finally:
        fsspec.asyn.get_loop().call_soon_threadsafe(answer.close)


def list_folder(url: str, *, deadline: Deadline, config: FetchConfig) -> list[Entry]:
    """What lies directly in a folder; of a file, the file.

    Raises:
        RemoteError: any failure of the request, or a server that shows no listing.
        ConfigError: the scheme needs an extra that is not installed.
    """
    store = find_store(url, timeout_seconds=config.timeout_seconds)
    return _run(store, lambda: store.list(url), deadline=deadline, config=config)


async def _read_enough(answer: Answer) -> bytes:
    """The next bytes, at least `_MIN_CHUNK_BYTES` except at the end: one timeout is for all of them."""
    chunks = [await answer.read(READ_BYTES)]
    while chunks[-1] and sum(map(len, chunks)) < _MIN_CHUNK_BYTES:
        chunks.append(await answer.read(READ_BYTES))
    return b"".join(chunks)


def _describe(headers: Mapping[str, str], start: int, chunks: Iterator[bytes]) -> Piece:
    """What the headers say of the bytes that follow them."""
    version = headers.get("etag", "").removeprefix("W/") or headers.get("last-modified", "")
    content_range = headers.get("content-range")
    if content_range is None:
        length = headers.get("content-length", "")
        size = int(length) if length.isdecimal() else None
        return Piece(0, size, size, version, chunks)
    found = _CONTENT_RANGE.fullmatch(content_range)
    if found is None or int(found[1]) != start or int(found[2]) < start:
        raise RemoteError("the server sends another range than it was asked for", passing=True)
    return Piece(start, int(found[2]) + 1, None if found[3] == "*" else int(found[3]), version, chunks)


def _run(store: Store, request: Callable[[], Awaitable[T]], *, deadline: Deadline, config: FetchConfig) -> T:
    """What `request` gives on fsspec's loop, in time or never; its errors lose their URLs."""
    seconds = min(config.timeout_seconds, deadline.left())
    if not seconds:
        raise RemoteError("the time is up", passing=True)
    try:
        result: Any = fsspec.asyn.sync(fsspec.asyn.get_loop(), request, timeout=seconds)
        return result
    except Exception as error:
        problem = _explain(store, error, seconds=seconds)
    raise problem  # not in `except`: the library's own error, with its URL, would be its context


def _explain(store: Store, error: Exception, *, seconds: float) -> RemoteError:
    if isinstance(error, RemoteError):
        return RemoteError(error.reason, passing=error.passing, status=error.status, wait_seconds=error.wait_seconds)
    if known := store.explain(error):
        return known
    if isinstance(error, TimeoutError):
        return RemoteError(f"the server sent nothing, or next to nothing, for {seconds:.3g} s", passing=True)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return RemoteError(f"the request failed with {type(error).__name__} ({where})", passing=isinstance(error, OSError))
