"""Portable checkpoints: whole fp32 weights and Adam moments by parameter name, so that any engine on any number of
ranks continues from any other's. Complete or not there: a manifest is written last, then the folder gets its name."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmfuse.errors import CheckpointError, ConfigError
from mmfuse.model.model import ModelConfig
from mmfuse.train.engines.base import MOMENTS, PortableState
from mmfuse.train.run import RunConfig, load_run

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The folder of them within a run's."""
MODALITIES = "modalities"
"""The folder of `ModelConfig.save_files` within a run's, and its copy within each checkpoint."""
MANIFEST, STATE, RUN = "manifest.json", "state.json", "run.yaml"
_IN_FILES = (".tokenizer", ".pretrained", ".architecture")
_PREFIX, _TEMPORARY = "step_", ".tmp"
_AVERAGE = "ema"


def save_checkpoint(
    root: Path, *, step: int, state: PortableState, facts: dict[str, Any], run_yaml: str, modalities: Path, keep: int
) -> Path:
    """Writes `root/step_NNNNNNNN` and removes the oldest beyond `keep`. Rank 0 only.

    Args:
        modalities: the folder of `ModelConfig.save_files`; with its copy a checkpoint alone is the whole model.
    """
    final = root / f"{_PREFIX}{step:08d}"
    temporary = root / (final.name + _TEMPORARY)
    for leftover in root.glob(f"{_PREFIX}*{_TEMPORARY}"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    for kind, tensors in state.items():
        save_file(tensors, temporary / f"{kind}.safetensors")
    (temporary / STATE).write_text(json.dumps({"step": step, **facts}, indent=1))
    (temporary / RUN).write_text(run_yaml)
    shutil.copytree(modalities, temporary / MODALITIES)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    fingerprints = {path.relative_to(temporary).as_posix(): _fingerprint(path) for path in files}
    (temporary / MANIFEST).write_text(json.dumps(fingerprints, indent=1))
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(root)
    for folder in root.glob(f"{_PREFIX}*[0-9]"):
        if folder.name > final.name:  # damaged, or resume would have gone on from there
            shutil.rmtree(folder)
    for old in complete_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


def complete_checkpoints(root: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first; others are named in a warning and left alone."""
    complete = []
    for folder in sorted(root.glob(f"{_PREFIX}*[0-9]")):
        try:
            verify_checkpoint(folder)
            complete.append(folder)
        except CheckpointError as error:
            logger.warning("not used: %s", error)
    return complete


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user names: `path` itself, or the newest complete one where it is a run's folder."""
    complete = complete_checkpoints(path / CHECKPOINTS) if (path / CHECKPOINTS).is_dir() else []
    return complete[-1] if complete else path


def verify_checkpoint(folder: Path, *, contents: bool = False) -> None:
    """Compares the files with the manifest: sizes, and with `contents` checksums too.

    Raises:
        CheckpointError: not a checkpoint, or not as it was written.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())
        sizes = {name: fingerprint["bytes"] for name, fingerprint in files.items()}
        _ = sizes[STATE], sizes[RUN]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: is no complete checkpoint (no readable {MANIFEST}); give a folder step_NNNNNNNN of a run"
        ) from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} is missing or has another size than when it was written")
        if contents and _fingerprint(path) != files[name]:
            raise CheckpointError(f"{folder}: {name} has changed since it was written (checksum)")


def read_facts(folder: Path) -> dict[str, Any]:
    """Step, plan and versions of a checkpoint.

    Raises:
        CheckpointError: damaged since it was written.
    """
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {STATE} is not readable: {error}") from error


def load_stored_run(folder: Path, *, overrides: Iterable[str] = ()) -> tuple[RunConfig, ModelConfig]:
    """The run that wrote a checkpoint, and its model as the checkpoint holds it; see `stored_model`.

    Raises:
        ConfigError: wrong overrides, or of what the checkpoint has in files.
    """
    overrides = tuple(overrides)
    for setting in (override.partition("=")[0] for override in overrides):
        if setting.startswith("model.modalities.") and setting.endswith(_IN_FILES):
            raise ConfigError(f"--set {setting}: the checkpoint {folder} has its own, which its weights belong to")
    run = load_run(str(folder / RUN), overrides=overrides)
    return run, stored_model(run.model, folder)


def stored_model(model: ModelConfig, folder: Path) -> ModelConfig:
    """The settings of a run's model, with tokenizers and structures from its checkpoint: no hub is asked again."""
    files = folder / MODALITIES
    return model.with_files(files) if files.is_dir() else model  # checkpoints of earlier versions have none


def load_weights(task: nn.Module, folder: Path, *, averaged: bool = False) -> None:
    """Puts a checkpoint's weights into an unwrapped task.

    Args:
        averaged: the moving average instead of the last ones, where the run kept one (`train.ema_decay`).
    Raises:
        CheckpointError: damaged, or the weights of another model; names the first differences.
    """
    averaged = averaged and _AVERAGE in _kinds(folder)
    if averaged:
        logger.info("%s: taking the moving average of the weights", folder)
    stored = _load(folder, _AVERAGE if averaged else "model")
    ours = task.state_dict()
    wrong = [name for name in ours if name not in stored or stored[name].shape != ours[name].shape]
    wrong += sorted(name for name in stored if name not in ours)
    if wrong:
        raise CheckpointError(
            f"{folder}: holds another model; {len(wrong)} weights differ, such as {', '.join(wrong[:3])}"
        )
    task.load_state_dict(stored)


def load_portable_state(folder: Path) -> PortableState:
    """All tensors of a checkpoint, on the CPU."""
    return {kind: _load(folder, kind) for kind in _kinds(folder)}


def _kinds(folder: Path) -> tuple[str, ...]:
    """Of tensors that a checkpoint holds."""
    return ("model", *MOMENTS, *([_AVERAGE] if (folder / f"{_AVERAGE}.safetensors").is_file() else []))


def _load(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / f"{kind}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {kind}.safetensors is not readable: {error}") from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, _hash).hexdigest()}


def _hash():
    return hashlib.blake2b(digest_size=16)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
