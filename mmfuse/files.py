"""Small files that are whole or not there, and how a size is said."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file for writing that takes the place of `path` in one move, or leaves nothing where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")  # two nodes may have equal process numbers
    try:
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one move."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Alone among the processes that lock this folder; gives whether the file system knows locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_alone = False
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_alone = True
        yield is_alone
    finally:
        os.close(descriptor)


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the JSON lines up to `step`: a resumed run repeats the steps after its checkpoint."""
    if not path.is_file():
        return
    with open(path, "rb") as before, replacing(path) as after:
        for line in before:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:  # a kill may cut the last one
                after.write(line)


def format_bytes(size: float) -> str:
    """Bytes with a unit, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.3g} {unit}"
