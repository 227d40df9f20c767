"""Before the first step: all ranks must see the same run, or they would train what nobody asked for."""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import distributed

from mmfuse.distributed import world_size
from mmfuse.errors import LaunchError, on_all_ranks
from mmfuse.train.checkpoint import MANIFEST
from mmfuse.train.environment import library_versions
from mmfuse.train.run import RunConfig


def check_same_on_all_ranks(run: RunConfig, identity: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Compares settings, versions, the data that is seen and the checkpoint; all ranks must call.

    Args:
        identity: of the data plan, with the hashes of all indexes.
    Raises:
        LaunchError: on all ranks; names the odd ones, their host and what they have.
    """
    if world_size() == 1:
        return
    facts = {
        "settings of the run": run.model_dump_json(),
        "data (index, order)": json.dumps(identity, sort_keys=True),
        "checkpoint": _checkpoint_state(checkpoint),
        **{f"version of {name}": version for name, version in library_versions().items()},
    }
    everywhere: list[tuple[str, dict[str, str]]] = [("", {})] * world_size()
    distributed.all_gather_object(everywhere, (socket.gethostname(), facts))
    if problems := find_odd_ranks(everywhere):
        raise on_all_ranks(LaunchError)("ranks do not see the same: " + "; ".join(problems))


def find_odd_ranks(everywhere: list[tuple[str, dict[str, str]]]) -> list[str]:
    """A sentence for each fact, by rank with its host, in which some ranks differ from most."""
    problems = []
    for name in everywhere[0][1]:
        values = [_short(facts[name]) for _, facts in everywhere]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            first = odd[0]
            others = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            problems.append(
                f"{name}: rank {first} on {everywhere[first][0]}{others} has {values[first]}, most have {usual}"
            )
    return problems


def _checkpoint_state(checkpoint: Path | None) -> str:
    """What this rank reads in the folder that rank 0 chose."""
    if checkpoint is None:
        return "none"
    try:
        return f"{checkpoint} {_hash((checkpoint / MANIFEST).read_bytes())}"
    except OSError as error:
        return f"{checkpoint}: {error.strerror}"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _short(value: str) -> str:
    """For a message: long values by their hash."""
    return value if len(value) <= 100 else f"one with hash {_hash(value.encode())}"
