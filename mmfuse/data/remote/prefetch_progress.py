"""How far the ranks of a node are: one number for each, in a small file that all of them have in memory."""

import hashlib
from pathlib import Path

import numpy as np

from mmfuse.errors import DataError


class Progress:
    """The last step that each local rank has finished; -1 before the first."""

    def __init__(self, path: Path) -> None:
        """Opens the file that `create` made.

        Raises:
            DataError: no such file.
        """
        try:
            self._steps = np.memmap(path, np.int64, mode="r+")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not there; it comes with the prefetcher, which must be started first") from error

    @classmethod
    def create(cls, path: Path, *, num_ranks: int) -> "Progress":
        """A new file for so many ranks; who has an older one open writes into nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        np.full(num_ranks, -1, np.int64).tofile(temporary)
        temporary.replace(path)
        return cls(path)

    def report(self, slot: int, step: int) -> None:
        """Says that a local rank has finished a step, which it will not read for again."""
        self._steps[slot] = step  # 8 aligned bytes: a reader never sees half of them

    def slowest(self) -> int:
        """The last step that all ranks have finished."""
        return int(self._steps.min())


def owner_of(progress: Path) -> str:
    """The name under which a run's prefetcher owns files of the cache; every rank of the node finds the same."""
    return hashlib.blake2b(str(progress.resolve()).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
