"""Rows on disk while shards are built from them: read by number, in the order in which they are written to shards.

Beside the rows it holds 8 bytes a row in memory for a moment and a number a row on disk, never the rows themselves.
"""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from mmfuse.hashing import hash_int
from mmfuse.shards.rows import Problem, Row, dump_row, parse_row

_ROWS, _STARTS = "rows.jsonl", "rows.npy"
_BUFFER_BYTES = 1 << 20


class RowOrder(NamedTuple):
    """How rows are dealt to splits and mixed."""

    seed: int
    shuffle: bool
    validation_ratio: float


class RowCounts(NamedTuple):
    """What went into a store."""

    rows: int
    """All that were read, also those that are left out."""
    stored: int
    hash: str
    """Of the stored rows."""


class RowStore:
    """The rows in a folder that `RowWriter` filled."""

    def __init__(self, folder: Path) -> None:
        """Opens the files; closes them in `close`."""
        self.folder = folder
        self._file = open(folder / _ROWS, "rb")  # noqa: SIM115  # closed by `close`
        self._starts = np.load(folder / _STARTS, mmap_mode="r")

    def __enter__(self) -> "RowStore":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: int) -> Row:
        start, end = self._starts[place : place + 2].tolist()
        return parse_row(os.pread(self._file.fileno(), end - start, start))

    def order(self, split: str) -> np.ndarray:
        """int64: the places of a split's rows, in the order in which they are written."""
        return np.load(self.folder / f"{split}.npy", mmap_mode="r")


class RowWriter:
    """Fills a new folder with rows and then decides their order; counts all rows, keeps those that are whole."""

    def __init__(self, folder: Path) -> None:
        """Creates the folder, which must not be there."""
        folder.mkdir(parents=True)
        self.folder, self.rows = folder, 0
        self._file = open(folder / _ROWS, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115  # closed by `finish`
        self._ends, self._keys = array("Q", [0]), array("Q")
        self._hash = xxhash.xxh3_128()

    def add(self, row: Row) -> None:
        """Keeps the row if a sample can come of it."""
        self.rows += 1
        if row.is_whole:
            line = dump_row(row)
            self._file.write(line)
            self._hash.update(line)
            self._ends.append(self._ends[-1] + len(line))
            self._keys.append(hash_int(row.key))

    def finish(self, order: RowOrder) -> tuple[RowCounts, list[Problem]]:
        """Writes the order of both splits; of rows with one key the first stays, the others are told as problems."""
        self._file.close()
        np.save(self.folder / _STARTS, np.frombuffer(self._ends, np.uint64).astype(np.int64))
        keys = np.frombuffer(self._keys, np.uint64)
        kept = np.ones(len(keys), bool)
        problems = []
        with RowStore(self.folder) as store:
            for first, again in _find_twins(keys):
                row, twin = store[first], store[again]
                if row.key == twin.key:
                    kept[again] = False
                    reason = f"has the key {row.key!r} of row {row.number}"
                    problems.append(Problem(twin.number, "", "", reason))
        chosen = _choose_validation(keys, order)
        for split, places in (("train", np.flatnonzero(kept & ~chosen)), ("validation", np.flatnonzero(kept & chosen))):
            np.save(self.folder / f"{split}.npy", _mix(places, split, order))
        return RowCounts(self.rows, int(kept.sum()), f"xxh3:{self._hash.hexdigest()}"), problems


def _find_twins(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """`(first, later)` places whose hashes are the same, which nearly always means: their keys."""
    by_key = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[by_key[1:]] == keys[by_key[:-1]]) + 1
    firsts = np.arange(len(keys))
    firsts[again] = 0
    firsts = np.maximum.accumulate(firsts)
    for later in again:
        yield int(by_key[firsts[later]]), int(by_key[later])


def _choose_validation(keys: np.ndarray, order: RowOrder) -> np.ndarray:
    """Which rows are validated on: a function of seed and key alone, so that a longer table moves none of them."""
    salt = np.uint64(hash_int(order.seed, "validation"))
    mixed = (keys ^ salt) * np.uint64(0x9E3779B97F4A7C15)  # the upper bits of the product depend on all of the key
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < order.validation_ratio


def _mix(places: np.ndarray, split: str, order: RowOrder) -> np.ndarray:
    """The places, shuffled by the seed; sorted random numbers are the same in every NumPy, its own shuffle may not."""
    if not order.shuffle:
        return places
    numbers = np.random.Philox(key=hash_int(order.seed, "order", split)).random_raw(len(places))
    return places[np.argsort(numbers, kind="stable")]
