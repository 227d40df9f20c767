"""Small real runs, started the way a user starts them."""

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
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
ZERO2, ZERO3 = (pytest.param(name, marks=needs_compiler) for name in ("zero2", "zero3"))
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


def start(strategy: str, run: Path, output: Path, *, settings: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Starts `launch/train.sh` with these settings changed; its output goes to `OUTPUT.log`."""
    log = open(f"{output}.log", "ab")  # noqa: SIM115  # the child's, closed with it
    command = [str(ROOT / "launch" / "train.sh"), strategy, str(run)]
    for setting in (f"output_dir={output}", *settings):
        command += ["--set", setting]
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "NUM_PROCESSES": "2"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # equal to the last bit only on the CPU
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen[bytes], output: Path) -> None:
    """Waits, and fails with the end of the log if the run did."""
    code = process.wait(timeout=900)
    assert code == 0, Path(f"{output}.log").read_text(errors="replace")[-4000:]


def kill_after_step(process: subprocess.Popen[bytes], output: Path, *, step: int) -> None:
    """SIGKILL to the launcher and all ranks as soon as the metrics show `step`."""
    deadline = time.monotonic() + 900
    while len(read_losses(output)) < step:
        assert process.poll() is None, Path(f"{output}.log").read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, "the run did not get to the step in time"
        time.sleep(0.02)
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
    """Sample keys by step, over all ranks in order."""
    samples: dict[int, list[str]] = {}
    for path in sorted(output.glob("samples.rank*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            samples.setdefault(record["step"], []).extend(record["keys"])
    return samples


def read_modalities(recipe: Path) -> dict[str, set[str]]:
    """Modalities by sample key, as the records of a run have it."""
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("text", "image", "audio"))
    samples = (source.read(number) for number in range(len(source)))
    return {f"{sample.shard}/{sample.key}": set(sample.members) for sample in samples}
