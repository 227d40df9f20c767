"""Checkpoints at a URL that fsspec can write to, for nodes without a shared file system. Buckets cannot rename folders:
the manifest alone, written last and removed first, decides whether a checkpoint is complete."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from mmfuse.config import suggest
from mmfuse.data.remote.retry import Deadline, RemoteError, keep_trying
from mmfuse.data.remote.stores import find_store
from mmfuse.data.remote.urls import check_url, show_url
from mmfuse.errors import CheckpointError, ConfigError, DataError
from mmfuse.files import format_bytes, locked
from mmfuse.hashing import hash_int
from mmfuse.train.checkpoint import (
    CHECKPOINTS,
    Keep,
    begin_checkpoint,
    complete_checkpoints,
    complete_files,
    folder_name,
    read_manifest,
    remove_unfinished,
    rename_folder,
    step_of,
    verify_checkpoint,
)
from mmfuse.train.manifest import MANIFEST, Fingerprints, fingerprint_of, parse_manifest, write_manifest

logger = logging.getLogger(__name__)

T = TypeVar("T")

COPIES = "copies"
"""The folder within a run's of checkpoints that came from its URL, until there is a newer one."""
_CACHE = Path("~/.cache/mmfuse/checkpoints")
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 2}}
"""s3fs holds so many blocks of 50 MiB in memory, and would hold 10."""
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl")
"""Have no folders; to make one would be to make a bucket."""
_LASTING = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_LASTING_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_ATTEMPTS_TO_RECEIVE = 2


class DamagedError(CheckpointError):
    """A checkpoint at a URL is not as it was written; an older one may be."""


