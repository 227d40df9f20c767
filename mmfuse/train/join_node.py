"""Lets a node start only with the present start of node 0: `python -m mmfuse.train.join_node IP PORT MACHINE_RANK`.

The launchers of all nodes meet in a store that node 0's keeps. It lives until that launcher has ended. A node that has
ended earlier and starts again would find the old answers in it, and wait for ranks that are gone (torch 2.11).
"""

import logging
import os
import socket
import sys
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[reportPrivateImportUsage]

from mmfuse.errors import LaunchError, MmfuseError, Stopped
from mmfuse.launch import stop_is_asked
from mmfuse.log import set_up_logging

logger = logging.getLogger("mmfuse.train.join_node")  # where it runs by itself, __name__ is another

_LIMIT_SECONDS = 3600.0
"""Ranks of an earlier start may hang for `train.hang_seconds`, half of it."""
_BETWEEN_LINES_SECONDS, _BETWEEN_LOOKS_SECONDS = 60.0, 0.5


def join_node(host: str, port: int, machine_rank: int, *, limit_seconds: float = _LIMIT_SECONDS) -> None:
    """Returns once node 0 keeps a store in which ranks of this node have not met others yet.

    Raises:
        LaunchError: there is none for so long.
        Stopped: this node was asked to.
    """
    began, said = time.monotonic(), 0.0
    while missing := _find_missing(host.strip("[]"), port, machine_rank):
        waited = time.monotonic() - began
        text = f"node {machine_rank} waits for node 0 at {host}:{port} since {waited:.0f} s: {missing}"
        if stop_is_asked():
            raise Stopped(f"stopped on request: {text}")
        if waited > limit_seconds:
            raise LaunchError(text)
        if waited - said > _BETWEEN_LINES_SECONDS:
            logger.warning("%s", text)
            said = waited
        time.sleep(_BETWEEN_LOOKS_SECONDS)


def note_meeting() -> None:
    """Leaves word in the launchers' store that ranks of this node have met those of the others."""
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1 and os.environ["LOCAL_RANK"] == "0":
        store = _open_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store.set(_key(int(os.environ["GROUP_RANK"])), "met")


def _find_missing(host: str, port: int, machine_rank: int) -> str:
    """Empty where nothing is."""
    try:
        socket.create_connection((host, port), timeout=10).close()  # the store's own client would complain aloud
        return "its last start has not ended" if _open_store(host, port).check([_key(machine_rank)]) else ""
    except (OSError, UnicodeError, DistError) as error:
        return f"nothing answers ({error})"


def _open_store(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


def _key(machine_rank: int) -> str:
    return f"mmfuse machine {machine_rank}"


def main() -> int:
    """Returns the exit code."""
    host, port, machine_rank = sys.argv[1:]
    set_up_logging()
    try:
        join_node(host, int(port), int(machine_rank))
    except MmfuseError as error:  # the script hears nothing of it: it may try again
        logger.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
