"""CPU and wall time per sample of this loader, its peers and the bare calls, side by side in one run.

    python -m benchmarks.loader [--peers-python PYTHON] [--data FOLDER] [--rounds 5] [--json FILE]

Every system delivers one epoch of the same samples in a fresh process, in interleaved rounds; a first round, which is
not timed, checks the count and a checksum of all bytes. RESULTS.md says how the peers are installed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.loader_data import make_all
from benchmarks.loader_systems import SYSTEMS
from benchmarks.measure import (
    DEFAULT_DATA,
    Summary,
    current_commit,
    describe_machine,
    run_child,
    summarise,
    write_section,
)

OURS = "mmfuse"
OWN_ENVIRONMENT = ("bare", "mmfuse", "mmfuse_source")
READ_TARS = ("webdataset", "wids", "energon")
CONVERT = ("streaming", "litdata")


class Mode(NamedTuple):
    """One way to be measured: sets, whether to decode, and loader processes."""

    sets: tuple[str, ...]
    action: str
    num_workers: int


MODES = {
    "raw": Mode(("pairs", "triples"), "raw", 0),
    "decode": Mode(("triples",), "decode", 0),
    "workers": Mode(("triples",), "decode", 2),
}
COLUMNS = {
    "raw/pairs": "read, 20 KB",
    "raw/triples": "read, 164 KB",
    "decode/triples": "decode",
    "workers/triples": "decode and stack, 2 workers",
}
Rounds = dict[str, dict[str, list[dict[str, float]]]]
"""Column -> system -> what each round measured."""


def run_system(system: str, mode: str, action: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """One fresh process; a result per set of the mode."""
    python = sys.executable if system in OWN_ENVIRONMENT else arguments.peers_python
    sets, what, num_workers = MODES[mode]
    folders = [str(arguments.data / name) for name in sets]
    return run_child(python, "benchmarks.loader_child", system, what, str(num_workers), action, *folders)


def systems_of(mode: str, arguments: argparse.Namespace) -> list[str]:
    """The asked systems; `Source.read` has no workers and decodes nothing."""
    return [system for system in arguments.systems if mode == "raw" or system != "mmfuse_source"]


def verify_all(arguments: argparse.Namespace) -> None:
    """Stops unless every system delivers every sample of an epoch once with the right bytes; warms the page cache."""
    for mode in ("raw", "workers"):
        names = MODES[mode].sets
        expected = [json.loads((arguments.data / name / "manifest.json").read_text()) for name in names]
        if mode == "workers":  # what the bare calls decode on bytes that the first pass has found right
            expected = run_system("bare", mode, "verify", arguments)
        for system in systems_of(mode, arguments):
            for name, right, got in zip(names, expected, run_system(system, mode, "verify", arguments), strict=True):
                if (got["samples"], got["checksum"]) != (right["samples"], right["checksum"]):
                    sys.exit(f"{system} does not deliver the samples of {name} ({mode}): {got} instead of {right}")
            print(f"{mode}: {system} delivers every sample", flush=True)


def measure_all(arguments: argparse.Namespace) -> Rounds:
    """All rounds; the systems take turns, each round begins with another one."""
    rounds: Rounds = {column: {} for column in COLUMNS}
    for number in range(arguments.rounds):
        for mode in MODES:
            systems = systems_of(mode, arguments)
            start = number % len(systems)
            for system in systems[start:] + systems[:start]:
                results = run_system(system, mode, "measure", arguments)
                for name, result in zip(MODES[mode].sets, results, strict=True):
                    rounds[f"{mode}/{name}"].setdefault(system, []).append(result)
        print(f"round {number + 1} of {arguments.rounds} is done", flush=True)
    return rounds


def per_sample(results: list[dict[str, float]], *, clock: str) -> Summary:
    """Microseconds a sample."""
    return summarise([result[clock] / result["samples"] * 1e6 for result in results])


def ratio_to_ours(rounds: Rounds, column: str, system: str, *, ours: str = OURS) -> float:
    """The median over rounds of a system's CPU time over that of the loader, or `ours`, in the same round.

    Where each alternated with the bare calls, in units of those: the machine's speed falls out.
    """
    pairs = zip(rounds[column][system], rounds[column][ours], strict=True)
    return summarise([_in_units(theirs) / _in_units(own) for theirs, own in pairs]).median


def ratio_to_bare(rounds: Rounds, column: str, system: str) -> Summary:
    """A system's CPU time over that of the bare calls with which it alternated."""
    return summarise([_in_units(result) for result in rounds[column][system]])


def _in_units(result: dict[str, float]) -> float:
    return result["cpu"] / (result["bare_cpu"] or 1.0)


