"""Memory and time of the plan at a billion samples, and the time to seek in ten million.

    python -m benchmarks.plan [--rounds 5]

Synthetic counts, no data; a fresh process for every figure. Memory is what the process holds at its peak above what it
held before, imports done.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import (
    Summary,
    current_commit,
    describe_machine,
    read_clock,
    run_child,
    summarise,
    write_section,
)

STEPS = 200
GLOBAL_BATCH = 4096
SEEK_BATCH = 1024
SEEK_STEP = 1_000_000


def reset_peak() -> float:
    """Megabytes that this process holds now; from here on `peak` counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    """The most megabytes that this process held since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def open_plan(shards: int, mean_samples: int, *, global_batch: int) -> Any:
    """A plan of one source with uneven shards that add up to `shards * mean_samples`."""
    from mmfuse.data.plan import DataPlan, PlannedSource

    spread = np.random.default_rng(0).integers(-mean_samples // 2, mean_samples // 2, shards // 2)
    counts = np.concatenate([mean_samples + spread, mean_samples - spread]).astype(np.int64)
    return DataPlan([PlannedSource("synthetic/train", counts, 1.0, "0")], seed=1, global_batch=global_batch)


def measure_steps(rank: int, world_size: int) -> dict[str, float]:
    """200 steps of one rank over 10,000 shards and a billion samples."""
    from mmfuse.data.loader import training_requests

    before = reset_peak()
    plan = open_plan(10_000, 100_000, global_batch=GLOBAL_BATCH)
    begin = read_clock()
    requests = training_requests(plan, start=0, stop=STEPS, rank=rank, world_size=world_size)
    rows = sum(len(request.refs) for request in requests)
    cost = read_clock().since(begin)
    assert rows == STEPS * GLOBAL_BATCH // world_size
    return {"megabytes": peak() - before, "us_per_sample": cost.cpu_seconds / rows * 1e6}


def measure_seek() -> dict[str, float]:
    """From nothing to the rows of step 1,000,000, 1,000 shards and ten million samples."""
    from mmfuse.data.loader import training_requests

    begin = read_clock()
    plan = open_plan(1000, 10_000, global_batch=SEEK_BATCH)
    requests = training_requests(plan, start=SEEK_STEP, stop=SEEK_STEP + 100, rank=0, world_size=1)
    assert len(next(requests).refs) == SEEK_BATCH
    cost = read_clock().since(begin)
    return {"seconds": cost.wall_seconds, "cpu_seconds": cost.cpu_seconds}


def measure_source() -> dict[str, float]:
    """Opening a source of 10,000 shards: its manifest, and what a process holds of it."""
    from mmfuse.data.manifest import PartFacts, ShardFacts, local_version, update_manifest
    from mmfuse.data.recipe import MemberRule, Recipe, Split
    from mmfuse.data.source import Source

    extensions = {"image": "jpg", "text": "txt", "audio": "flac"}
    members = {name: MemberRule(extensions=(extension,)) for name, extension in extensions.items()}
    recipe = Recipe(name="synthetic", members=members, splits={"train": Split(shards=("*.tar",))})
    with tempfile.TemporaryDirectory() as folder:
        facts = {}
        for number in range(10_000):
            tar = Path(folder) / f"{number:06d}.tar"
            tar.touch()
            part = PartFacts(tar.name, *local_version(str(tar)))
            lengths = tuple((0,) * 34 + (50_000, 50_000) for _ in extensions)
            signature = tuple(extensions.values())
            facts[tar.name] = ShardFacts(
                (part,), 100_000, (signature,), (100_000,), (lengths,), 10**7, f"{number:032x}"
            )
        update_manifest(Path(folder), facts)
        del facts
        before = reset_peak()
        begin = read_clock()
        source = Source(recipe, "train", place=Path(folder) / "recipe.yaml", modalities=tuple(extensions))
        cost = read_clock().since(begin)
        assert len(source) == 10**9
        return {"megabytes": peak() - before, "megabytes_kept": _status("VmRSS") - before, "seconds": cost.wall_seconds}


CASES = {
    "one rank": lambda: measure_steps(0, 1),
    "rank 0 of 64": lambda: measure_steps(0, 64),
    "seek": measure_seek,
    "source": measure_source,
}


def report(results: dict[str, list[dict[str, float]]], rounds: int) -> str:
    """The section of RESULTS.md."""

    def median(case: str, figure: str) -> Summary:
        return summarise([result[figure] for result in results[case]])

    lines = [
        "## Plan at scale",
        "",
        f"`python -m benchmarks.plan --rounds {rounds}` at commit {current_commit()}: {describe_machine(['numpy'])}.",
        "",
        f"Median of {rounds} fresh processes (lowest to highest); synthetic, uneven shards; imports not counted.",
        "",
        "| | |",
        "|---|---|",
    ]
    for case in ("one rank", "rank 0 of 64"):
        lines += [
            f"| plan of 10,000 shards, 1 billion samples, {STEPS} steps of {GLOBAL_BATCH:,}, {case}: memory at its "
            f"peak | {_show(median(case, 'megabytes'), 1)} MB |",
            f"| the same: CPU time a planned sample | {_show(median(case, 'us_per_sample'), 2)} us |",
        ]
    lines += [
        "| manifest and source of 10,000 shards: memory kept, at its peak, and seconds to open "
        f"| {_show(median('source', 'megabytes_kept'), 1)} MB, {_show(median('source', 'megabytes'), 1)} MB, "
        f"{_show(median('source', 'seconds'), 2)} s |",
        f"| 1,000 shards, 10 million samples: from nothing to the {SEEK_BATCH:,} rows of step {SEEK_STEP:,} "
        f"| {_show(median('seek', 'seconds'), 3)} s |",
    ]
    most = max(median(case, "megabytes").high for case in ("one rank", "rank 0 of 64"))
    with_source = most + median("source", "megabytes").high
    longest = median("seek", "seconds").high
    return "\n".join(
        [
            *lines,
            "",
            f"- plan at most 200 MB a process: {most:.1f} MB, with its source {with_source:.1f} MB "
            f"({'reached' if with_source <= 200 else '**not reached**'})",
            f"- seek in at most 1 s: {longest:.3f} s ({'reached' if longest <= 1 else '**not reached**'})",
        ]
    )


def _show(value: Summary, digits: int) -> str:
    return f"{value.median:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def main() -> None:
    """Measures every case in fresh processes and writes the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-results", action="store_true", help="print the section instead of writing it")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        import mmfuse.data.loader
        import mmfuse.data.source  # noqa: F401  # imports are not what is measured

        print(json.dumps(CASES[arguments.child]()))
        return
    results: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            results[case].append(run_child(sys.executable, "benchmarks.plan", "--child", case))
    text = report(results, arguments.rounds)
    print(text)
    if not arguments.no_results:
        write_section("plan", text)


if __name__ == "__main__":
    main()
