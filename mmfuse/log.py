"""Logging set up once: sentences on stderr, from rank 0 unless a message is about another rank."""

import logging
import sys

from tqdm import tqdm


class _TqdmHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(*, rank: int = 0) -> None:
    """Sends our messages to stderr; ranks other than 0 report warnings only, with their rank in front."""
    handler = _TqdmHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("mmfuse")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ours.propagate = False


def hide_bar(rank: int) -> bool | None:
    """For tqdm's `disable`: bars are for rank 0 and (None) for a terminal; a job's log has the lines instead."""
    return None if rank == 0 else True
