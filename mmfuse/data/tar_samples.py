"""Groups the members of one tar into samples, by WebDataset's rule, and refuses what would lose or run something."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmfuse.data.tar import walk_tar
from mmfuse.errors import ShardError

logger = logging.getLogger(__name__)

FORBIDDEN = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})
"""Extensions that other loaders unpickle, that is: execute."""


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name; what follows is the extension, lower-cased.

    Any name is a harmless key, also an absolute one or one with `..`: keys are labels, and reading writes no files.
    """
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())


class SamplePlaces(NamedTuple):
    """Where one sample's members lie in one tar."""

    key: str
    extensions: tuple[str, ...]
    offsets: list[int]
    sizes: list[int]


class TarSamples:
    """The samples of one tar, in order, and a count of the members that are nobody's, such as a README."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard
        self.others = 0

    def __iter__(self) -> Iterator[SamplePlaces]:
        """Every sample, checked.

        Raises:
            ShardError: the tar is damaged, a key returns after other keys, a member comes twice, or is a pickle.
        """
        seen: set[str] = set()
        checked: set[tuple[str, ...]] = set()
        for sample in self._group_members():
            if sample.key in seen:
                raise ShardError(
                    f"{self.shard}: the members of sample {sample.key!r} are not next to each other; "
                    "build it again sorted"
                )
            seen.add(sample.key)
            if sample.extensions not in checked:
                _check_extensions(self.shard, sample)
                checked.add(sample.extensions)
            yield sample
        if self.others and not seen:
            raise ShardError(f"{self.shard}: holds no samples, that is: no member named KEY.EXTENSION")

    def _group_members(self) -> Iterator[SamplePlaces]:
        """Consecutive members with one key."""
        current, extensions, offsets, sizes = "", [], [], []
        for name, offset, size in walk_tar(self.shard):
            key, extension = split_name(name)
            if not extension or not key or key[-1] == "/":
                logger.debug("%s: %r is nobody's member", self.shard, name)
                self.others += 1
                continue
            if key != current and extensions:
                yield SamplePlaces(current, tuple(extensions), offsets, sizes)
                extensions, offsets, sizes = [], [], []
            current = key
            extensions.append(extension)
            offsets.append(offset)
            sizes.append(size)
        if extensions:
            yield SamplePlaces(current, tuple(extensions), offsets, sizes)


def _check_extensions(shard: Path, sample: SamplePlaces) -> None:
    for extension, count in Counter(sample.extensions).items():
        if extension.rpartition(".")[2] in FORBIDDEN:
            raise ShardError(
                f"{shard}: sample {sample.key!r} has a member .{extension}: pickles run code when read and are "
                "refused; store arrays as .npy and metadata as .json"
            )
        if count > 1:
            raise ShardError(
                f"{shard}: sample {sample.key!r} has more than one member .{extension}; build this shard again"
            )
