"""How long a step waits for a checkpoint of 200 million parameters, written beside the training or before it goes on.

    python -m benchmarks.checkpoint [--rounds 5] [--folder FOLDER] [--json FILE]

Weights and both moments of Adam in fp32, 2.4 GB, on a disk and synced. One process trains with one thread; in every
round every system by turns writes the state of the same engine, and steps go on while it does. Needs 8 GB of memory.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.checkpoint_systems import (
    BACKGROUND,
    FOREGROUND,
    NOTHING,
    Begin,
    Training,
    build_systems,
    load_large_run,
)
from benchmarks.measure import (
    Cost,
    Summary,
    current_commit,
    describe_machine,
    index_samples,
    read_own_wall,
    summarise,
    write_section,
)
from mmfuse.train.resume import write_model_files

GOAL = 0.2
STEPS_ALONE = 3
LIMIT_SECONDS = 600


class Figures(NamedTuple):
    """Of one checkpoint."""

    blocked: float
    """Seconds of the call, by `read_own_wall`."""
    complete: float
    """Wall seconds from the call until the checkpoint is complete."""
    cpu: float
    """CPU seconds that it took, in whatever thread."""
    alone: Cost
    """A step before it."""
    beside: Cost | None
    """A step while it was written; None where none was taken meanwhile."""
    megabytes: float


def measure(training: Training, begin: Begin, folder: Path) -> Figures:
    """One checkpoint with steps before it and meanwhile.

    Raises:
        SystemExit: it is not complete after so long; what went wrong is in the log.
    """
    alone = median_cost([training.take_step() for _ in range(STEPS_ALONE)])
    folder.mkdir(parents=True)
    write_model_files(folder, training.run.model)
    start, own_start, cpu_before, beside = time.time(), read_own_wall(), time.process_time(), []
    finished = begin(folder)
    blocked = read_own_wall() - own_start
    while (end := finished()) is None:
        beside.append(training.take_step())
        if time.time() - start > LIMIT_SECONDS:
            sys.exit(f"the checkpoint is not complete after {LIMIT_SECONDS} s")
    cpu = time.process_time() - cpu_before - sum(step.cpu_seconds for step in beside)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return Figures(blocked, end - start, cpu, alone, median_cost(beside) if beside else None, megabytes)


def median_cost(steps: Sequence[Cost]) -> Cost:
    """Of each clock by itself."""
    return Cost(*map(statistics.median, zip(*steps, strict=True)))


def measure_rounds(rounds: int, folder: Path) -> dict[str, list[Figures]]:
    """Every system in every round, each time another one first."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    run_folder = folder / "run"
    training = Training(load_large_run(run_folder))
    for _ in range(STEPS_ALONE):
        training.take_step()
    systems = build_systems(training)
    results: dict[str, list[Figures]] = {name: [] for name in systems}
    for number in range(-1, rounds):
        order = list(systems)[number % len(systems) :] + list(systems)[: number % len(systems)]
        for name in order:
            figures = measure(training, systems[name], run_folder)
            shutil.rmtree(run_folder)
            print(f"round {number + 1} of {rounds}: {name}: {figures}", flush=True)
            if number >= 0:  # in the first, allocators and thread pools come to be
                results[name].append(figures)
    return results


def show_system(rounds: list[Figures], foreground: list[Figures], name: str) -> str:
    """A line of the table."""
    beside = [[m / a for m, a in zip(f.beside, f.alone, strict=True)] for f in rounds if f.beside]
    slower = [f"{_show(summarise(values))} x" for values in zip(*beside, strict=True)] or ["", ""]
    if name == NOTHING:
        return f"| {name} | | | | | {slower[0]} | {slower[1]} | |"
    seconds = [f"{_show(summarise(values))} s" for values in zip(*[f[:3] for f in rounds], strict=True)]
    over, megabytes = _show(compare_blocked(rounds, foreground)), f"{rounds[0].megabytes:,.0f}"
    return f"| {' | '.join([name, seconds[0], f'{over} x', *seconds[1:], *slower, megabytes])} |"


def compare_blocked(one: list[Figures], other: list[Figures]) -> Summary:
    """Over the rounds, blocked time over that of another system."""
    return summarise([ours.blocked / theirs.blocked for ours, theirs in zip(one, other, strict=True)])


def report(results: dict[str, list[Figures]], arguments: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    goal = compare_blocked(results[BACKGROUND], results[FOREGROUND])
    steps = [summarise([f.alone[clock] for rounds in results.values() for f in rounds]) for clock in (0, 1)]
    return "\n".join(
        [
            "## A checkpoint of 200 million parameters",
            "",
            f"`python -m benchmarks.checkpoint --rounds {arguments.rounds}` at commit {current_commit()}: "
            f"{describe_machine(['torch', 'safetensors'])}.",
            "",
            "fp32 weights and both moments of Adam, of one process that trains with one thread; medians of "
            f"{arguments.rounds} rounds in turns (lowest to highest). Blocked: time until the training may go on; "
            "complete: until all files are synced and, of mmfuse, have their checksums and the checkpoint its name. "
            f"Training goes on meanwhile: alone a step takes {_show(steps[0])} s of CPU time and {_show(steps[1])} s "
            "of wall time, meanwhile so many times that. Times in which other processes had the cores are not counted, "
            "but for `complete`. The last line says what a process that only counts does to a step. The peers write no "
            "checksums.",
            "",
            "| | blocked | of mmfuse before | complete | CPU | step meanwhile, CPU | wall | MB |",
            "|---|---|---|---|---|---|---|---|",
            *(show_system(rounds, results[FOREGROUND], name) for name, rounds in results.items()),
            "",
            f"- blocked beside the training at most {GOAL} x of before it goes on: {_show(goal)} x "
            f"({'reached' if goal.median <= GOAL else '**not reached**'})",
        ]
    )


def _show(summary: Summary) -> str:
    return f"{summary.median:.2f} ({summary.low:.2f} to {summary.high:.2f})"


def main() -> None:
    """Measures and writes the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: that of temporary files")
    parser.add_argument("--json", type=Path, help="where the figures of every round go")
    arguments = parser.parse_args()
    index_samples()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure_rounds(arguments.rounds, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    text = report(results, arguments)
    print(text)
    write_section("checkpoint", text)


if __name__ == "__main__":
    main()
