"""Delivers one epoch of one system in this process and prints what it cost as JSON.

python -m benchmarks.loader_child SYSTEM raw|decode NUM_WORKERS measure|verify FOLDER [FOLDER ...]
"""

import gc
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks.loader_systems import SYSTEMS, Job
from benchmarks.measure import read_clock


def columns_of(batch: Any, job: Job) -> list[Any]:
    """A batch's values by extension, whether it came as a list of samples or as columns."""
    if isinstance(batch, dict):
        return [batch[extension] for extension in job.extensions]
    return [[sample[extension] for sample in batch] for extension in job.extensions]


def size_of(column: Any) -> int:
    """Bytes of raw members; characters, pixels or frames of decoded ones."""
    if isinstance(column, torch.Tensor):
        return column.numel()
    if isinstance(column[0], np.ndarray):
        return sum([value.size for value in column])
    if isinstance(column[0], torch.Tensor):
        return sum([value.numel() for value in column])
    return sum(map(len, column))


def measure(system: str, job: Job) -> dict[str, float]:
    """Cost of opening, and of one whole epoch until its workers have ended; count and size of what came."""
    count = size = 0
    begin = read_clock()
    loader = SYSTEMS[system](job)
    opened = read_clock()
    for batch in loader:
        columns = columns_of(batch, job)
        count += len(columns[0])
        size += sum(map(size_of, columns))
    del loader
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.join()  # only then the operating system counts its time
    cost = read_clock().since(opened)
    opening = opened.since(begin)
    return {"samples": count, "size": size, "cpu": cost.cpu_seconds, "wall": cost.wall_seconds} | {
        "open_cpu": opening.cpu_seconds,
        "open_wall": opening.wall_seconds,
    }


def verify(system: str, job: Job) -> dict[str, float]:
    """Count, and the sum of digests over all samples of an epoch."""
    count = checksum = 0
    for batch in SYSTEMS[system](job):
        for row in zip(*columns_of(batch, job), strict=True):
            count += 1
            checksum = (checksum + xxhash.xxh3_64_intdigest(b"|".join(map(_bytes, row)))) % 2**64
    return {"samples": count, "checksum": checksum}


def _bytes(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    return value.encode() if isinstance(value, str) else bytes(value)


def main() -> None:
    """One line of JSON: a result per folder."""
    system, mode, num_workers, action, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    results = []
    for folder in map(Path, folders):
        extensions = tuple(json.loads((folder / "manifest.json").read_text())["extensions"])
        job = Job(folder, extensions, decode=mode == "decode", num_workers=int(num_workers))
        results.append((measure if action == "measure" else verify)(system, job))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
