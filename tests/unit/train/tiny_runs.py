"""Runs of four steps in this process, and what a kill leaves of one."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmfuse.train.run import load_run
from mmfuse.train.state_files import StoredState
from mmfuse.train.trainer import train

FOUR_STEPS = ("train.steps=4", "train.checkpoint_every=2", "train.log_every=1")


def train_tiny(run: Path, output: Path, *settings: str) -> Path:
    """Trains a tiny run for four steps, or continues it, with these settings; returns its folder."""
    return train(load_run(str(run), overrides=[*FOUR_STEPS, f"output_dir={output}", *settings]))


def killed_after_step_2(whole: Path, folder: Path) -> Path:
    """A copy of a finished run as if it had been killed just before its last checkpoint: that of step 2 is left."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    return folder


def stored_state(folder: Path, *, step: int = 4) -> StoredState:
    """What the run's checkpoint of this step holds."""
    return StoredState(folder / "checkpoints" / f"step_{step:08d}")


def assert_same_state(first: StoredState, second: StoredState) -> None:
    """Kinds, names and all values are equal to the last bit."""
    assert first.kinds == second.kinds != ()
    for kind in first.kinds:
        expected, found = first.whole(kind), second.whole(kind)
        assert found.keys() == expected.keys()
        assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == [], kind


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(folder: Path, *names: str) -> list[tuple[float, ...]]:
    """These numbers of every step, in order."""
    return [tuple(line[name] for name in ("step", *names)) for line in read_lines(folder / "metrics.jsonl")]
