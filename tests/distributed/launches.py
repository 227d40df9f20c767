"""Small real runs, started the way a user starts them."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import index_folder

from mmfuse.data.mixture import SourceConfig, open_source

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_shards" / "samples" / "emoji"
KEPT = [("txt",), ("jpg",), ("txt", "jpg"), ("jpg", "txt", "ogg"), ("txt",), ("txt", "jpg"), ("jpg", "ogg")]
"""Modalities by turns: most rows lack sound, so ranks without any are common."""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed on CPU compiles a library with g++")
ZERO1, ZERO2, ZERO3, ZERO3_OFFLOAD = (
    pytest.param(name, marks=needs_compiler) for name in ("zero1", "zero2", "zero3", "zero3_offload")
)
OBJECTIVES = ("contrastive", "matching", "masked_language", "leave_one_out", "next_sentence")
TOLERANCE = 2e-6
"""Relative, fp32, over 20 steps with every objective: sums in another order, fed back through Adam."""


def write_sparse_shards(folder: Path, *, count: int = 56, kept: Sequence[tuple[str, ...]] = KEPT) -> Path:
    """Two tars of real samples that keep these members by turns, their index, and a recipe; returns the recipe."""
    folder.mkdir(parents=True)
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(SAMPLE / "new_drawings-000000.tar") as source:
        for member in source:
            key, _, extension = member.name.partition(".")
            file = source.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    keys = list(samples)[:count]
    for number, part in enumerate((keys[: count // 2], keys[count // 2 :])):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for key in part:
                for extension in kept[keys.index(key) % len(kept)]:
                    path = folder / f"{key}.{extension}"
                    path.write_bytes(samples[key][extension])
                    tar.add(path, path.name)
                    path.unlink()
    index_folder(folder)
    recipe = {
        "name": "sparse",
        "members": {
            "image": {"extensions": ["jpg"]},
            "text": {"extensions": ["txt"], "captions": "sentences"},
            "audio": {"extensions": ["ogg"]},
        },
        "splits": {"train": {"shards": ["part-*.tar"], "samples": count}},
    }
    path = folder / "sparse.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_run(path: Path, recipe: Path, *, steps: int) -> Path:
    """A run of every objective with encoders of one narrow layer; writes every step's loss and samples."""
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}
    audio = {"clip_seconds": 0.64, "num_mel_bins": 32, "patch_size": 16, "frequency_stride": 16, "time_stride": 16}
    run = {
        "name": "sparse",
        "model": {
            "width": 32,
            "embedding_dim": 16,
            "modalities": {
                "text": {**sizes},
                "image": {"image_size": 32, **sizes},
                "audio": {**audio, **sizes},
            },
            "fusion": {"num_layers": 1, "num_heads": 2},
        },
        "objectives": {name: {} for name in OBJECTIVES},
        "data": {"train": [{"recipe": str(recipe)}], "num_workers": 1},
        "train": {
            "steps": steps,
            "global_batch": 8,
            "log_every": 1,
            "checkpoint_every": 6,
            "record_samples": True,
        },
        "optimizer": {"warmup_steps": 4, "learning_rate": 1e-3, "encoder_learning_rate": 1e-3},
    }
    path.write_text(yaml.safe_dump(run))
    return path


