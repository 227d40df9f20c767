"""`mmfuse train` in which something goes wrong on the last rank: faulty_run.py FAULT STEP RUN [--set ...].

FAULT: `nan` (its loss), `hang_in_data`, `hang_in_step` (before an exchange that others wait in), `full_disk`.
"""

import os
import sys
import time

import torch

from mmfuse.cli import main
from mmfuse.task import Task
from mmfuse.train import data, saver

fault, at, *arguments = sys.argv[1:]
is_odd = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
is_first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
forward, load_batches, write_parts = Task.forward, data.load_batches, saver.write_parts


def fail_forward(task, batch, seen=None):
    output = forward(task, batch, seen)
    if batch.step == int(at) and fault == "nan":
        return output._replace(loss=output.loss * torch.nan)
    return output


def hang_forward(task, batch, seen=None):
    if batch.step == int(at):
        time.sleep(1000)
    return forward(task, batch, seen)


def hang_data(*args, **kwargs):
    for batch in load_batches(*args, **kwargs):
        if batch.step == int(at):
            time.sleep(1000)
        yield batch


def fill_disk(folder, *args, **kwargs):
    if f"{int(at):08d}" in folder.name:
        raise OSError(28, "No space left on device")
    return write_parts(folder, *args, **kwargs)


if is_odd and is_first_try:
    match fault:
        case "nan":
            Task.forward = fail_forward
        case "hang_in_step":
            Task.forward = hang_forward
        case "hang_in_data":
            data.load_batches = hang_data
        case "full_disk":
            saver.write_parts = fill_disk
raise SystemExit(main(["train", *arguments]))