class CheckpointStore:
    """The checkpoints of one run at its URL. Requests that fail are repeated, with growing pauses."""

    def __init__(self, url: str, *, patience_seconds: float = 300.0) -> None:
        """Asks nothing yet.

        Args:
            patience_seconds: for the attempts at one request.
        Raises:
            ConfigError: an unknown protocol, or its package is missing.
        """
        self.shown, self._patience = show_url(url), patience_seconds
        self._scheme = url.partition("://")[0]
        self._explain_known: Callable[[Exception], RemoteError | None] = lambda _: None
        if self._scheme in ("file", "s3", "gs"):
            check_url(url)
        elif self._scheme not in fsspec.available_protocols():
            raise ConfigError(f"{self.shown}: no protocol {suggest(self._scheme, fsspec.available_protocols())}")
        try:
            if self._scheme in ("s3", "gs"):
                self._explain_known = find_store(url, timeout_seconds=patience_seconds).explain
            self._files, root = url_to_fs(url, use_listings_cache=False, **_OPTIONS.get(self._scheme, {}))
        except ImportError as error:
            raise ConfigError(f"{self.shown}: a package is missing: {error}") from error
        self._root = root.rstrip("/")

    def upload(self, path: Path, name: str) -> None:
        """Copies a local file to `name` below the URL."""
        target = f"{self._root}/{name}"

        def put() -> None:
            if self._scheme not in _BUCKETS:
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target)

        self._ask(put, name)

    def publish(self, temporary: Path, written: Fingerprints, *, step: int, facts: dict[str, Any], keep: Keep) -> None:
        """Completes what all ranks uploaded, and removes what need not be kept. Rank 0 only.

        Args:
            temporary: has what no rank has uploaded.
            written: of the files of all ranks.
        Raises:
            DamagedError: a file is not there as it was uploaded.
            CheckpointError: the store refuses.
        """
        complete_files(temporary, written, facts=facts)
        files, folder = read_manifest(temporary), folder_name(step)
        for name in files.keys() - written.keys():
            self.upload(temporary / name, f"{folder}/{name}")
        self._check(step, files)
        self.upload(temporary / MANIFEST, f"{folder}/{MANIFEST}")
        try:
            self._remove_others(step, keep)
        except CheckpointError as error:  # the next checkpoint tries again
            logger.warning("an old checkpoint could not be removed: %s", error)

    def _remove_others(self, newest: int, keep: Keep) -> None:
        """Also those of later steps, from which resume would have gone on if it could, and what killed runs left."""
        kept = 0
        for step in self.steps():
            stays = keep.for_good(step) if kept >= keep.newest else bool(self._read_manifest(step))
            if step <= newest and stays:
                kept += 1
            else:
                self.remove(step)

    def remove(self, step: int) -> None:
        """The manifest first: one that is removed in part is none."""
        folder = f"{self._root}/{folder_name(step)}"

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._files.rm_file(f"{folder}/{MANIFEST}")
            with suppress(FileNotFoundError):
                self._files.rm(folder, recursive=True)

        self._ask(remove, folder_name(step))

    def steps(self) -> list[int]:
        """Of all checkpoints, whole or not, the newest first."""

        def names() -> list[str]:
            try:
                return self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return []

        found = (step_of(name.rstrip("/").rpartition("/")[2]) for name in self._ask(names, ""))
        return sorted((step for step in found if step is not None), reverse=True)

    def newest(self, *, before: int | None = None) -> tuple[int, Fingerprints] | None:
        """The newest complete checkpoint, by names and sizes, and its manifest; others are named in a warning.

        Args:
            before: older than this step.
        """
        for step in self.steps():
            if before is None or step < before:
                try:
                    return step, self.manifest(step)
                except DamagedError as error:
                    logger.warning("not used: %s", error)
        return None

    def manifest(self, step: int) -> Fingerprints:
        """Of a complete checkpoint.

        Raises:
            DamagedError: it is not complete.
        """
        try:
            files = parse_manifest(self._read_manifest(step))
        except ValueError as error:
            raise DamagedError(
                f"{self.shown}/{folder_name(step)}: no complete checkpoint (no readable {MANIFEST})"
            ) from error
        self._check(step, files)
        return files

    def download(self, step: int, files: Fingerprints, root: Path) -> Path:
        """A copy in the folder `root`, every byte compared with the checksums; one that is there is not fetched again.

        Args:
            files: the manifest.
        Raises:
            DamagedError: the checkpoint is not as it was written.
            CheckpointError: it cannot be read, or `root` not be written.
        """
        final = root / folder_name(step)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root):  # other nodes may share it
                if not _is_copy(final, files):
                    size = format_bytes(sum(fingerprint["bytes"] for fingerprint in files.values()))
                    logger.info("fetching %s/%s (%s) to %s", self.shown, final.name, size, root)
                    remove_unfinished(root)
                    temporary = begin_checkpoint(root, step)
                    for name, fingerprint in files.items():
                        self._receive(f"{final.name}/{name}", temporary / name, fingerprint)
                    write_manifest(temporary, files)
                    shutil.rmtree(final, ignore_errors=True)
                    rename_folder(temporary, final)
        except OSError as error:
            raise CheckpointError(f"{root}: cannot be written: {error}") from error
        return final

    def _receive(self, name: str, path: Path, fingerprint: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS_TO_RECEIVE):
            self._ask(lambda: self._files.get_file(f"{self._root}/{name}", str(path)), name)
            if fingerprint_of(path) == fingerprint:
                return
        raise DamagedError(f"{self.shown}/{name}: has changed since it was written (checksum)")

    def _read_manifest(self, step: int) -> bytes:
        """Nothing where there is none. Not `exists`, which of many libraries is False after any error."""
        name = f"{folder_name(step)}/{MANIFEST}"

        def read() -> bytes:
            try:
                return self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return b""

        return self._ask(read, name)

    def _check(self, step: int, files: Fingerprints) -> None:
        folder = f"{self._root}/{folder_name(step)}"
        found = self._ask(lambda: self._files.find(folder, detail=True), folder_name(step))
        sizes = {name.removeprefix(f"{folder}/"): entry["size"] for name, entry in found.items()}
        for name, fingerprint in files.items():
            if sizes.get(name) != fingerprint["bytes"]:
                where = f"{self.shown}/{folder_name(step)}/{name}"
                raise DamagedError(f"{where}: is missing or has another size than when it was written")

    def _ask(self, act: Callable[[], T], name: str) -> T:
        """What the store answers, with patience."""

        def attempt() -> T:
            try:
                return act()
            except Exception as error:  # libraries raise what they like
                problem = self._explain(error)
            raise problem

        deadline = Deadline(self._patience, setting="seconds for one request")
        try:
            return keep_trying(attempt, what=f"{self.shown}/{name}".rstrip("/"), deadline=deadline)
        except DataError as error:
            raise CheckpointError(str(error)) from error

    def _explain(self, error: Exception) -> RemoteError:
        if known := self._explain_known(error):
            return known
        lasting = isinstance(error, _LASTING) or not isinstance(error, OSError) or error.errno in _LASTING_NUMBERS
        return RemoteError(f"{type(error).__name__}: {error}", passing=not lasting)


def _is_copy(folder: Path, files: Fingerprints) -> bool:
    try:
        verify_checkpoint(folder, contents=True)
    except CheckpointError:
        return False
    return read_manifest(folder) == files


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint lies elsewhere than in a folder."""
    return "://" in str(place)


def find_checkpoint(place: str | os.PathLike[str]) -> Path:
    """The checkpoint that a user names: itself, or the newest complete one of a run's folder or URL.

    Of one at a URL a copy, which is kept in `~/.cache/mmfuse/checkpoints`.

    Raises:
        CheckpointError: the URL has no complete checkpoint, or it cannot be read.
        ConfigError: as of `CheckpointStore`.
    """
    if not is_url(place):
        path = Path(place)
        complete = complete_checkpoints(path / CHECKPOINTS) if (path / CHECKPOINTS).is_dir() else []
        return complete[-1] if complete else path
    url, _, name = str(place).rstrip("/").rpartition("/")
    step = step_of(name)
    store = CheckpointStore(str(place) if step is None else url)
    found = store.newest() if step is None else (step, store.manifest(step))
    if found is None:
        raise CheckpointError(f"{store.shown}: has no complete checkpoint")
    return store.download(*found, _CACHE.expanduser() / f"{hash_int(store.shown):016x}")
