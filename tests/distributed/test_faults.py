"""Something goes wrong on one of two ranks."""

import re
from pathlib import Path

import pytest
from distributed.launches import (
    ZERO2,
    ZERO3,
    kill_all,
    read_losses,
    read_numbers,
    read_samples,
    start_script,
    train_many,
    write_run,
    write_sparse_shards,
)
from helpers import small_disk

from mmfuse.errors import Stopped
from mmfuse.train.checkpoint import CHECKPOINTS, complete_checkpoints

STEPS, HANG_SECONDS = 9, 8
ENGINES = ["ddp", *(pytest.param(*name.values, marks=[*name.marks, pytest.mark.slow]) for name in (ZERO2, ZERO3))]
ENGINES.append(pytest.param("fsdp2", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    return write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=STEPS)


def train_with(fault: str, strategy: str, run: Path, output: Path, *settings: str) -> tuple[int, str, str]:
    """Exit code of the launcher, the one that the run left for `launch/train.sh`, and the log."""
    told, log = Path(f"{output}.told"), Path(f"{output}.log")
    told.mkdir(exist_ok=True)
    arguments = [fault, str(run)]
    for setting in (
        f"output_dir={output}",
        "train.checkpoint_every=3",
        f"train.hang_seconds={HANG_SECONDS}",
        *settings,
    ):
        arguments += ["--set", setting]
    process = start_script(strategy, "faulty_run.py", *arguments, log=log, launch_folder=told)
    try:
        code = process.wait(timeout=200)
    finally:
        kill_all(process)
    outcome = told / "outcome"
    return code, outcome.read_text() if outcome.exists() else "", log.read_text(errors="replace")


@pytest.mark.parametrize("strategy", ENGINES)
def test_a_full_disk_or_a_read_only_one_costs_one_checkpoint(run: Path, strategy: str) -> None:
    output, faults = run.parent / f"survives_{strategy}", "full_disk:6,read_only:9"
    with small_disk(output / CHECKPOINTS, megabytes=16) as folder:
        code, _, log = train_with(faults, strategy, run, output, "train.steps=12", "train.hang_seconds=60")
        kept = [checkpoint.name for checkpoint in complete_checkpoints(folder)]
        assert kept == [path.name for path in sorted(folder.iterdir())]
    assert code == 0, log[-4000:]
    assert kept == ["step_00000003", "step_00000012"]
    for step, reason in ((6, "No space left on device"), (9, "Read-only file system")):
        assert re.search(rf"ERROR the checkpoint of step {step} was not written: .*{reason}", log)


@pytest.mark.parametrize("strategy", ENGINES)
def test_a_nan_of_one_rank_skips_the_step_on_all_and_one_that_hangs_in_its_data_is_named(
    run: Path, strategy: str
) -> None:
    output = run.parent / f"hangs_{strategy}"
    code, outcome, log = train_with("nan:1,hang_in_data:4", strategy, run, output)
    losses, skipped = read_losses(output), read_numbers(output, "skipped_steps")
    assert [loss is None for loss in losses.values()] == [False, True, False, False]
    assert list(skipped.values()) == [0, 1, 1, 1]
    assert code != 0 and outcome == str(Stopped.exit_code)
    assert "no progress for 8 s (train.hang_seconds), ending. rank 1 keeps the others waiting, in: data" in log
    assert log.count("no progress") == 1
    assert "hang_in_data" in (output / "hang.rank1.txt").read_text()
    assert [folder.name for folder in complete_checkpoints(output / CHECKPOINTS)] == ["step_00000003"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ENGINES)
def test_a_rank_that_never_comes_to_an_exchange_is_named_with_the_line_where_it_is(run: Path, strategy: str) -> None:
    output = run.parent / f"absent_{strategy}"
    _, outcome, log = train_with("hang_in_step:4", strategy, run, output)
    assert outcome == str(Stopped.exit_code)
    assert "rank 1 keeps the others waiting, in: forward and backward, tests/distributed/faulty_run.py" in log


@pytest.mark.slow
def test_a_loss_that_spikes_takes_all_ranks_back_and_its_data_is_left_out(run: Path) -> None:
    output, calm = run.parent / "spikes", run.parent / "calm"
    settings = ("train.steps=12", "train.record_samples=true", "train.roll_back={losses_in_a_row: 2}")
    _, outcome, log = train_with("spike:6", "ddp", run, output, *settings, "train.keep_checkpoints=3")
    assert outcome == str(Stopped.exit_code)
    assert log.count("back to the checkpoint of step 3; started again") == 1
    assert [folder.name for folder in complete_checkpoints(output / CHECKPOINTS)] == ["step_00000003"]
    code, _, log = train_with("spike:6", "ddp", run, output, *settings)
    assert code == 0, log[-4000:]
    train_many("cpu", run, run.parent, {calm.name: ["train.steps=17"]})
    expected = list(read_samples(calm).values())
    assert list(read_samples(output).values()) == expected[:3] + expected[8:]
