"""`mmfuse doctor` as a user starts it: every part is looked at, and a problem has exit code 5."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.launches import needs_compiler
from helpers import REPOSITORY


def doctor(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # of ninja
    command = [sys.executable, "-m", "mmfuse", "doctor", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_problem_is_told_in_its_line_with_what_to_do_and_ends_with_5(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "file"), "NUM_MACHINES": "2", "MAIN_PROCESS_IP": "node0.invalid"}
    ended = doctor(**broken)
    assert ended.returncode == 5, ended.stderr
    lines = ended.stdout.splitlines()
    wrong = {line.split()[1]: number for number, line in enumerate(lines) if line.startswith("problem ")}
    assert wrong.keys() >= {"compiled", "network"}  # a container may have little /dev/shm too
    assert lines[wrong["compiled"] + 1].strip() == "-> set TORCH_EXTENSIONS_DIR to a folder on each machine's own disk"
    assert "node0.invalid, of node 0, does not resolve" in lines[wrong["network"]]
    assert lines[-1].startswith(f"problems: {len(wrong)}, ")


@pytest.mark.slow
@needs_compiler
def test_what_deepspeed_needs_is_built_and_told_as_json() -> None:
    ended = doctor("--build", "--json")
    told = json.loads(ended.stdout)
    assert ended.returncode == (5 if told["problem"] else 0), ended.stdout
    found = [(finding["status"], finding["subject"], finding["found"].split()[0]) for finding in told["findings"]]
    assert found[-2:] == [("ok", "built", "deepspeed_shm_comm"), ("ok", "built", "cpu_adam")]
    subjects = {subject for _, subject, _ in found}
    assert subjects >= {"python", "libraries", "torch", "text", "GPUs", "exchange", "compiler", "/dev/shm", "network"}
