"""Work spread over processes that end with the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from mmfuse.errors import DataError

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def run_tasks(work: Callable[[Task], Outcome], tasks: Sequence[Task], *, jobs: int) -> Iterator[Outcome]:
    """The outcome of each task as they are done; `work` and tasks are pickled where there is more than one process.

    No more than two tasks a process are done and not yet taken, so that whoever notes them loses few when it is killed.

    Raises:
        DataError: a process died, or whatever `work` raises; tasks that have begun are finished first.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from map(work, tasks)
        return
    # Spawned: a fork copies locks that another thread holds, and nobody frees them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            waiting = iter(tasks)
            pending = {pool.submit(work, task) for task in islice(waiting, 2 * jobs)}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    pending |= {pool.submit(work, task) for task in islice(waiting, 1)}
        except BrokenProcessPool as error:
            raise DataError(
                "a process ended in the middle of its work, perhaps for want of memory; "
                "run the same command again to go on, with fewer jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Lets Ctrl-C be the parent's to handle, and ends this process when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
