"""Small real things that tests are made of: pictures, sounds, tars, data sets and runs."""

import io
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from mmfuse.data.recipe import place_shards
from mmfuse.data.remote.urls import find_shards
from mmfuse.shards.index import IndexedShard, index_shards

REPOSITORY = Path(__file__).parents[1]
EXTENSION = {"image": "jpg", "text": "txt", "audio": "ogg"}
ALL = ("image", "text", "audio")

TINY_MODALITIES: dict[str, dict[str, Any]] = {
    "text": {
        "tokenizer": "tiny",
        "vocab_size": 6368,
        "max_tokens": 8,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
    },
    "image": {"image_size": 32, "hidden_size": 24, "num_layers": 1, "num_heads": 3},
    "audio": {
        "clip_seconds": 0.32,
        "num_mel_bins": 16,
        "patch_size": 16,
        "frequency_stride": 16,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
    },
}


def picture_bytes(number: int, *, size: int = 40) -> bytes:
    """A JPEG that differs from those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(file, "JPEG")
    return file.getvalue()


def sound_bytes(number: int, *, seconds: float = 0.3, rate: int = 16_000) -> bytes:
    """An Ogg Vorbis tone whose pitch depends on the number."""
    time = np.arange(int(seconds * rate)) / rate
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * (200 + 10 * number) * time), rate, format="OGG", subtype="VORBIS")
    return file.getvalue()


def sample_members(number: int, modalities: Iterable[str] = ALL) -> dict[str, bytes]:
    """Members by name of sample `NNNN`: a picture, two captions and a sound, or those that are asked for."""
    make = {
        "image": lambda: picture_bytes(number),
        "text": lambda: f"thing {number}\nanother name of {number}\n".encode(),
        "audio": lambda: sound_bytes(number),
    }
    return {f"{number:04d}.{EXTENSION[modality]}": make[modality]() for modality in modalities}


def write_tar(
    path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], *, tar_format: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar of these members, in their order; pairs may repeat a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_data_set(
    folder: Path,
    *,
    shard_sizes: tuple[int, ...] = (5, 3),
    modalities: Iterable[str] = ALL,
    lacking: Mapping[int, tuple[str, ...]] | None = None,
    index: bool = True,
) -> Path:
    """Indexed shards `train-N.tar` of numbered samples, and the path of their recipe, whose only split is `train`.

    Args:
        lacking: modalities that a numbered sample goes without.
    """
    modalities, number = tuple(modalities), 0
    for shard, size in enumerate(shard_sizes):
        members: dict[str, bytes] = {}
        for _ in range(size):
            members |= sample_members(number, [m for m in modalities if m not in (lacking or {}).get(number, ())])
            number += 1
        write_tar(folder / f"train-{shard}.tar", members)
    if index:
        index_folder(folder)
    recipe = {
        "name": folder.name.replace(".", "_"),
        "members": {m: {"extensions": [EXTENSION[m]]} for m in modalities},
        "splits": {"train": {"shards": ["train-*.tar"]}},
    }
    return write_yaml(folder / "recipe.yaml", recipe)


def index_folder(folder: Path) -> list[IndexedShard]:
    """Indexes all tars of a folder, as `mmfuse shards index FOLDER` does."""
    return list(index_shards(place_shards(find_shards((str(folder),)), index_folder=None)))


def write_tiny_run(folder: Path, recipe: Path | str, *, modalities: Iterable[str] = ("text", "image")) -> Path:
    """The YAML of a contrastive run of two steps over four samples, which takes about a second."""
    run = {
        "name": "tiny",
        "output_dir": str(folder / "out"),
        "model": {
            "width": 16,
            "embedding_dim": 8,
            "modalities": {modality: TINY_MODALITIES[modality] for modality in modalities},
            "fusion": None,
        },
        "objectives": {"contrastive": {}},
        "data": {"train": [{"recipe": str(recipe)}], "num_workers": 0},
        "train": {"steps": 2, "global_batch": 4},
        "optimizer": {"warmup_steps": 1},
    }
    return write_yaml(folder / "tiny.yaml", run)


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    """`content` as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """Makes a folder that lies on a file system of its own."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
