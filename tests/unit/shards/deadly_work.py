"""Work whose items say what becomes of the process that takes them up."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class DeadlyJob(NamedTuple):
    """Items by their fate: well, segfault, killed, hang, killed_once (with a file that remembers), raise."""

    name: str
    fates: tuple[str, ...]
    memory: Path
    delay: float = 0.0


def do_deadly(job: DeadlyJob, skip: frozenset[int], mark: Callable[[int], None]) -> list[str]:
    """Name and number of every item that was survived."""
    time.sleep(job.delay)
    survived = []
    for item, fate in enumerate(job.fates):
        if item in skip:
            continue
        mark(item)
        _meet(fate, job.memory / f"{job.name}.{item}")
        survived.append(f"{job.name}{item}")
    return survived


def die_before_any_item(job: str, skip: frozenset[int], mark: Callable[[int], None]) -> None:
    """Kills its process with nothing in hand."""
    os.kill(os.getpid(), signal.SIGKILL)


def _meet(fate: str, memory: Path) -> None:
    if fate == "segfault":
        ctypes.string_at(0)
    elif fate == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        while True:
            time.sleep(1)
    elif fate == "killed" or (fate == "killed_once" and not memory.exists()):
        memory.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate == "raise":
        raise KeyError("a mistake of ours")
