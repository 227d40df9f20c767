"""Data sets to be built, and three ways to read what came of them."""

import csv
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import webdataset
from helpers import picture_bytes, sound_bytes

from mmfuse.data.shard_index import ShardIndex
from mmfuse.shards.build import BuildConfig, build_shards
from mmfuse.shards.output import Progress

Samples = dict[str, dict[str, bytes]]


def build(*inputs: Path, to: Path, jobs: int = 1, **settings: Any) -> Progress:
    """The last event of a whole build called `set`."""
    config = BuildConfig.model_validate({"name": "set", **settings})
    *_, last = build_shards(inputs, to, config=config, jobs=jobs)
    assert last.samples + last.left_out == last.rows
    return last


def write_csv(path: Path, header: str, rows: Iterable[Iterable[object]]) -> Path:
    """A CSV file; column names have blanks between them."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(), *rows])
    return path


def media_table(folder: Path, *, rows: int = 20) -> Path:
    """A table with two captions a row, in which every third row has no picture and every fourth no sound."""
    folder.mkdir(exist_ok=True)
    sounds = [sound_bytes(n) for n in range(3)]
    lines = []
    for n in range(rows):
        (folder / f"{n}.JPG").write_bytes(picture_bytes(n))
        (folder / f"{n}.ogg").write_bytes(sounds[n % 3])
        captions = json.dumps([f"thing {n}", f"another name,\nof {n}"])
        lines.append([f"{n}.JPG" if n % 3 else "", f"{n}.ogg" if n % 4 else "", captions])
    return write_csv(folder / "table.csv", "image audio caption", lines)


def captions_table(folder: Path, keys: Iterable[str], name: str = "table.csv") -> Path:
    """A table of keys with one caption each."""
    folder.mkdir(exist_ok=True)
    return write_csv(folder / name, "key caption", [[key, f"thing {key}"] for key in keys])


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The folder, with these files in it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_tars(folder: Path, pattern: str = "*.tar") -> Samples:
    """By key and extension, as Python's tarfile reads them."""
    samples: Samples = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def read_indexed(folder: Path) -> Samples:
    """The same, as our index finds them."""
    samples: Samples = {}
    for shard in sorted(folder.glob("*.tar")):
        data, index = shard.read_bytes(), ShardIndex(Path(f"{shard}.mmindex"))
        for number in range(len(index)):
            sample = index.sample(number)
            samples[sample.key] = {e: data[start : start + size] for e, (start, size) in sample.members.items()}
    return samples


def read_webdataset(folder: Path) -> Samples:
    """The same, as the webdataset library reads them."""
    shards = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return {s["__key__"]: {e: data for e, data in s.items() if not e.startswith("__")} for s in samples}


def tar_bytes(folder: Path) -> dict[str, bytes]:
    """The tars as they are, by name."""
    return {shard.name: shard.read_bytes() for shard in folder.glob("*.tar")}


def read_problems(folder: Path) -> list[dict[str, Any]]:
    """What was left out."""
    return [json.loads(line) for line in (folder / "build_problems.jsonl").read_text().splitlines()]
