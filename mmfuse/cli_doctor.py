"""`mmfuse doctor`: the part of the command line that looks at the environment."""

import argparse
import contextlib
import json
import sys

from mmfuse.errors import LaunchError


def add_doctor(commands) -> None:
    """The command with its help."""
    doctor = commands.add_parser(
        "doctor",
        help="check the environment that a run will meet, on this node; exit code 5 if there is a problem",
        description="Checks versions of Python and libraries, GPUs and driver, what ranks exchange tensors by, the "
        "compiler that DeepSpeed calls, shared memory, limits, folders, and the way to node 0, and says what to do. "
        "Run it on every node, with the variables that launch/train.sh will get.",
        epilog="Example: NUM_MACHINES=2 MAIN_PROCESS_IP=10.0.0.1 mmfuse doctor --build",
    )
    doctor.add_argument(
        "--build",
        action="store_true",
        help="also compile what DeepSpeed needs on the CPU and for offloading: minutes, once",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from mmfuse.train.doctor.examine import examine

    findings, output = [], sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets there
        for finding in examine(build=options.build):
            findings.append(finding)
            if not options.json:
                print(f"{finding.status:<9}{finding.subject:<13}{finding.found}", file=output)
                if finding.remedy:
                    print(f"{'':<22}-> {finding.remedy}", file=output)
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warning", "problem")}
    if options.json:
        print(json.dumps({**counts, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        print(f"problems: {counts['problem']}, warnings: {counts['warning']}")
    return LaunchError.exit_code if counts["problem"] else 0
