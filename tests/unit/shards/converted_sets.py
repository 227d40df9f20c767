"""Conversions, and what came of them."""

import tarfile
from pathlib import Path
from typing import Any

from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.shards.convert import ConvertConfig, convert_folder
from mmfuse.shards.output import Progress


def convert(source: Path, to: Path, *, jobs: int = 1, **settings: Any) -> Progress:
    """The last event of a whole conversion to a recipe called `set`."""
    *_, last = convert_folder(source, to, config=ConvertConfig(name="set", **settings), jobs=jobs)
    return last


def read_members(shard: Path) -> list[tuple[str, bytes]]:
    """Names and bytes, in the order of the tar."""
    with tarfile.open(shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def count_readable(recipe: Path, split: str = "train") -> int:
    """Samples that training finds."""
    return len(open_source(SourceConfig(recipe=str(recipe), split=split), modalities=("image", "text")))
