"""The prefetcher's view of the plan: which files are read now, which come next, and how many at one time."""

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mmfuse.data.plan import ShardUse
from mmfuse.data.remote.cache import FileUse, cache_name
from mmfuse.data.remote.urls import show_url
from mmfuse.errors import ConfigError

_MIN_USES, _MAX_USES = 1024, 8192
"""The plan is read ahead until the next use of every shard is known, within these bounds."""
_FIRST_USES, _READ_USES = 2048, 256
"""At the start, and then at a time: half a millisecond each."""


class CachedShard(NamedTuple):
    """A tar that is copied to the node before it is read."""

    url: str
    size: int
    version: str
    checksum: str | None = None
    index_bytes: int = 0
    """Size of the index that is made of the copy; 0: none is."""

    @property
    def name(self) -> str:
        """Of the copy."""
        return cache_name(self.url, self.version, indexed=self.index_bytes > 0)


Copies = Mapping[tuple[int, int], tuple[CachedShard, ...]]
"""The tars of each shard, by source and shard as the plan numbers them."""


class WorkingSet(NamedTuple):
    """Files that must be there at one time."""

    step: int
    sizes: dict[str, int]
    """Bytes by name."""

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


def name_copies(shards: Copies) -> dict[str, CachedShard]:
    """Every tar by the name of its copy.

    Raises:
        ConfigError: two URLs differ in their query alone and have no version: their copies could not be told apart.
    """
    names: dict[str, CachedShard] = {}
    for tar in (tar for tars in shards.values() for tar in tars):
        known = names.setdefault(tar.name, tar)
        if known.url != tar.url and not tar.version:
            raise ConfigError(
                f"{show_url(tar.url)}: is named with different queries, and its server tells no version; "
                "name it once, or serve the shards under different paths"
            )
    return names


class LookAhead:
    """Uses of the plan that are not over, as far ahead as matters."""

    def __init__(self, shards: Copies, schedule: Iterator[ShardUse]) -> None:
        """Reads the first uses."""
        self._shards = shards
        self._num_files = len(name_copies(shards))
        first = next(schedule, None)
        self._schedule = itertools.chain([first] if first else [], schedule)
        self.step = first.first_step - 1 if first else -1
        """The last step that all ranks have finished, or the one before the first."""
        self._seen = deque([self.step])
        """First steps of all uses that were read, also of shards that need no copy."""
        self.uses: list[FileUse] = []
        """By first step."""
        self._read(_FIRST_USES)

    def advance(self, step: int) -> list[FileUse]:
        """Goes on to a finished step, if it is a later one; the uses that came into view."""
        if step > self.step:
            self.step = step
            self.uses = [use for use in self.uses if use.last_step >= step]
            while len(self._seen) > 1 and self._seen[0] <= step:
                self._seen.popleft()
        return self._read(_READ_USES)

    def working_set(self) -> WorkingSet:
        """The largest in view. A file is let go of one step after its last, when all ranks are past that."""
        sizes = {use.name: use.size for use in self.uses}
        changes = [(use.first_step, 1, use.name) for use in self.uses]
        changes += [(use.last_step + 2, -1, use.name) for use in self.uses]
        counts: Counter[str] = Counter()
        held, most, when = 0, 0, self.step + 1
        for step, group in itertools.groupby(sorted(changes), key=lambda change: change[0]):
            for _, change, name in group:
                before, counts[name] = counts[name], counts[name] + change
                held += sizes[name] * ((counts[name] > 0) - (before > 0))
            if held > most:
                most, when = held, step
        read_then = {use.name: use.size for use in self.uses if use.first_step <= when <= use.last_step + 1}
        return WorkingSet(when, read_then)

    def step_after(self, num_bytes: int) -> int:
        """The first step for which more than so many bytes must come that are not read now; the last in view."""
        seen: set[str] = set()
        for use in self.uses:
            if use.first_step > self.step + 1 and use.name not in seen:
                seen.add(use.name)
                num_bytes -= use.size
                if num_bytes < 0:
                    return use.first_step
        return self._seen[-1]

    def _read(self, limit: int) -> list[FileUse]:
        """Reads up to `limit` more uses where they matter; those of the next step always do."""
        fresh: list[FileUse] = []
        names = {use.name for use in self.uses}
        while self._seen[-1] <= self.step + 1 or (limit > 0 and not self._sees_enough(len(fresh), len(names))):
            use = next(self._schedule, None)
            if use is None:
                break
            limit -= 1
            self._seen.append(use.first_step)
            if use.last_step >= self.step:
                for tar in self._shards.get((use.source, use.shard), ()):  # other sources lie on local disks
                    names.add(tar.name)
                    fresh.append(FileUse(tar.name, tar.size + tar.index_bytes, use.first_step, use.last_step))
        self.uses += fresh
        return fresh

    def _sees_enough(self, num_fresh: int, num_files: int) -> bool:
        count = len(self.uses) + num_fresh
        return max(count, len(self._seen)) >= _MAX_USES or (count >= _MIN_USES and num_files == self._num_files)
