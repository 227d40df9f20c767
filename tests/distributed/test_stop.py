"""A scheduler wants its nodes back: it signals, and the run stops after a step, with a checkpoint and exit code 75."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from distributed.launches import (
    find_ranks,
    finish,
    read_losses,
    read_samples,
    start,
    wait_for_step,
    write_run,
    write_sparse_shards,
)

from mmfuse.errors import Stopped
from mmfuse.train.checkpoint import CHECKPOINTS, complete_checkpoints
from mmfuse.train.stop import STOP

STEPS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    return write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=STEPS)


def signal_script(process: subprocess.Popen[bytes], _: Path) -> None:
    """As Slurm does with `--signal=B:USR1@60`."""
    process.send_signal(signal.SIGUSR1)


def signal_everything(process: subprocess.Popen[bytes], _: Path) -> None:
    """As `scancel` does, to the launcher, all ranks and their loader workers."""
    for member in (*psutil.Process(process.pid).children(recursive=True), process):
        member.send_signal(signal.SIGTERM)


def signal_one_rank(process: subprocess.Popen[bytes], _: Path) -> None:
    find_ranks(process)[0].send_signal(signal.SIGUSR1)


def write_file(_: subprocess.Popen[bytes], output: Path) -> None:
    """As a person does, or Kubernetes' `preStop`."""
    (output / STOP).touch()


def stop(strategy: str, run: Path, output: Path, *, ask) -> int:
    """Starts a run, asks it to stop after some steps; how many it has done then."""
    done = len(read_losses(output))
    process = start(strategy, run, output, settings=["train.checkpoint_every=1000"], max_restarts=3)
    wait_for_step(process, output, step=done + 4)
    ask(process, output)
    assert process.wait(timeout=120) == Stopped.exit_code, Path(f"{output}.log").read_text(errors="replace")[-4000:]
    assert not (output / STOP).exists()
    newest = complete_checkpoints(output / CHECKPOINTS)[-1]
    step = int(newest.name.removeprefix("step_"))
    assert f"mmfuse: stopped on request after step {step} of {STEPS}" in Path(f"{output}.log").read_text()
    assert list(read_losses(output)) == list(range(1, step + 1))
    return step


def test_a_signal_to_the_launcher_all_ranks_and_their_loader_workers_stops_the_run_with_a_checkpoint(run: Path) -> None:
    assert stop("ddp", run, run.parent / "once", ask=signal_everything) < STEPS


@pytest.mark.slow
def test_a_run_that_was_stopped_in_every_way_equals_one_that_was_not(run: Path) -> None:
    output, alone = run.parent / "stopped", run.parent / "alone"
    for ask in (signal_script, signal_one_rank, write_file):
        assert stop("ddp", run, output, ask=ask) < STEPS
    for folder in (output, alone):
        finish(start("ddp", run, folder), folder)
    assert read_losses(output) == read_losses(alone)  # to the last bit
    assert read_samples(output) == read_samples(alone)