def start_script(
    strategy: str, script: str, *arguments: str, log: Path, processes: int = 2, launch_folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Starts a script of this folder in processes of a strategy, as `launch/train.sh` starts `mmfuse train`."""
    number = 1 if strategy == "cpu" else processes
    config = ROOT / "launch" / "accelerate" / f"{strategy}.yaml"
    command = ["accelerate", "launch", "--config_file", str(config), "--num_processes", str(number)]
    command += ["--main_process_port", "0", str(Path(__file__).with_name(script)), *arguments]
    on_cpu = {"DS_ACCELERATOR": "cpu"} if strategy.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    told = {"MMFUSE_LAUNCH_DIR": str(launch_folder)} if launch_folder else {}
    environment = {**_environment(), **on_cpu, **told, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def train_many(
    strategy: str, run: Path, folder: Path, variants: Mapping[str, Sequence[str]], *, processes: int = 2
) -> None:
    """Runs one after the other in one launch, each with these settings changed, to FOLDER/NAME."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{strategy}_{processes}.log"
    arguments = (str(run), str(folder), json.dumps(variants))
    process = start_script(strategy, "many_runs.py", *arguments, log=log, processes=processes)
    code = process.wait(timeout=900)
    assert code == 0, log.read_text(errors="replace")[-4000:]


def start(
    strategy: str,
    run: Path,
    output: Path,
    *,
    settings: Sequence[str] = (),
    max_restarts: int = 0,
    node: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `launch/train.sh` with these settings changed; its output goes to `OUTPUT.log`.

    Args:
        node: the variables of one of several nodes, where the same relative `output_dir` is a folder of its own.
    """
    command = [str(ROOT / "launch" / "train.sh"), strategy, str(run)]
    for setting in (f"output_dir={output.name if node else output}", *settings):
        command += ["--set", setting]
    environment = {**_environment(), "NUM_PROCESSES": "2", "MAX_RESTARTS": str(max_restarts), **(node or {})}
    with open(f"{output}.log", "ab") as log:
        cwd = output.parent if node else None
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=cwd)


def _environment() -> dict[str, str]:
    """Without GPUs: equal to the last bit only on the CPU."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


def finish(process: subprocess.Popen[bytes], output: Path) -> None:
    """Waits, and fails with the end of the log if the run did."""
    code = process.wait(timeout=900)
    assert code == 0, Path(f"{output}.log").read_text(errors="replace")[-4000:]


def kill_after_step(process: subprocess.Popen[bytes], output: Path, *, step: int) -> None:
    """SIGKILL to the launcher and all ranks as soon as the metrics show `step`."""
    wait_for_step(process, output, step=step)
    kill_all(process)


def wait_for_step(process: subprocess.Popen[bytes], output: Path, *, step: int) -> None:
    """Until the metrics show `step`; fails if the run ends before."""
    deadline = time.monotonic() + 900
    while len(read_losses(output)) < step:
        assert process.poll() is None, Path(f"{output}.log").read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, "the run did not get to the step in time"
        time.sleep(0.02)


def find_ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train, in no order; loader workers, which they start, are not among them."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [member for member in family if "RANK" in _environment_of(member) and not _is_child_of_rank(member)]


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # it has ended
        return {}


def _is_child_of_rank(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
    except psutil.Error:
        return True
    return parent is None or "RANK" in _environment_of(parent)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and all that it started, if it has not ended."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)


def read_losses(output: Path) -> dict[int, float]:
    """Loss by step."""
    return read_numbers(output, "loss")


def read_numbers(output: Path, name: str) -> dict[int, float]:
    """One of the metrics by step."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {record["step"]: record[name] for line in lines if line.endswith("}") and (record := json.loads(line))}


def read_samples(output: Path) -> dict[int, list[str]]:
    """Sample keys by step, as the plan has them: one micro-step after the other, in each all ranks in order."""
    found: dict[tuple[int, int], list[str]] = {}
    for path in sorted(output.glob("samples.rank*.jsonl")):
        micro_steps: Counter[int] = Counter()
        for line in path.read_text().splitlines():
            record = json.loads(line)
            step = record["step"]
            found.setdefault((step, micro_steps[step]), []).extend(record["keys"])
            micro_steps[step] += 1
    samples: dict[int, list[str]] = {}
    for (step, _), keys in sorted(found.items()):
        samples.setdefault(step, []).extend(keys)
    return samples


def read_modalities(recipe: Path) -> dict[str, set[str]]:
    """Modalities by sample key, as the records of a run have it."""
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("text", "image", "audio"))
    samples = (source.read(number) for number in range(len(source)))
    return {f"{sample.shard}/{sample.key}": set(sample.members) for sample in samples}
