"""Remote shards to local files: in pieces, over broken connections, checked at the end."""

import contextlib
import logging
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from mmfuse.data.remote.request import FetchConfig, Piece, open_piece
from mmfuse.data.remote.retry import Deadline, RemoteError, keep_trying
from mmfuse.data.remote.urls import show_url
from mmfuse.errors import DataError, ShardError

logger = logging.getLogger(__name__)

DEFAULT_FETCH = FetchConfig()
_NO_SUCH_RANGE = 416
_EMPTY = "is empty, so no tar"
_READ_BYTES = 1 << 20
_INDEX_AGAIN = "if the change is meant, run mmfuse shards index --force on it"


class RemoteFile(NamedTuple):
    """A file behind a URL, as it was when it was asked for."""

    url: str
    """With its query; only `show_url` of it may be shown."""
    size: int
    """In bytes."""
    version: str
    """Etag, else the time of the last change, else empty."""


def stat_remote(url: str, *, config: FetchConfig = DEFAULT_FETCH) -> RemoteFile:
    """Size and version of a remote file, from the headers of its first byte: signed URLs often allow no HEAD.

    Raises:
        DataError: not found, refused, not reached within the deadline, or of unknown size.
        ConfigError: the scheme needs an extra that is not installed.
    """
    deadline, shown = Deadline(config.deadline_seconds), show_url(url)

    def attempt() -> RemoteFile:
        try:
            with open_piece(url, start=0, end=1, deadline=deadline, config=config) as piece:
                if piece.size is None:
                    raise RemoteError("the server does not say how large it is", passing=False)
                if piece.size == 0:
                    raise RemoteError(_EMPTY, passing=False)
                return RemoteFile(url, piece.size, piece.version)
        except RemoteError as error:
            if error.status == _NO_SUCH_RANGE:
                error.reason = _EMPTY
            raise

    return keep_trying(attempt, what=shown, deadline=deadline)


def download(
    file: RemoteFile, destination: Path, *, config: FetchConfig = DEFAULT_FETCH, checksum: str | None = None
) -> None:
    """Writes the file to exactly `destination`, or nothing: what is not whole and right is deleted.

    Args:
        checksum: as `checksum_of` gives it.

    Raises:
        ShardError: the file is no longer the one that `file` describes, or has another checksum, also the second time.
        DataError: refused, not received within the deadline, or the destination cannot be written.
        ConfigError: the scheme needs an extra that is not installed.
    """
    deadline, shown = Deadline(config.deadline_seconds), show_url(file.url)
    try:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(destination.unlink, missing_ok=True)
            _receive(file, destination, deadline=deadline, config=config)
            if checksum is not None and (found := checksum_of(destination)) != checksum:
                logger.warning("%s: has the checksum %s, not %s; reading it once more", shown, found, checksum)
                _receive(file, destination, deadline=deadline, config=config)
                if (found := checksum_of(destination)) != checksum:
                    raise ShardError(f"{shown}: has the checksum {found}, not {checksum}; {_INDEX_AGAIN}")
            on_failure.pop_all()
    except OSError as error:
        raise DataError(f"{destination}: cannot be written: {error.strerror}") from error


def checksum_of(path: Path) -> str:
    """`xxh3:` and the 32 hexadecimal digits of the XXH3-128 hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


def _receive(file: RemoteFile, destination: Path, *, deadline: Deadline, config: FetchConfig) -> None:
    with open(destination, "wb") as out:
        while out.tell() < file.size:
            keep_trying(
                lambda: _receive_piece(file, out, deadline=deadline, config=config),
                what=show_url(file.url),
                deadline=deadline,
            )


def _receive_piece(file: RemoteFile, out: BinaryIO, *, deadline: Deadline, config: FetchConfig) -> None:
    """Adds the next bytes; what came before an error stays, and the next attempt goes on behind it."""
    start = out.tell()
    end = min(start + config.piece_bytes, file.size)
    try:
        with open_piece(file.url, start=start, end=end, deadline=deadline, config=config) as piece:
            _check_unchanged(file, piece)
            out.seek(piece.start)
            out.truncate()
            stop = file.size if piece.end is None else piece.end
            for chunk in piece.chunks:
                if out.tell() + len(chunk) > stop:
                    out.seek(piece.start)
                    raise RemoteError("the server sends more bytes than it announced", passing=True)
                out.write(chunk)
            if out.tell() < stop:
                raise RemoteError("the body is cut off", passing=True)
    except RemoteError as error:
        if error.status == _NO_SUCH_RANGE:
            raise ShardError(f"{show_url(file.url)}: is shorter than {file.size:,} bytes; {_INDEX_AGAIN}") from None
        if out.tell():
            error.reason += f", at byte {out.tell():,} of {file.size:,}"
        raise


def _check_unchanged(file: RemoteFile, piece: Piece) -> None:
    same_version = piece.version == file.version or not (piece.version and file.version)
    if same_version and piece.size in (None, file.size):
        return
    if file.version and piece.version == file.version:
        raise RemoteError(f"the server announces {piece.size:,} bytes", passing=True)
    raise ShardError(
        f"{show_url(file.url)}: has changed since it was indexed: {file.size:,} bytes of version {file.version or '?'} "
        f"were there, now {piece.size or 0:,} of version {piece.version or '?'}; {_INDEX_AGAIN}"
    )
