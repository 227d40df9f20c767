"""What mmfuse's training loop costs over the same training written by hand: same model, data and engine.

    python -m benchmarks.overhead [--rounds 3] [--blocks 10] [--engines NAME ...] [--json FILE]

Ours is all of `mmfuse train`: plan, loader, watchdog, stop requests, counts of bad samples and skipped steps, metrics
every 10 steps, a checkpoint every 100. The bare loop is PyTorch's loader over the same decoder, with the order of
samples ready, and the step of PyTorch or DeepSpeed; it counts, logs and keeps nothing. Both take turns of 10 steps in
one process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import (
    REPOSITORY,
    Summary,
    current_commit,
    describe_machine,
    index_samples,
    summarise,
    write_section,
)
from benchmarks.overhead_child import BLOCK

GOAL = 1.03
ROWS = 32
"""Samples of a step and process."""
TOLERANCE = 1e-5


class Launch(NamedTuple):
    """How the processes of an engine start."""

    processes: int
    command: tuple[str, ...]
    environment: dict[str, str]


def torchrun(processes: int) -> Launch:
    """DistributedDataParallel; `accelerate launch` would start a single process without it."""
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    return Launch(processes, start, {"ACCELERATE_USE_CPU": "true"})


def deepspeed(stage: int) -> Launch:
    """As launch/train.sh does."""
    ports = ("--num_machines", "1", "--num_processes", "1", "--main_process_port", "0")
    start = ("-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/zero{stage}.yaml", *ports)
    return Launch(1, start, {"DS_ACCELERATOR": "cpu"})


LAUNCHES = {
    "one process": Launch(1, (), {"ACCELERATE_USE_CPU": "true"}),
    "DDP, a group of one": torchrun(1),
    "DDP, two processes": torchrun(2),
    "ZeRO-2, a group of one": deepspeed(2),
    "ZeRO-3, a group of one": deepspeed(3),
}


class Figures(NamedTuple):
    """Of one start of an engine: CPU time is that of all its processes, wall time that of the slowest, each without the
    time in which other processes had the cores."""

    ours: list[tuple[float, float]]
    """CPU and wall seconds of each block of steps."""
    bare: list[tuple[float, float]]
    """One block more: each of ours stands between two of these."""

    def pairs(self, clock: int) -> list[tuple[float, float]]:
        """Each block of ours, and the mean of the bare blocks before and after it."""
        around = [(a[clock] + b[clock]) / 2 for a, b in zip(self.bare, self.bare[1:], strict=False)]
        return [(own[clock], other) for own, other in zip(self.ours, around, strict=True)]

    def ratio(self, clock: int) -> float:
        """The median block's; the one with the checkpoint is not it."""
        return statistics.median(own / other for own, other in self.pairs(clock))

    def ratio_of_sums(self, clock: int) -> float:
        """Over all blocks, with the checkpoint."""
        ours, bare = zip(*self.pairs(clock), strict=True)
        return sum(ours) / sum(bare)

    def noise(self) -> float:
        """What the median says of the bare loop beside itself."""
        return statistics.median(b[0] / a[0] for a, b in zip(self.bare, self.bare[1:], strict=False))


def measure(name: str, blocks: int) -> Figures:
    """One start of an engine, in processes of its own.

    Raises:
        SystemExit: a process failed, or the two loops do not train the same.
    """
    launch = LAUNCHES[name]
    environment = {**os.environ, **launch.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        settings = (folder, "--blocks", str(blocks), "--rows", str(ROWS * launch.processes))
        command = [sys.executable, *launch.command, "-m", "benchmarks.overhead_child", *settings]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("costs.rank*.json"))]
        metrics = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert len(ranks) == launch.processes
    ours, bare = metrics[0]["loss"], statistics.mean(ranks[0]["losses"][: metrics[0]["step"]])
    if abs(ours - bare) > TOLERANCE * bare:
        sys.exit(f"{name}: the mean loss of the first steps is {ours} of ours and {bare} of the bare loop")
    return Figures(*(_over_ranks([rank[who] for rank in ranks]) for who in ("ours", "bare")))


def _over_ranks(blocks: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [(sum(cpu for cpu, _ in ranks), max(wall for _, wall in ranks)) for ranks in zip(*blocks, strict=True)]


def report(results: dict[str, list[Figures]], arguments: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    lines, verdicts = [], []
    for name, rounds in results.items():
        step = summarise([cpu / BLOCK / LAUNCHES[name].processes for f in rounds for cpu, _ in f.bare])
        cpu, wall = (summarise([f.ratio(clock) for f in rounds]) for clock in (0, 1))
        whole = [summarise([f.ratio_of_sums(clock) for f in rounds]) for clock in (0, 1)]
        extra = summarise([1000 * (own - bare) / BLOCK for f in rounds for own, bare in f.pairs(0)]).median
        cells = (_show(cpu), _show(wall), *map(_show, whole), _show(summarise([f.noise() for f in rounds])))
        lines.append(f"| {name} | {step.median:.2f} s | {extra:+.1f} ms | {' | '.join(cells)} |")
        verdict = "reached" if cpu.median <= GOAL else "**not reached**"
        verdicts.append(f"- {name}, CPU time at most {GOAL} x: {_show(cpu)} x ({verdict})")
    return "\n".join(
        [
            "## The training loop over a bare one",
            "",
            f"`python -m benchmarks.overhead --rounds {arguments.rounds} --blocks {arguments.blocks}` at commit "
            f"{current_commit()}: {describe_machine(['torch', 'accelerate', 'deepspeed'])}.",
            "",
            f"The run quickstart with {ROWS} samples a step and process, decoded in the same process. In each of "
            f"{arguments.rounds} fresh starts `mmfuse.train.trainer.train` and a bare loop with a model and an engine "
            f"of its own (same weights, samples and losses) take turns of {BLOCK} steps, {arguments.blocks} turns "
            "after 5 steps to warm up; each turn of ours is divided by the mean of the bare ones before and after it. "
            "Start, evaluation and the end are not measured. Median turn of each start; of these the median (lowest to "
            f"highest). `with a checkpoint`: all {BLOCK * arguments.blocks} steps together, the one that writes it "
            "(default: every 100) among them. Wall time is without that in which other processes had the cores. The "
            "last column is the bare loop beside itself, a turn over the one before.",
            "",
            "| engine | bare step and process, CPU | ours more | CPU | wall | with a checkpoint, CPU | wall "
            "| bare over bare, CPU |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            *verdicts,
        ]
    )


def _show(summary: Summary) -> str:
    return f"{summary.median:.3f} ({summary.low:.3f} to {summary.high:.3f})"


def main() -> None:
    """Every engine by turns, each in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--engines", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--json", type=Path, help="where the figures of every round go")
    arguments = parser.parse_args()
    index_samples()
    results: dict[str, list[Figures]] = {name: [] for name in arguments.engines}
    for number in range(arguments.rounds):
        for name, rounds in results.items():
            rounds.append(measure(name, arguments.blocks))
            print(f"round {number + 1} of {arguments.rounds}: {name}, {rounds[-1].ratio(0):.3f} x", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    text = report(results, arguments)
    print(text)
    write_section("overhead", text)


if __name__ == "__main__":
    main()
