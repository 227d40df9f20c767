"""What a checkpoint holds, for people and for programs, from its small files and the headers of the others."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfuse.config import load_yaml
from mmfuse.errors import CheckpointError
from mmfuse.files import format_bytes
from mmfuse.train.checkpoint import (
    AVERAGE,
    CHECKPOINTS,
    CONSOLIDATED,
    RUN,
    checkpoint_folders,
    read_facts,
    read_manifest,
    verify_checkpoint,
)
from mmfuse.train.checkpoint_store import find_checkpoint, is_url
from mmfuse.train.engines.base import MODEL
from mmfuse.train.state_files import SUFFIX, StoredState

_NO_VERSIONS = ("platform", "device", "strategy", "world_size", "threads")
"""What else the environment of a checkpoint tells."""


class KindInfo(NamedTuple):
    """The tensors of one kind."""

    tensors: int
    values: int
    files: int
    bytes: int
    """Of the files."""


class CheckpointInfo(NamedTuple):
    """What there is to know without reading a weight."""

    checkpoint: str
    facts: dict[str, Any]
    """As they were written with it: step, plan, versions."""
    run: dict[str, Any]
    """Its `run.yaml`, of whichever version."""
    kinds: dict[str, KindInfo]
    files: int
    bytes: int

    def to_json(self) -> str:
        """One object; `run` stays in its file."""
        kinds = {kind: info._asdict() for kind, info in self.kinds.items()}
        return json.dumps({**self._asdict(), "kinds": kinds, "run": self.run.get("name")}, indent=1)


def list_checkpoints(place: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints of the run whose folder is `place`, whole or not, oldest first; or `place` itself.

    Of a URL one, as of `find_checkpoint`.

    Raises:
        CheckpointError: the run has none.
    """
    if is_url(place):
        return [find_checkpoint(place)]
    path = Path(place)
    if not (path / CHECKPOINTS).is_dir():
        return [path]
    if not (folders := checkpoint_folders(path / CHECKPOINTS)):
        raise CheckpointError(f"{path}: this run has no checkpoint yet")
    return folders


def check_checkpoint(folder: Path, *, on_read: Callable[[int], object]) -> int:
    """Reads every byte of a checkpoint, and says how many; see `verify_checkpoint`.

    Raises:
        CheckpointError: it is not as it was written, or files lie in it that would be read as weights of it.
    """
    verify_checkpoint(folder, contents=True, on_read=on_read)
    manifest = read_manifest(folder)
    strange = {path.name for path in folder.glob(f"*{SUFFIX}")} - manifest.keys()
    if strange:
        raise CheckpointError(f"{folder}: {min(strange)} was not written with it, but would be read; move it away")
    return sum(fingerprint["bytes"] for fingerprint in manifest.values())


def describe_checkpoint(folder: Path) -> CheckpointInfo:
    """Reads what a checkpoint says of itself.

    Raises:
        CheckpointError: not a complete checkpoint.
        ConfigError: its `run.yaml` is not readable.
    """
    verify_checkpoint(folder)
    manifest, stored = read_manifest(folder), StoredState(folder)
    kinds = {}
    for kind in sorted(stored.kinds, key=lambda kind: (kind != MODEL, kind)):
        shapes, files = stored.shapes(kind).values(), stored.files(kind)
        values = sum(torch.Size(shape).numel() for shape in shapes)
        kinds[kind] = KindInfo(len(shapes), values, len(files), sum((folder / name).stat().st_size for name in files))
    size = sum(fingerprint["bytes"] for fingerprint in manifest.values())
    run = load_yaml(folder / RUN)
    return CheckpointInfo(str(folder), read_facts(folder), run, kinds, len(manifest), size)


def to_table(info: CheckpointInfo) -> str:
    """What a person wants to know first, a line each."""
    lines = [("checkpoint", info.checkpoint), *_origin(info), *_content(info.run), *_data(info.facts)]
    for kind, held in info.kinds.items():
        files = f"{format_bytes(held.bytes)} in {_count(held.files, 'file')}"
        lines.append((kind, f"{held.values:,} values in {_count(held.tensors, 'tensor')}, {files}"))
    lines.append(("in all", f"{_count(info.files, 'file')}, {format_bytes(info.bytes)}"))
    versions = {name: version for name, version in info.facts["environment"].items() if name not in _NO_VERSIONS}
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return "\n".join(f"{name:<14}{value}".rstrip() for name, value in lines)


def _origin(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    facts, environment = info.facts, info.facts["environment"]
    adam = f" ({facts['adam_steps']} of Adam)" if facts["adam_steps"] != facts["step"] else ""
    yield "step", f"{facts['step']} of {info.run['train']['steps']}{adam} of run {info.run['name']}"
    yield "written by", f"{facts['written_by']}; {environment['device']}, {environment['platform']}"
    if origin := facts.get(CONSOLIDATED):
        what = "moving average" if origin["weights"] == AVERAGE else "last weights"
        yield "consolidated", f"{what} of {origin['from']}"


def _content(run: dict[str, Any]) -> Iterator[tuple[str, str]]:
    fusion = run["model"].get("fusion")
    yield "modalities", ", ".join(run["model"]["modalities"]) + ("; with fusion" if fusion else "")
    yield "objectives", ", ".join(run["objectives"])


def _data(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    plan = facts["plan"]
    yield "data", f"seed {plan['seed']}, global batch {plan['global_batch']} in {_count(plan['lanes'], 'lane')}"
    _, weights = facts["weights"][-1]
    for source, weight in zip(plan["sources"], weights, strict=True):
        yield "source", f"{source['name']}, weight {weight:g}, index {source['index_hash']}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
