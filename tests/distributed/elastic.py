"""Checkpoints of one engine and number of ranks that go on under another.

python tests/distributed/elastic.py FOLDER     # all 90 ordered pairs, half an hour on two cores
"""

import json
import shutil
import sys
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # when called as a script

from distributed.launches import read_losses, read_samples, train_many, write_run, write_sparse_shards

STEPS, MOVED_AT = 40, 20


class Place(NamedTuple):
    """A strategy on a number of ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy}@{self.ranks}"


PLACES = [
    *(Place("ddp", 1), Place("ddp", 2), Place("ddp", 3)),
    *(Place("zero1", 2), Place("zero2", 1), Place("zero2", 2), Place("zero2", 3)),
    *(Place("zero3", 1), Place("zero3", 2), Place("fsdp2", 2)),
]
PAIRS = list(permutations(PLACES, 2))


class Elastic:
    """Trains once in every place that is asked for, and goes on from there in others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = write_run(folder / "run.yaml", write_sparse_shards(folder / "shards"), steps=STEPS)
        train_many("cpu", self.run, folder, {"alone": _SETTINGS})

    def whole(self, place: Place) -> Path:
        """The folder of an uninterrupted run in a place."""
        folder = self.folder / ("alone" if place == PLACES[0] else f"whole_{place}")
        if not folder.exists():
            train_many(place.strategy, self.run, self.folder, {folder.name: _SETTINGS}, processes=place.ranks)
        return folder

    def move(self, origins: Iterable[Place], target: Place) -> dict[Place, float]:
        """Goes on in a place from the middle of runs in others; how far losses are off those of one process, relative.

        Raises:
            AssertionError: other samples, or other steps.
        """
        folders = {origin: self.folder / f"{origin}_to_{target}" for origin in origins}
        for origin, folder in folders.items():
            _cut(self.whole(origin), folder)
        settings = {folder.name: _SETTINGS for folder in folders.values()}
        train_many(target.strategy, self.run, self.folder, settings, processes=target.ranks)
        return {origin: self.distance(folder) for origin, folder in folders.items()}

    def distance(self, folder: Path) -> float:
        alone, losses = read_losses(self.folder / "alone"), read_losses(folder)
        assert sorted(losses) == list(range(1, STEPS + 1)), folder
        assert read_samples(folder) == read_samples(self.folder / "alone"), folder
        return max(abs(losses[step] / alone[step] - 1) for step in alone)


_SETTINGS = [f"train.keep_every={MOVED_AT}", f"train.checkpoint_every={MOVED_AT}"]


def _cut(whole: Path, folder: Path) -> None:
    """A copy of a finished run as if it had been killed just after the checkpoint in its middle."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("tensorboard"))
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name != f"step_{MOVED_AT:08d}":
            shutil.rmtree(checkpoint)


def main() -> None:
    elastic = Elastic(Path(sys.argv[1]))
    distances = {}
    for target in PLACES:
        for origin, distance in elastic.move([p for p in PLACES if p != target], target).items():
            distances[f"{origin} -> {target}"] = distance
            sys.stdout.write(f"{origin} -> {target}: {distance:.1e}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(distances)} pairs, at most {max(distances.values()):.1e}\n")
    (elastic.folder / "pairs.json").write_text(json.dumps(distances, indent=1))


if __name__ == "__main__":
    main()
