"""Time to index a sample of three members, ours beside its peers, warm page cache, one process.

    python -m benchmarks.index [--peers-python PYTHON] [--data FOLDER] [--rounds 5]

Each round indexes all 16 tars of both sets in a fresh process; imports are not counted.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.loader_data import SETS, make_all
from benchmarks.measure import (
    DEFAULT_DATA,
    Summary,
    current_commit,
    describe_machine,
    read_clock,
    run_child,
    summarise,
    write_section,
)


def prepare_mmfuse(tars: list[Path]) -> Callable[[], int]:
    """`build_index`: every header checked; a sidecar that is mapped when it is read."""
    from mmfuse.data.shard_index import build_index

    return lambda: sum(len(build_index(tar, tar.with_suffix(".mmindex"))) for tar in tars)


def prepare_tarfile(tars: list[Path]) -> Callable[[], int]:
    """The standard library's walk alone: names, places and sizes into a list; writes nothing."""

    def walk(path: Path) -> int:
        with tarfile.open(path) as tar:
            return len([(member.name, member.offset_data, member.size) for member in tar]) // 3

    return lambda: sum(map(walk, tars))


def prepare_wids(tars: list[Path]) -> Callable[[], int]:
    """webdataset's indexed reader: what it does whenever it opens a shard, for it keeps no index."""
    from wids.wids import IndexedTarSamples

    return lambda: sum(len(IndexedTarSamples(path=str(tar))) for tar in tars)


def prepare_energon(tars: list[Path]) -> Callable[[], int]:
    """`energon prepare` with one worker: `.tar.idx` files and an SQLite table."""
    from megatron.energon.tools.prepare import command

    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]

    def prepare() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            command.main([str(tars[0].parent), *options, "--no-progress"], standalone_mode=False)
        info = json.loads((tars[0].parent / ".nv-meta" / ".info.json").read_text())
        return sum(info["shard_counts"].values())

    return prepare


SYSTEMS = {"mmfuse": prepare_mmfuse, "tarfile": prepare_tarfile, "wids": prepare_wids, "energon": prepare_energon}
OWN_ENVIRONMENT = ("mmfuse", "tarfile")


def measure(system: str, folder: Path) -> dict[str, float]:
    """Microseconds a sample for all tars of a set, written beside links to them."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for path in folder.glob("*.tar"):
            os.link(path, Path(temporary) / path.name)
        index = SYSTEMS[system](sorted(Path(temporary).glob("*.tar")))
        begin = read_clock()
        samples = index()
        cost = read_clock().since(begin)
    assert samples == json.loads((folder / "manifest.json").read_text())["samples"], (system, samples)
    return {"cpu": cost.cpu_seconds / samples * 1e6, "wall": cost.wall_seconds / samples * 1e6}


def measure_all(arguments: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Set -> system -> rounds; the systems take turns."""
    results: dict[str, dict[str, list[dict[str, float]]]] = {name: {system: [] for system in SYSTEMS} for name in SETS}
    for _ in range(arguments.rounds):
        for system in SYSTEMS:
            python = sys.executable if system in OWN_ENVIRONMENT else arguments.peers_python
            folders = [str(arguments.data / name) for name in SETS]
            measured = run_child(python, "benchmarks.index", "--child", system, *folders)
            for name, result in zip(SETS, measured, strict=True):
                results[name][system].append(result)
    return results


def report(results: dict[str, dict[str, list[dict[str, float]]]], rounds: int) -> str:
    """The section of RESULTS.md."""
    lines = [
        "## Indexing",
        "",
        f"`python -m benchmarks.index --rounds {rounds}` at commit {current_commit()}: {describe_machine()}.",
        "",
        f"Microseconds a sample of three members, median of {rounds} rounds in fresh processes (lowest to highest), "
        "warm page cache, one process, imports not counted; 16 tars of 512 samples of 20 KB, or of 80 of 164 KB.",
        "",
        "| | CPU, 20 KB | wall, 20 KB | CPU, 164 KB | wall, 164 KB |",
        "|---|---|---|---|---|",
    ]
    for system in SYSTEMS:
        cells = [
            _show(summarise([result[clock] for result in results[name][system]]))
            for name in SETS
            for clock in ("cpu", "wall")
        ]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    slowest = max(summarise([result["cpu"] for result in results[name]["mmfuse"]]).median for name in SETS)
    verdict = "reached" if slowest <= 50 else "**not reached**"
    lines += ["", f"- at most 50 us a sample: {slowest:.1f} us of CPU time ({verdict})", ""]
    lines += [f"- {system}: {(prepare.__doc__ or '').strip()}" for system, prepare in SYSTEMS.items()]
    return "\n".join(lines)


def _show(value: Summary) -> str:
    return f"{value.median:.1f} ({value.low:.1f} to {value.high:.1f})"


def main() -> None:
    """Measures all systems in turn and writes the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--peers-python", default=str(DEFAULT_DATA / "peers" / "bin" / "python"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-results", action="store_true", help="print the section instead of writing it")
    parser.add_argument("--child", nargs="+", metavar="SYSTEM FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        system, *folders = arguments.child
        print(json.dumps([measure(system, Path(folder)) for folder in folders]))
        return
    make_all(arguments.data, peers_python=arguments.peers_python)
    text = report(measure_all(arguments), arguments.rounds)
    print(text)
    if not arguments.no_results:
        write_section("index", text)


if __name__ == "__main__":
    main()
