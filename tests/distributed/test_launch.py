"""What `launch/train.sh` asks Accelerate for, and a run that finds other processes than were asked for."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, write_data_set, write_tiny_run

from mmfuse.errors import LaunchError

TOOLS = ("bash", "env", "dirname", "sed", "ls", "xargs", "tr", "grep", "mktemp", "touch", "rm")
SETTINGS = ("MMFUSE_NUM_PROCESSES", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "DS_ACCELERATOR")
NODE_0 = {"MAIN_PROCESS_IP": "10.0.0.1"}


class TrainScript:
    """`train.sh` where only the tools that it needs are installed, and an `accelerate` that tells how it was called."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.path.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.path / tool).symlink_to(found)
        self.install("accelerate", 'printf "%s\\n" "$@"; env')

    def install(self, name: str, lines: str) -> None:
        """A program of these lines of bash."""
        (self.path / name).write_text(f"#!{self.path / 'bash'}\n{lines}\n")
        (self.path / name).chmod(0o755)

    def __call__(self, *arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        """The arguments and the `SETTINGS` that `accelerate` got."""
        command = [str(REPOSITORY / "launch/train.sh"), *arguments]
        done = subprocess.run(
            command, env={"PATH": str(self.path), **environment}, capture_output=True, text=True, check=True
        )
        lines = done.stdout.splitlines()
        got = dict(line.split("=", 1) for line in lines if line.startswith(SETTINGS))
        return lines, {name: value for name, value in got.items() if name in SETTINGS}


@pytest.fixture
def train_sh(tmp_path: Path) -> TrainScript:
    return TrainScript(tmp_path / "bin")


def asked_for(lines: list[str]) -> str:
    return lines[lines.index("--num_processes") + 1]


@pytest.mark.parametrize(
    ("visible", "machines", "processes"),
    [
        ("0", "1", "1"),
        ("0,1,3", "1", "3"),
        ("0, 1", "1", "2"),
        ("GPU-6f,GPU-9a,", "1", "2"),
        ("1,-1,0", "1", "1"),
        ("0,1,3", "2", "6"),
    ],
)
def test_as_many_processes_start_as_gpus_are_visible_on_all_machines(
    train_sh: TrainScript, visible: str, machines: str, processes: str
) -> None:
    lines, settings = train_sh("ddp", "quickstart", CUDA_VISIBLE_DEVICES=visible, NUM_MACHINES=machines, **NODE_0)
    assert asked_for(lines) == processes
    assert settings == {"MMFUSE_NUM_PROCESSES": processes, "CUDA_VISIBLE_DEVICES": visible}


def test_without_the_variable_the_gpus_that_nvidia_smi_lists_are_counted(train_sh: TrainScript) -> None:
    train_sh.install("nvidia-smi", '[[ $* == -L ]] && printf "GPU %s: H\\n  MIG 1g.10gb\\n" 0 1 2 3')
    lines, settings = train_sh("ddp", "quickstart")
    assert asked_for(lines) == "4"
    assert settings == {"MMFUSE_NUM_PROCESSES": "4"}
    assert asked_for(train_sh("ddp", "quickstart", CUDA_VISIBLE_DEVICES="2")[0]) == "1"
    assert asked_for(train_sh("ddp", "quickstart", NUM_PROCESSES="3")[0]) == "3"


@pytest.mark.parametrize("nothing", ["hidden", "no driver", "broken driver"])
def test_without_gpus_two_processes_a_machine_are_kept_on_the_cpu(train_sh: TrainScript, nothing: str) -> None:
    if nothing != "no driver":
        train_sh.install("nvidia-smi", 'printf "GPU %s: H\\n" 0 1 2 3' if nothing == "hidden" else "exit 9")
    environment = {"CUDA_VISIBLE_DEVICES": ""} if nothing == "hidden" else {}
    lines, settings = train_sh("ddp", "quickstart", **environment)
    assert asked_for(lines) == "2"
    assert settings == {"MMFUSE_NUM_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    assert asked_for(train_sh("ddp", "quickstart", NUM_MACHINES="3", **NODE_0, **environment)[0]) == "6"


def test_several_machines_need_to_know_node_0(train_sh: TrainScript) -> None:
    for known in ({}, {**NODE_0, "MAIN_PROCESS_PORT": "0"}):
        with pytest.raises(subprocess.CalledProcessError) as error:
            train_sh("ddp", "quickstart", NUM_MACHINES="2", MACHINE_RANK="1", **known)
        assert error.value.returncode == 2
        assert "NUM_MACHINES=2: every node needs MAIN_PROCESS_IP" in error.value.stderr


def test_other_nodes_wait_for_node_0_at_each_start(train_sh: TrainScript) -> None:
    train_sh.install("python3", 'printf "%s\n" "$*"')
    nodes = {"NUM_MACHINES": "2", **NODE_0}
    waits = ["-m mmfuse.train.join_node 10.0.0.1 29500 1"]
    assert train_sh("ddp", "quickstart", MACHINE_RANK="1", **nodes)[0][:1] == waits
    assert train_sh("ddp", "quickstart", MACHINE_RANK="0", **nodes)[0][:1] != waits
    train_sh.install("python3", "echo waited in vain >&2; exit 5")
    with pytest.raises(subprocess.CalledProcessError) as error:
        train_sh("ddp", "quickstart", MACHINE_RANK="1", MAX_RESTARTS="1", **nodes)
    assert error.value.returncode == 5
    assert error.value.stderr.count("waited in vain") == 2
    assert not error.value.stdout


def test_an_interrupt_ends_the_run_and_is_no_reason_to_start_again(train_sh: TrainScript) -> None:
    train_sh.install("accelerate", f"echo began; exec {shutil.which('sleep')} 60")
    heard = ["env", "--default-signal=INT"]  # a shell cannot trap what it was told to ignore, as behind `pytest &`
    command = [*heard, str(REPOSITORY / "launch/train.sh"), "ddp", "quickstart"]
    environment = {"PATH": str(train_sh.path), "MAX_RESTARTS": "3"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"began\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert not output and b"starting again" not in errors


def test_the_strategy_cpu_is_one_process_whatever_is_visible(train_sh: TrainScript) -> None:
    lines, settings = train_sh("cpu", "quickstart", CUDA_VISIBLE_DEVICES="0,1", NUM_PROCESSES="4")
    assert asked_for(lines) == "1"
    assert settings == {"MMFUSE_NUM_PROCESSES": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def test_the_run_and_its_settings_come_last_and_whole(train_sh: TrainScript) -> None:
    lines, _ = train_sh("ddp", "my run.yaml", "--set", "train.steps=5", "--set", "name=a")
    call = lines[: lines.index("name=a") + 1]
    assert call[:3] == ["launch", "--config_file", str(REPOSITORY / "launch/accelerate/ddp.yaml")]
    assert call[-8:] == ["-m", "mmfuse", "train", "my run.yaml", "--set", "train.steps=5", "--set", "name=a"]


def test_deepspeed_on_the_cpu_without_a_compiler_is_refused_with_what_to_do(train_sh: TrainScript) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        train_sh("zero2", "quickstart", CUDA_VISIBLE_DEVICES="")
    assert error.value.returncode == LaunchError.exit_code
    assert "needs g++; install it, or use the strategy ddp" in error.value.stderr
    train_sh.install("g++", "")
    assert train_sh("zero2", "quickstart", CUDA_VISIBLE_DEVICES="")[1]["DS_ACCELERATOR"] == "cpu"


def test_a_process_that_finds_itself_alone_says_so_and_writes_nothing(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path, write_data_set(tmp_path / "set", modalities=("text", "image")))
    environment = {**os.environ, "MMFUSE_NUM_PROCESSES": "2", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "mmfuse", "train", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 5 == LaunchError.exit_code
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("mmfuse: error: ")]
    assert "asked for 2 processes, but Accelerate started 1" in said and "start with launch/train.sh" in said
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
