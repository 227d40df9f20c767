"""Shard caches of three small files for tests, and other owners that can be killed."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from mmfuse.data.remote.cache import FileUse, ShardCache

FILE_BYTES = 10
OWN_FILES = {"owners", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.lock"}


def join_cache(folder: Path, *, owner: str = "me", budget: int = 3 * FILE_BYTES) -> ShardCache:
    return ShardCache(folder, budget_bytes=budget, owner=owner)


def use(name: str, first_step: int, last_step: int | None = None, *, size: int = FILE_BYTES) -> FileUse:
    return FileUse(name, size, first_step, first_step if last_step is None else last_step)


def fetch(cache: ShardCache, name: str) -> bool:
    """Does what a download does; whether there was room for it."""
    if not cache.reserve(name, FILE_BYTES):
        return False
    cache.temporary(name).write_text(f"{name:>{FILE_BYTES}}")
    cache.publish(name)
    return True


def files_in(folder: Path) -> set[str]:
    """All that is in a cache but what it needs for itself."""
    return set(os.listdir(folder)) - OWN_FILES


def bytes_in(folder: Path) -> int:
    """Bytes of all copies, whole or not."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # evicted a moment ago
            total += entry.stat().st_size if entry.name not in OWN_FILES else 0
    return total


def start_other(folder: Path, act: Callable[[ShardCache], object]) -> BaseProcess:
    """The owner `other`, in a process of its own that has done something and now does nothing, to be killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def live() -> None:
        cache = join_cache(folder, owner="other")
        act(cache)
        ready.set()
        time.sleep(60)

    process = context.Process(target=live, daemon=True)
    process.start()
    assert ready.wait(30)
    return process