def table(rounds: Rounds, *, clock: str) -> list[str]:
    """Markdown: systems by columns, median and range, and the ratio to ours."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for system in SYSTEMS:
        cells = []
        for column, systems in rounds.items():
            if system not in systems:
                cells.append("")
                continue
            time = per_sample(systems[system], clock=clock)
            digits = 1 if time.median < 100 else 0
            cell = f"{time.median:,.{digits}f} ({time.low:,.{digits}f} to {time.high:,.{digits}f})"
            if clock == "cpu" and OURS in systems and system != OURS:
                cell += f", {ratio_to_ours(rounds, column, system):.2f} x"
            cells.append(cell)
        if any(cells):
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return lines


def goals(rounds: Rounds) -> list[str]:
    """The goals, each with what was measured."""
    if not {OURS, "mmfuse_source"} <= rounds["raw/pairs"].keys():
        return ["- not measured: the goals are those of mmfuse and mmfuse_source"]
    read = per_sample(rounds["raw/pairs"]["mmfuse_source"], clock="cpu").median
    lines = [f"- read in the order of the plan, 20 KB, at most 20 us: {read:.1f} us ({_verdict(read <= 20)})"]
    above = ratio_to_bare(rounds, "raw/pairs", "mmfuse_source")
    lines.append(f"- the same over `os.pread` of each member in the same process: {_show(above)}")
    above = ratio_to_bare(rounds, "decode/triples", OURS)
    lines.append(f"- decode at most 1.05 x the bare calls: {_show(above)} ({_verdict(above.median <= 1.05)})")
    for what, peers, least in (("reads tars", READ_TARS, 1.0), ("converts", CONVERT, 0.98)):
        for peer in (peer for peer in peers if peer in rounds["raw/pairs"]):
            factors = {COLUMNS[column]: ratio_to_ours(rounds, column, peer) for column in COLUMNS}
            reached = _verdict(min(factors.values()) >= least)
            shown = ", ".join(f"{name} {factor:.2f}" for name, factor in factors.items())
            lines.append(f"- {peer} ({what}) takes, in our CPU time: {shown} ({reached})")
            reads = {COLUMNS[c]: ratio_to_ours(rounds, c, peer, ours="mmfuse_source") for c in COLUMNS if "raw" in c}
            shown = ", ".join(f"{name} {factor:.2f}" for name, factor in reads.items())
            lines.append(f"- and in that of `Source.read`, which like it gives bytes by extension: {shown}")
    return lines


def _show(ratio: Summary) -> str:
    return f"{ratio.median:.3f} x ({ratio.low:.3f} to {ratio.high:.3f})"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def versions_of_peers(python: str) -> str:
    """Names and versions from peers.txt as the peers' interpreter has them."""
    names = [line.split("==")[0] for line in Path(__file__).with_name("peers.txt").read_text().split() if "==" in line]
    code = f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in {names!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def report(rounds: Rounds, arguments: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    machine = describe_machine(["torch", "numpy", "pillow", "soundfile"])
    setups = [f"- {system}: {(function.__doc__ or '').strip()}" for system, function in SYSTEMS.items()]
    return "\n".join(
        [
            "## Loader beside its peers",
            "",
            f"`python -m benchmarks.loader --rounds {arguments.rounds}` at commit {current_commit()}: {machine}; "
            f"peers: {versions_of_peers(arguments.peers_python)}.",
            "",
            f"CPU microseconds a sample (user and system, with workers), median of {arguments.rounds} interleaved "
            "rounds in fresh processes (lowest to highest), and the median of each round's ratio to mmfuse; without "
            "workers every batch alternates with one of the bare calls in the same process, and the ratio is in units "
            "of those. One "
            "epoch, shuffled, warm page cache, one thread per library, batches of 64; opening and imports are not "
            "counted. 20 KB: 8,192 samples of a 256 px JPEG, a caption and a JSON; 164 KB: 1,280 of a 256 px JPEG, a "
            "caption and 5 to 10 s of FLAC; each in 16 tars. Every system calls the same three decoders and, with "
            "workers only, stacks by the same function; each delivered every sample once with the right bytes.",
            "",
            *table(rounds, clock="cpu"),
            "",
            "Wall microseconds a sample; without workers flattering for systems with threads of their own (Streaming, "
            "LitData), which go on while the bare calls have their turn:",
            "",
            *table(rounds, clock="wall"),
            "",
            *goals(rounds),
            "",
            "Set up as:",
            "",
            *setups,
        ]
    )


def main() -> None:
    """Verifies, measures, and writes the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--peers-python", default=str(DEFAULT_DATA / "peers" / "bin" / "python"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--json", type=Path, help="where the figures of every round go")
    parser.add_argument("--no-results", action="store_true", help="print the section instead of writing it")
    arguments = parser.parse_args()
    make_all(arguments.data, peers_python=arguments.peers_python)
    verify_all(arguments)
    rounds = measure_all(arguments)
    if arguments.json:
        kept: dict[str, Any] = {"commit": current_commit(), "machine": describe_machine(), "rounds": rounds}
        arguments.json.write_text(json.dumps(kept, indent=1))
    text = report(rounds, arguments)
    print(text)
    if not arguments.no_results:
        write_section("loader", text)


if __name__ == "__main__":
    main()
