"""What img2dataset says of the tars that it wrote: how many downloads of each shard succeeded."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

_STATS = "_stats.json"


def is_img2dataset(folder: Path) -> bool:
    """Whether img2dataset wrote the tars in the folder."""
    return any(folder.glob(f"*{_STATS}"))


def check_img2dataset(samples: Iterable[tuple[Path, int]]) -> Iterator[str]:
    """A sentence for each shard whose samples are not as many as img2dataset wrote.

    Shards in folders without any `_stats.json` are passed over.

    Args:
        samples: shards with the number of samples that their indexes have.
    """
    unseen: dict[Path, set[Path]] = {}
    written_by_it: set[Path] = set()
    for shard, count in samples:
        folder = shard.parent
        if folder not in unseen:
            unseen[folder] = set(folder.glob(f"*{_STATS}"))
            written_by_it |= {folder} if unseen[folder] else set()
        stats = shard.with_name(shard.stem + _STATS)
        if stats in unseen[folder]:
            unseen[folder].discard(stats)
            written = _read_successes(stats)
            if written != count:
                yield f"{shard}: has {count} samples, {stats.name} says {written}: it has changed, or is not complete"
        elif folder in written_by_it:
            yield f"{shard}: has no {stats.name}: img2dataset did not finish it; run it again, it goes on"
    for stats in sorted(path for folder in unseen.values() for path in folder):
        shard = stats.with_name(stats.name.removesuffix(_STATS) + ".tar")
        if not shard.exists():
            yield f"{shard}: is not there, but {stats.name} is: copy it again"


def _read_successes(stats: Path) -> int | str:
    try:
        return int(json.loads(stats.read_bytes())["successes"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"nothing readable ({error!r})"
