"""Three blended sources of different modalities and sizes, with a few bad members, for tests of order and of kills."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from helpers import index_folder, write_tar, write_yaml

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import load_batches, training_requests
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.plan import DataPlan, PlannedSource
from mmfuse.errors import SampleError
from mmfuse.types import Batch, Features

SOURCES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "pairs": (("text", "image"), (31, 17, 8, 40, 25, 12, 33, 9, 20, 28)),
    "spoken": (("text", "audio"), (7, 5)),
    "pictures": (("image",), (3,)),
}
"""Modalities, and samples of each shard; two are smaller than an epoch of the first."""
WEIGHTS = (5.0, 2.0, 1.0)
EXTENSION = {"text": "txt", "image": "jpg", "audio": "wav"}
BAD = {("pairs", 7): ("jpg",), ("pairs", 100): ("jpg", "txt"), ("spoken", 3): ("wav",)}
"""Members that do not decode; of the second nothing is left."""
GLOBAL_BATCH = 24
SEED = 3


class ByteProcessor:
    """The first eight bytes of a member as numbers, so that decoding costs nothing and every sample differs."""

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        if data == b"bad":
            raise SampleError("it says so itself")
        return {"bytes": torch.tensor(list(data[:8].ljust(8))), "seed": torch.tensor(seed or 0)}

    def collate(self, features: list[Features]) -> Features:
        return {name: torch.stack([item[name] for item in features]) for name in features[0]}


def write_sources(folder: Path) -> dict[str, Path]:
    """The recipes by name, indexed."""
    recipes = {}
    for name, (modalities, shards) in SOURCES.items():
        number = 0
        for shard, samples in enumerate(shards):
            members: dict[str, bytes] = {}
            for _ in range(samples):
                for extension in (EXTENSION[m] for m in modalities):
                    bad = extension in BAD.get((name, number), ())
                    members[f"{number:04d}.{extension}"] = b"bad" if bad else f"{number} {extension}".encode()
                number += 1
            write_tar(folder / name / f"{shard:02d}.tar", members)
        index_folder(folder / name)
        split = {"train": {"shards": [f"{name}/*.tar"], "samples": sum(shards)}}
        recipes[name] = write_yaml(folder / f"{name}.yaml", {"name": name, "splits": split})
    return recipes


def load_rank(
    recipes: Iterable[Path], *, rank: int, world_size: int, num_workers: int, start: int, stop: int
) -> Iterator[Batch]:
    """One rank's batches, from sources and a plan of its own."""
    sources = [open_source(SourceConfig(recipe=str(place)), modalities=("text", "image", "audio")) for place in recipes]
    planned = [PlannedSource(s.name, s.counts, w, s.index_hash) for s, w in zip(sources, WEIGHTS, strict=True)]
    plan = DataPlan(planned, seed=SEED, global_batch=GLOBAL_BATCH, window_shards=2)
    decoder = SampleDecoder(sources, {m: ByteProcessor() for m in ("text", "image", "audio")}, seed=SEED)
    yield from load_batches(
        decoder,
        lambda: training_requests(plan, start=start, stop=stop, rank=rank, world_size=world_size),
        num_workers=num_workers,
        prefetch_batches=2,
    )
