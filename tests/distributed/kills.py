"""A run that is killed again and again, one rank or all at once, and the history that it leaves.

python tests/distributed/kills.py FOLDER [KILLS] [SEED]     # 100 kills over three strategies, an hour on two cores
"""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # when called as a script

from distributed.launches import (
    find_ranks,
    finish,
    kill_all,
    read_losses,
    read_samples,
    start,
    train_many,
    write_run,
    write_sparse_shards,
)

STRATEGIES = ("ddp", "zero2", "zero3")
CHECKPOINT_EVERY, LONGEST_LIFE, STEPS_A_KILL = 3, 12, 24
"""In steps: a kill comes so many after the first new one, or fewer, also while a checkpoint is written."""


class Outcome(NamedTuple):
    """What was seen of one strategy."""

    kills: Counter[str]
    """`one rank` and `all`."""
    resumes: int
    not_used: int
    """Checkpoints that a start found incomplete or damaged, and left alone."""


def disturb(strategy: str, run: Path, output: Path, *, kills: int, steps: int, seed: int) -> Counter[str]:
    """Kills at random moments until the number is reached, starting again what does not start itself."""
    generator, done = random.Random(seed), Counter[str]()
    settings = [f"train.steps={steps}", f"train.checkpoint_every={CHECKPOINT_EVERY}", "train.hang_seconds=60"]
    process = start(strategy, run, output, settings=settings, max_restarts=kills)
    while done.total() < kills:
        if not _wait_for_progress(process, output):
            process = start(strategy, run, output, settings=settings, max_restarts=kills)
            continue
        until = max(read_losses(output), default=0) + generator.randint(1, LONGEST_LIFE)
        while max(read_losses(output), default=0) < until and process.poll() is None:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 0.3))
        ranks = find_ranks(process)
        assert ranks or process.poll() is None, "the run ended before all kills; give it more steps"
        if not ranks:
            continue
        if done.total() % 2:
            kill_all(process)
            done["all"] += 1
            process = start(strategy, run, output, settings=settings, max_restarts=kills)
        else:
            generator.choice(ranks).kill()
            done["one rank"] += 1
            time.sleep(1)
    finish(process, output)
    return done


def _wait_for_progress(process: subprocess.Popen[bytes], output: Path) -> bool:
    """Until a step is written; False where the launcher ended with an error and must be started again."""
    path, deadline = output / "metrics.jsonl", time.monotonic() + 300
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, Path(f"{output}.log").read_text(errors="replace")[-4000:]
        if process.poll() is not None:
            assert process.returncode != 0, "the run ended before all kills; give it more steps"
            return False
        time.sleep(0.02)
    return True


def measure(strategy: str, run: Path, folder: Path, *, kills: int, seed: int = 0) -> Outcome:
    """Disturbs a run and compares it with one that nobody disturbs.

    Raises:
        AssertionError: it has other steps, other samples, or a loss that is off by one bit.
    """
    steps = STEPS_A_KILL * kills + 10
    undisturbed, output = folder / f"{strategy}_undisturbed", folder / strategy
    train_many(strategy, run, folder, {undisturbed.name: [f"train.steps={steps}"]})
    done = disturb(strategy, run, output, kills=kills, steps=steps, seed=seed)
    log = Path(f"{output}.log").read_text(errors="replace")
    losses = read_losses(output)
    assert sorted(losses) == list(range(1, steps + 1))
    assert read_samples(output) == read_samples(undisturbed)
    assert losses == read_losses(undisturbed)
    return Outcome(done, log.count("resumed from"), log.count("not used: "))


def main() -> None:
    folder = Path(sys.argv[1])
    kills, seed = (int(value) for value in [*sys.argv[2:], *("100", "0")[len(sys.argv) - 2 :]])
    run = write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=10)
    for number, strategy in enumerate(STRATEGIES):
        share = kills * (number + 1) // len(STRATEGIES) - kills * number // len(STRATEGIES)
        outcome = measure(strategy, run, folder, kills=share, seed=seed)
        sys.stdout.write(f"{strategy}: {outcome}\n")
        sys.stdout.flush()
    leftover = [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]
    sys.stdout.write(f"processes left over: {len(leftover) - 1}\n")


if __name__ == "__main__":
    main()
