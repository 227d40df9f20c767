"""Storage that fails while a run writes checkpoints: real file systems, full or read-only."""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from shutil import disk_usage

import pytest
from helpers import small_disk, write_data_set, write_tiny_run
from torch import Tensor
from unit.train.tiny_runs import read_metrics, train_tiny

from mmfuse.errors import CheckpointError
from mmfuse.train.checkpoint import CHECKPOINTS, complete_checkpoints, verify_checkpoint
from mmfuse.train.metrics import MetricsWriter

FREE_BYTES = 2**18
ALL_AT_ONCE = ("train.checkpoint_every=1", "train.checkpoint_in_background=false")
"""So that one checkpoint is over before the storage changes."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The checkpoints of a run, on a file system of their own."""
    with small_disk(tmp_path / "out" / CHECKPOINTS, megabytes=8) as folder:
        yield folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_tiny_run(tmp_path, write_data_set(tmp_path / "set", modalities=("text", "image")))


def names(folder: Path) -> list[str]:
    return [checkpoint.name for checkpoint in complete_checkpoints(folder)]


def act_in_steps(monkeypatch: pytest.MonkeyPatch, actions: Mapping[int, Callable[[], object]]) -> None:
    """Does something at the end of steps, before their checkpoints."""
    steps, end_step = count(1), MetricsWriter.end_step

    def act(metrics: MetricsWriter, grad_norm: Tensor) -> None:
        actions.get(next(steps), lambda: None)()
        end_step(metrics, grad_norm)

    monkeypatch.setattr(MetricsWriter, "end_step", act)


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on_until_there_is_room(
    run: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    filler = disk / "somebody else's"

    def fill() -> None:
        free = disk_usage(disk).free
        filler.write_bytes(bytes(free - FREE_BYTES))

    act_in_steps(monkeypatch, {2: fill, 4: filler.unlink})
    train_tiny(run, disk.parent, *ALL_AT_ONCE)
    errors = [line for line in capfd.readouterr().err.splitlines() if " ERROR " in line]
    assert [error.partition(" was not written")[0][-1] for error in errors] == ["2", "3"]
    assert all("No space left" in error and "make room in" in error for error in errors)
    assert names(disk) == ["step_00000001", "step_00000004"]
    assert len(read_metrics(disk.parent, "loss")) == 4
    for checkpoint in complete_checkpoints(disk):
        verify_checkpoint(checkpoint, contents=True)


def test_storage_that_becomes_read_only_keeps_the_old_checkpoints_and_ends_the_run_with_an_error(
    run: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def protect() -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    act_in_steps(monkeypatch, {3: protect})
    with pytest.raises(CheckpointError, match=r"step 4 was not written: .*Read-only file system"):
        train_tiny(run, disk.parent, *ALL_AT_ONCE)
    assert names(disk) == ["step_00000001", "step_00000002"]
    assert len(read_metrics(disk.parent, "loss")) == 4
