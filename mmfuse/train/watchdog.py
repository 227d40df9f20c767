"""Ends a run that hangs, and says who it waits for: a collective that one rank never joins waits without a word."""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from mmfuse.errors import Stopped
from mmfuse.launch import tell_launcher

logger = logging.getLogger(__name__)

_LOOKS_PER_LIMIT = 20
_LAST_RESORT_SECONDS = 10.0


class Beat(NamedTuple):
    """How far a rank is."""

    number: int
    """Of the phases that it has entered; all ranks enter the same ones in the same order."""
    step: int
    phase: str
    seconds: float
    """Since it entered its phase, or showed there that it goes on."""
    host: str
    place: str
    """The line that its main thread is at."""
    exchanges: bool
    """Whether that line waits for other ranks, as far as can be seen."""
    age: float = 0.0
    """Seconds since its watchdog wrote this."""


class Watchdog:
    """A thread that looks whether its rank's training goes on."""

    def __init__(self, store: Store, *, rank: int, world_size: int, limit_seconds: float, folder: Path) -> None:
        """Begins to look.

        Args:
            store: shared by all ranks.
            limit_seconds: longest time in one phase.
            folder: where stacks are written.
        """
        self._store, self._rank, self._world_size = store, rank, world_size
        self._limit, self._folder = limit_seconds, folder
        self._number, self._step, self._phase = 0, 0, "start"
        self._since = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def phase(self, name: str, *, step: int | None = None) -> Iterator[None]:
        """What the rank does inside; afterwards it is between phases."""
        self._enter(name, step)
        yield
        self._enter("between phases", step)

    def _enter(self, name: str, step: int | None) -> None:
        self._number, self._phase = self._number + 1, name
        self._step = self._step if step is None else step
        self.beat()

    def beat(self) -> None:
        """Shows in a long phase that it goes on."""
        self._since = time.monotonic()

    def close(self) -> None:
        """Training is over."""
        self._closed.set()

    def _watch(self) -> None:
        interval = self._limit / _LOOKS_PER_LIMIT
        while not self._closed.wait(interval):
            waited = time.monotonic() - self._since
            beat = Beat(self._number, self._step, self._phase, waited, socket.gethostname(), *_main_thread_place())
            with suppress(RuntimeError):  # rank 0, which keeps the store, may be gone
                self._store.set(f"beat {self._rank}", json.dumps([*beat[:-1], time.time()]))
            if waited > self._limit:
                self._closed.wait(3 * interval)  # until the others have written too
                if not self._closed.is_set() and time.monotonic() - self._since > self._limit:
                    self._end()

    def _end(self) -> None:
        """Says what is known, and ends the process: nothing else can interrupt a collective."""
        tell_launcher(Stopped.exit_code)
        grace = self._limit / _LOOKS_PER_LIMIT
        # Whatever hangs below too, such as the file system that all wait for: the process ends.
        last_resort = threading.Timer(2 * grace + _LAST_RESORT_SECONDS, os._exit, [Stopped.exit_code])
        last_resort.daemon = True
        last_resort.start()
        with suppress(RuntimeError):
            beats = self._read_beats()
            alive = [rank for rank, beat in beats.items() if beat and beat.age < self._limit / 4]
            if self._rank == min(alive, default=self._rank):
                logger.error("%s\n  stacks: %s", describe_hang(beats, self._limit), self._folder / "hang.rank*.txt")
        with suppress(OSError), open(self._folder / f"hang.rank{self._rank}.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # The launcher kills all when one ends, and the store ends with rank 0: let the others write.
        time.sleep(grace if self._rank else 2 * grace)
        os._exit(Stopped.exit_code)

    def _read_beats(self) -> dict[int, Beat | None]:
        beats: dict[int, Beat | None] = {}
        for rank in range(self._world_size):
            beats[rank] = None
            if self._store.check([key := f"beat {rank}"]):
                *beat, written = json.loads(self._store.get(key))
                beats[rank] = Beat(*beat, age=time.time() - written)
        return beats


def describe_hang(beats: Mapping[int, Beat | None], limit_seconds: float) -> str:
    """Who keeps the others waiting, and where each rank is; ranks at one place stand in one line."""
    silent = [rank for rank, beat in beats.items() if beat is None or beat.age > limit_seconds / 4]
    known = {rank: beat for rank, beat in beats.items() if beat is not None}
    heard = {rank: beat for rank, beat in known.items() if rank not in silent}
    least = min((beat.number for beat in heard.values()), default=0)
    behind = [rank for rank, beat in heard.items() if beat.number == least]
    busy = [rank for rank, beat in heard.items() if not beat.exchanges]
    if silent:
        verdict = f"rank {_join(silent)} is silent: its process is stopped or its host is gone"
    elif len(behind) < len(beats):
        verdict = f"rank {_join(behind)} keeps the others waiting, in: {known[behind[0]].phase}"
    elif len(busy) < len(beats) and busy:
        verdict = f"rank {_join(busy)} keeps the others waiting, in: {known[busy[0]].phase}, {known[busy[0]].place}"
    else:
        verdict = f"all ranks are in the same phase ({known[behind[0]].phase}): the network, or a collective, hangs"
    places: dict[tuple[int, str, str], list[int]] = {}
    for rank, beat in known.items():
        places.setdefault((beat.step, beat.phase, beat.place), []).append(rank)
    lines = [
        f"  rank {_join(ranks)} (on {known[ranks[0]].host}): step {step}, {phase}, at {place}, "
        f"for {known[ranks[0]].seconds:.0f} s"
        for (step, phase, place), ranks in sorted(places.items())
    ]
    head = f"no progress for {limit_seconds:.0f} s (train.hang_seconds), ending. {verdict}"
    return "\n".join([head, *lines])


def _main_thread_place() -> tuple[str, bool]:
    """Its innermost line of Python, and whether that is in torch's exchanges between ranks or its backward."""
    identity = threading.main_thread().ident
    frame = sys._current_frames().get(identity) if identity else None
    innermost = [*traceback.extract_stack(frame)][-2:] if frame else []
    if not innermost:
        return "unknown", False
    exchanges = any("torch/distributed/" in line.filename or "run_backward" in line.name for line in innermost)
    last = innermost[-1]
    return f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno} ({last.name})", exchanges


def _join(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
