"""`mmfuse train` in which something goes wrong on the last rank: faulty_run.py FAULT:STEP[,FAULT:STEP] RUN [--set ...].

FAULT: `nan` (its loss), `spike` (its loss, from there on until the run has rolled back), `hang_in_data`,
`hang_in_step` (before an exchange that others wait in), `full_disk` or `read_only` (the file system of the
checkpoints, while that of the step is written), or `settings` (it has others, from the start).
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from mmfuse.cli import main
from mmfuse.task import Task
from mmfuse.train import data, saver
from mmfuse.types import Batch, StepOutput

FOREVER = 1000
forward, load_batches, write_parts = Task.forward, data.load_batches, saver.write_parts


def lose_number(task: Task, batch: Batch, seen=None) -> StepOutput:
    output = forward(task, batch, seen)
    return output._replace(loss=output.loss * torch.nan) if batch.step == STEPS["nan"] else output


def spike(task: Task, batch: Batch, seen=None) -> StepOutput:
    output = forward(task, batch, seen)
    return output._replace(loss=output.loss + 100) if batch.step >= STEPS["spike"] else output


def hang_in_step(task: Task, batch: Batch, seen=None) -> StepOutput:
    if batch.step == STEPS["hang_in_step"]:
        time.sleep(FOREVER)
    return forward(task, batch, seen)


def hang_in_data(*arguments, **settings) -> Iterator[Batch]:
    for batch in load_batches(*arguments, **settings):
        if batch.step == STEPS["hang_in_data"]:
            time.sleep(FOREVER)
        yield batch


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    filler = folder / "somebody else's"
    try:
        with suppress(OSError):  # another rank was faster: it is full all the same
            filler.write_bytes(bytes(shutil.disk_usage(folder).free))
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    while subprocess.run(["mount", "-o", "remount,ro", folder], check=False, capture_output=True).returncode:
        time.sleep(0.01)  # another rank is writing a file
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


def write_to_bad_storage(folder: Path, *arguments, **settings) -> Path:
    with ExitStack() as stack:
        for fault in (full_disk, read_only):
            if f"{STEPS.get(fault.__name__, -1):08d}" in folder.name:
                stack.enter_context(fault(folder.parent))
        return write_parts(folder, *arguments, **settings)


STEPS = {fault: int(step) for fault, _, step in (word.partition(":") for word in sys.argv[1].split(","))}
if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    if "nan" in STEPS:
        Task.forward = lose_number
    if "spike" in STEPS and not list(Path(sys.argv[2]).parent.glob("*/roll_backs.json")):
        Task.forward = spike
    if "hang_in_step" in STEPS:
        Task.forward = hang_in_step
    if "hang_in_data" in STEPS:
        data.load_batches = hang_in_data
    if STEPS.keys() & {"full_disk", "read_only"}:
        saver.write_parts = write_to_bad_storage
    if "settings" in STEPS:
        sys.argv += ["--set", "optimizer.learning_rate=1e-5"]
raise SystemExit(main(["train", *sys.argv[2:]]))
