"""`mmfuse train` in which something goes wrong on the last rank: faulty_run.py FAULT:STEP[,FAULT:STEP] RUN [--set ...].

FAULT: `nan` (its loss), `spike` (its loss, from there on until the run has rolled back), `hang_in_data`,
`hang_in_step` (before an exchange that others wait in), `full_disk`, or `settings` (it has others, from the start).
"""

import os
import sys
import time
from collections.abc import Iterator
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


def fill_disk(folder: Path, *arguments, **settings) -> Path:
    if f"{STEPS['full_disk']:08d}" in folder.name:
        raise OSError(28, "No space left on device")
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
    if "full_disk" in STEPS:
        saver.write_parts = fill_disk
    if "settings" in STEPS:
        sys.argv += ["--set", "optimizer.learning_rate=1e-5"]
raise SystemExit(main(["train", *sys.argv[2:]]))
