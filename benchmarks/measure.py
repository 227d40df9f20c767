"""CPU seconds of this process and its children, medians over rounds, and sections of RESULTS.md."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "RESULTS.md"
DEFAULT_DATA = REPOSITORY / "data" / "benchmark"
SAMPLES = "data_shards/samples/emoji"
"""The committed shards, within the repository."""


class Cost(NamedTuple):
    """What a stretch of work took."""

    cpu_seconds: float
    """User and system time of this process, all its threads, and its children that have ended."""
    wall_seconds: float

    def since(self, before: "Cost") -> "Cost":
        """The cost between two clock readings."""
        return Cost(self.cpu_seconds - before.cpu_seconds, self.wall_seconds - before.wall_seconds)


def read_clock() -> Cost:
    """CPU and wall seconds until now; only differences mean anything."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Cost(sum(usage.ru_utime + usage.ru_stime for usage in usages), time.perf_counter())


def read_own_wall() -> float:
    """Wall seconds until now, less those in which this thread was ready but other work had the cores: what is left is
    its work, and its waiting for disks, locks and peers. Only differences mean anything; plain wall time off Linux."""
    path = Path("/proc/thread-self/schedstat")
    without_core = int(path.read_text().split()[1]) / 1e9 if path.is_file() else 0.0
    return time.perf_counter() - without_core


class Summary(NamedTuple):
    """Median and range of the rounds."""

    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Median, lowest and highest."""
    return Summary(statistics.median(values), min(values), max(values))


def run_child(python: str, module: str, *arguments: str) -> Any:
    """What `python -m module arguments` prints as JSON in its last line, one thread per library.

    Raises:
        SystemExit: the child failed; its last lines are shown.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [python, "-m", module, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def index_samples() -> None:
    """Makes `SAMPLES` ready to be read."""
    command = [sys.executable, "-m", "mmfuse", "shards", "index", SAMPLES]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def describe_machine(packages: Sequence[str] = ()) -> str:
    """One line: processor, cores, load, Python and versions of the packages that this interpreter finds."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)]
    return f"{os.cpu_count()} cores, {model}; load {load} at the end; {', '.join(versions)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def current_commit() -> str:
    """The short commit of the work tree, with `+` where mmfuse differs from it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "mmfuse"], cwd=REPOSITORY).returncode
    return commit.stdout.strip() + ("+" if changed else "")


def write_section(name: str, text: str, *, path: Path = RESULTS) -> None:
    """Replaces the section `name` of a Markdown file, or adds it at the end."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before = path.read_text() if path.is_file() else "# Benchmarks\n\n"
    section = f"{begin}{text.strip()}\n{end}"
    if begin in before and end in before:
        head, rest = before.split(begin, 1)
        path.write_text(head + section + rest.split(end, 1)[1])
    else:
        path.write_text(before.rstrip("\n") + "\n\n" + section)
