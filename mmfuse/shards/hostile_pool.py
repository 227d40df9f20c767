"""Processes for work on hostile bytes: one that crashes, hangs or runs out of memory costs the item in its hand.

Decoders are C code. A picture that makes one crash must be named, and the other members of the data set still be read.
So every worker says in shared memory which item it takes up; where it dies, or takes too long over one, the item gets a
second chance in a new process, and is then given up. Results come in the order of the jobs, whoever was faster.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from ctypes import Array, c_longlong
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from mmfuse.errors import DataError, MmfuseError

J = TypeVar("J")
R = TypeVar("R")
NOTHING = -1
"""What a worker marks while it has no item in its hand: no time limit then."""
Mark = Callable[[int], None]
Work = Callable[[J, frozenset[int], Mark], R]
"""Does a job without the items given, and marks each of the others, a number >= 0, before it takes it up."""
_JOBS_AHEAD = 4
"""A worker's share of the results that may wait for a slower one before them."""
_MAX_IDLE_DEATHS = 3


class Lost(NamedTuple):
    """An item that was given up."""

    item: int
    kind: Literal["crashed", "too_slow"]
    message: str


class Outcome(NamedTuple, Generic[J, R]):
    """What came of one job."""

    job: J
    result: R
    lost: tuple[Lost, ...]
    """Items that the result is without, in their order."""


def run_jobs(
    jobs: Iterable[J], work: Work[J, R], *, num_workers: int, item_seconds: float, preload: tuple[str, ...] = ()
) -> Iterator[Outcome[J, R]]:
    """The outcome of every job, in the order of the jobs.

    Args:
        work: is sent to each process; must pickle.
        item_seconds: longest time over one item.
        preload: modules that are imported once for all processes; the first call in a process decides.

    Raises:
        DataError: processes die again and again before they take up an item.
        MmfuseError: as `work` raised it; RuntimeError with its traceback for all else that it raises.
    """
    crew = _Crew(work, item_seconds=item_seconds, preload=preload)
    numbered = enumerate(jobs)
    waiting: dict[int, Outcome[J, R]] = {}
    due = started = 0
    try:
        while True:
            while crew.wants_job(num_workers) and started < due + _JOBS_AHEAD * num_workers:
                task = next(numbered, None)
                if task is None:
                    break
                crew.give(_Task(*task))
                started += 1
            if due == started:
                return
            for number, outcome in crew.gather():
                waiting[number] = outcome
            while due in waiting:
                yield waiting.pop(due)
                due += 1
    finally:
        crew.stop()


@dataclass
class _Task(Generic[J]):
    """A job with what is known of it."""

    number: int
    job: J
    suspects: set[int] = field(default_factory=set)
    """Items that a process died over, once."""
    lost: list[Lost] = field(default_factory=list)
    idle_deaths: int = 0


@dataclass
class _Worker:
    """One process, seen from outside."""

    process: ForkServerProcess
    connection: Connection
    cell: Array[c_longlong]
    """The item in hand, and how many were marked before it."""
    task: _Task | None = None
    marks: int = 0
    since: float = 0.0
    """When `marks` was first seen."""


class _Crew(Generic[J, R]):
    """Workers and their tasks."""

    def __init__(self, work: Work[J, R], *, item_seconds: float, preload: tuple[str, ...]) -> None:
        self.work, self.item_seconds = work, item_seconds
        self.workers: list[_Worker] = []
        self.again: deque[_Task[J]] = deque()
        # Not forked from here, where threads may run; not spawned, for each would import torch anew, for seconds.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*preload, __name__])

    def wants_job(self, num_workers: int) -> bool:
        """Whether a worker is idle, or one more may be started, and nothing waits to be done again."""
        busy = sum(worker.task is not None for worker in self.workers)
        return busy + len(self.again) < num_workers

    def give(self, task: _Task[J]) -> None:
        """Starts a task on an idle worker, or on a new one."""
        worker = next((worker for worker in self.workers if worker.task is None), None) or self._start()
        worker.task, worker.marks, worker.since = task, worker.cell[1], time.monotonic()
        with suppress(OSError):  # it died meanwhile, which `gather` sees
            worker.connection.send((task.job, frozenset(lost.item for lost in task.lost)))

    def gather(self) -> list[tuple[int, Outcome[J, R]]]:
        """Jobs that are done, with their numbers, after a short wait; buries the dead."""
        while self.again:
            self.give(self.again.popleft())
        busy = {worker.connection: worker for worker in self.workers if worker.task is not None}
        done = []
        for connection in wait(list(busy), timeout=min(0.5, self.item_seconds / 4)):
            worker = busy[connection]  # type: ignore[index]  # typed as any waitable object
            task = worker.task
            assert task is not None
            try:
                result, error = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if error:
                raise error
            worker.task = None
            done.append((task.number, Outcome(task.job, result, tuple(sorted(task.lost)))))
        for worker in self.workers:
            self._stop_if_slow(worker)
        return done

    def stop(self) -> None:
        """Ends all processes, whatever they do."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()
        self.workers.clear()

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        cell = self.context.RawArray("q", [NOTHING, 0])
        process = self.context.Process(target=_serve, args=(theirs, cell, self.work), daemon=True)
        process.start()
        theirs.close()  # or its death would not end the stream
        self.workers.append(_Worker(process, ours, cell))
        return self.workers[-1]

    def _stop_if_slow(self, worker: _Worker) -> None:
        now, item, marks = time.monotonic(), worker.cell[0], worker.cell[1]
        if worker.task is None or marks != worker.marks or item == NOTHING:
            worker.marks, worker.since = marks, now
        elif now - worker.since > self.item_seconds:
            worker.process.kill()
            self._bury(worker, slow=True)

    def _bury(self, worker: _Worker, *, slow: bool = False) -> None:
        """Removes a dead worker; its task starts again, without the item that was in its hand the second time."""
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)
        task, item, code = worker.task, worker.cell[0], worker.process.exitcode
        assert task is not None
        self.again.append(task)
        if item == NOTHING:
            task.idle_deaths += 1
            if task.idle_deaths == _MAX_IDLE_DEATHS:
                raise DataError(f"processes that read data die before they read any: {_describe_end(code)}")
        elif item not in task.suspects:
            task.suspects.add(item)
        elif slow:
            task.lost.append(Lost(item, "too_slow", f"took more than {self.item_seconds:g} s, twice"))
        else:
            task.lost.append(Lost(item, "crashed", f"the process that read it died, twice: {_describe_end(code)}"))


def _describe_end(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, as the kernel sends when memory runs out" if name == "SIGKILL" else name


def _serve(connection: Connection, cell: Array[c_longlong], work: Work[J, R]) -> None:
    """The life of a worker: job after job, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    _become_first_victim()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write a line for every bad frame

    def mark(item: int) -> None:
        cell[0], cell[1] = item, cell[1] + 1

    while True:
        try:
            job, skip = connection.recv()
        except EOFError:
            return
        try:
            answer = work(job, skip, mark), None
        except MmfuseError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(f"a process failed:\n{traceback.format_exc()}")
        cell[0] = NOTHING
        connection.send(answer)


def _become_first_victim() -> None:
    """Tells the kernel which process to kill when memory runs out: this one, not the parent."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
