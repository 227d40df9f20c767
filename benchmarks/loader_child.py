"""Delivers one epoch of one system in this process and prints what it cost as JSON.

python -m benchmarks.loader_child SYSTEM raw|decode NUM_WORKERS measure|verify FOLDER [FOLDER ...]
"""

import gc
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma  # NumPy loads both at their first use, 40 ms; imports are not measured
import numpy.random
import torch
import xxhash

from benchmarks.loader_systems import SEED, SYSTEMS, Job, open_bare
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


def consume(batch: Any, job: Job) -> tuple[int, int]:
    """Samples and size of a batch, which touches every value of it."""
    columns = columns_of(batch, job)
    return len(columns[0]), sum(map(size_of, columns))


def measure(system: str, job: Job) -> dict[str, float]:
    """Cost of one whole epoch until its workers have ended, of opening, and of the bare calls; count and size.

    Without workers, every batch is followed by one of the bare calls: a machine whose speed changes from second to
    second slows both, and their ratio means something.
    """
    count = size = 0
    bare_cpu = bare_wall = 0.0
    bare = iter([] if job.num_workers else open_bare(job, seed=SEED + 1))  # not what the system has just read
    begin = read_clock()
    loader = SYSTEMS[system](job)
    opened = read_clock()
    for batch in loader:
        samples, values = consume(batch, job)
        count, size = count + samples, size + values
        cpu, wall = time.thread_time(), time.perf_counter()  # of this thread: a system's own may go on meanwhile
        if reference := next(bare, None):
            consume(reference, job)
            bare_cpu, bare_wall = bare_cpu + time.thread_time() - cpu, bare_wall + time.perf_counter() - wall
    if job.num_workers:
        del loader
        gc.collect()  # 80 ms
        for worker in multiprocessing.active_children():
            worker.join()  # only then the operating system counts its time
    both, opening = read_clock().since(opened), opened.since(begin)
    return {
        "samples": count,
        "size": size,
        "cpu": both.cpu_seconds - bare_cpu,
        "wall": both.wall_seconds - bare_wall,
        "bare_cpu": bare_cpu,
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
