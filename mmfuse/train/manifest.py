"""The manifest of a checkpoint: size and checksum of its files. Written last, it makes a checkpoint complete."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST, STATE, RUN = "manifest.json", "state.json", "run.yaml"
Fingerprints = dict[str, dict[str, Any]]
"""Size and checksum of files, by their path within a checkpoint."""
_BLOCK_BYTES = 2**20


def write_manifest(folder: Path, files: Fingerprints) -> None:
    """Completes the checkpoint that a folder holds."""
    (folder / MANIFEST).write_text(json.dumps(dict(sorted(files.items())), indent=1))


def parse_manifest(text: bytes) -> Fingerprints:
    """What `write_manifest` wrote.

    Raises:
        ValueError: it is cut off, or is none.
    """
    files = json.loads(text)
    try:
        _ = {name: fingerprint["bytes"] for name, fingerprint in files.items()}, files[STATE], files[RUN]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a manifest") from error
    if any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in files):
        raise ValueError("names a file outside of its folder")
    return files


def ignore_count(_: int) -> None:
    """Hears how many bytes were read, for those who do not care."""


def store_file(path: Path) -> dict[str, Any]:
    """Makes sure that a file is on the disk; gives its fingerprint."""
    sync(path)
    return fingerprint_of(path)


def fingerprint_of(path: Path, on_read: Callable[[int], object] = ignore_count) -> dict[str, Any]:
    """Size and checksum of a file; `on_read` is told how many bytes were read, each time that some were."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            on_read(len(block))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def sync(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
