"""Asks to stop: a signal of a scheduler that wants its nodes back, or a file. All ranks stop after the same step."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from mmfuse.distributed import rank
from mmfuse.launch import STOP_ASKED, launch_folder

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP = "STOP"
"""The file in a run's folder that asks for a stop; removed when it was honoured."""
_LOOKS_EVERY_SECONDS = 0.5


class StopRequest:
    """Whether somebody asked this run to stop."""

    def __init__(self, folder: Path, *, timeout_seconds: float) -> None:
        """Listens from here on; on all ranks. The time-out is that of the exchange between them."""
        self._folder = folder
        self._files = [folder / STOP] if rank() == 0 else []  # a shared file system: not every rank of hundreds asks it
        if launch := launch_folder():
            self._files.append(launch / STOP_ASKED)
        self._asked = self._agreed = False
        self._looked = -1.0
        self._owner = os.getpid()
        is_main = threading.current_thread() is threading.main_thread()  # no other may hear signals
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS if is_main}
        is_alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        # Its own group on the CPU: nothing of training waits for this exchange, nor it for training.
        self._group = (
            None if is_alone else distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        )
        self._flag = torch.zeros((), dtype=torch.int32)
        self._exchange: distributed.Work | None = None

    def agreed(self) -> bool:
        """Whether any rank was asked before the last call: the same answer on all ranks, which must all call.

        The exchange of a call is read at the next one, so that no step waits for it.
        """
        if self._group is None:
            self._agreed = self._is_asked()
            return self._agreed
        if self._exchange:
            self._exchange.wait()
            self._agreed = bool(self._flag)
        self._flag = torch.tensor(int(self._is_asked()), dtype=torch.int32)
        self._exchange = distributed.all_reduce(self._flag, distributed.ReduceOp.MAX, self._group, async_op=True)
        return self._agreed

    def close(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def honour(self) -> None:
        """The request was followed: it must not stop the next start too, but the launcher must not start by itself."""
        if rank() == 0:
            (self._folder / STOP).unlink(missing_ok=True)
        if self._agreed and (launch := launch_folder()):
            (launch / STOP_ASKED).touch()

    def _is_asked(self) -> bool:
        now = time.monotonic()
        if not self._asked and now - self._looked > _LOOKS_EVERY_SECONDS:
            self._looked = now
            self._asked = any(file.exists() for file in self._files)
        return self._asked

    def _hear(self, number: int, _: object) -> None:
        """Loader workers inherit this; they end with their parent."""
        if os.getpid() == self._owner:
            self._asked = True
