"""Portable checkpoints: fp32 weights and Adam moments by parameter name, so that any engine on any number of ranks
continues from any other's. Complete or not there: a manifest is written last, then the folder gets its name."""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmfuse.errors import CheckpointError, ConfigError
from mmfuse.model.model import ModelConfig
from mmfuse.train.engines.base import MODEL
from mmfuse.train.manifest import (
    MANIFEST,
    RUN,
    STATE,
    Fingerprints,
    fingerprint_of,
    ignore_count,
    parse_manifest,
    store_file,
    sync,
    write_manifest,
)
from mmfuse.train.run import RunConfig, load_run
from mmfuse.train.state_files import StoredState

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The folder of them within a run's."""
MODALITIES = "modalities"
"""The folder of `ModelConfig.save_files` within a run's, and its copy within each checkpoint."""
_IN_FILES = (".tokenizer", ".pretrained", ".architecture")
_PREFIX, _TEMPORARY, _REMOVED = "step_", ".tmp", ".removed"
AVERAGE = "ema"
"""The kind of the moving average of the weights."""
CONSOLIDATED = "consolidated"
"""The fact of a checkpoint that holds weights alone: from where, and which of its kinds."""


class Keep(NamedTuple):
    """Which checkpoints of a run are not removed."""

    newest: int
    """So many."""
    multiples_of: int | None
    """And every one whose step is a multiple of this."""

    def for_good(self, step: int) -> bool:
        """Whether that of `step` stays however old it is."""
        return bool(self.multiples_of) and step % self.multiples_of == 0


def folder_name(step: int) -> str:
    """`step_NNNNNNNN`."""
    return f"{_PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None: it is no such name."""
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdecimal() else None


def unfinished_folder(root: Path, step: int) -> Path:
    """The temporary folder into which every rank writes its part of the checkpoint of `step`."""
    return root / f"{folder_name(step)}{_TEMPORARY}"


def begin_checkpoint(root: Path, step: int) -> Path:
    """Makes the `unfinished_folder`."""
    temporary = unfinished_folder(root, step)
    temporary.mkdir(parents=True, exist_ok=True)
    return temporary


def remove_unfinished(root: Path) -> None:
    """Removes what a run left that was killed while it wrote or removed."""
    for leftover in root.glob(f"{_PREFIX}*{_TEMPORARY}"):
        shutil.rmtree(leftover)
    remove_set_aside(root)


def set_aside(folders: Iterable[Path]) -> None:
    """Takes checkpoints their names: a kill while one is removed must not leave a part of it under its own."""
    for folder in folders:
        folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{_REMOVED}"))


def remove_set_aside(root: Path) -> None:
    """Removes what was set aside; where somebody reads it on a network file system, the next call tries again."""
    for folder in root.glob(f"{_PREFIX}*{_REMOVED}"):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("an old checkpoint could not be removed: %s", error)


def publish_checkpoint(temporary: Path, written: Fingerprints, *, facts: dict[str, Any], keep: Keep) -> Path:
    """Completes what all ranks wrote and gives it its name; removes what need not be kept. Rank 0 only.

    Args:
        written: of the files of all ranks.
    Raises:
        CheckpointError: files that other ranks wrote are not here.
    """
    for name, fingerprint in written.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != fingerprint["bytes"]:
            raise CheckpointError(
                f"{path}: written by another rank, but not seen here: nodes must share output_dir, or "
                "write to train.checkpoint_url"
            )
    final = temporary.with_name(temporary.name.removesuffix(_TEMPORARY))
    complete_files(temporary, written, facts=facts)
    set_aside([final] if final.exists() else [])
    rename_folder(temporary, final)
    set_aside(_unwanted(final, keep))
    remove_set_aside(final.parent)
    return final


def complete_files(temporary: Path, written: Fingerprints, *, facts: dict[str, Any]) -> None:
    """Adds the facts and, last, the manifest of all files, and makes sure that all are on the disk.

    Args:
        written: of files that are on the disk.
    """
    (temporary / STATE).write_text(json.dumps(facts, indent=1))
    added = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    added = [path for path in added if path.relative_to(temporary).as_posix() not in written]
    manifest = written | {path.relative_to(temporary).as_posix(): store_file(path) for path in added}
    write_manifest(temporary, manifest)
    for path in (temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary):
        sync(path)


def rename_folder(temporary: Path, final: Path) -> None:
    """Gives a folder its name, also on the disk."""
    temporary.rename(final)
    sync(final.parent)


def _unwanted(newest: Path, keep: Keep) -> list[Path]:
    folders = checkpoint_folders(newest.parent)
    newer = [folder for folder in folders if folder.name > newest.name]  # damaged, or resume would have taken it
    old = [folder for folder in complete_checkpoints(newest.parent) if folder not in newer][: -keep.newest]
    return newer + [folder for folder in old if not keep.for_good(step_of(folder.name) or 0)]


def checkpoint_folders(root: Path) -> list[Path]:
    """The run's checkpoints, oldest first, also those that are not whole."""
    return sorted(root.glob(f"{_PREFIX}*[0-9]"))


def complete_checkpoints(root: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first; others are named in a warning and left alone."""
    complete = []
    for folder in checkpoint_folders(root):
        try:
            verify_checkpoint(folder)
            complete.append(folder)
        except CheckpointError as error:
            logger.warning("not used: %s", error)
    return complete


def read_manifest(folder: Path) -> Fingerprints:
    """Size and checksum of a checkpoint's files as they were written.

    Raises:
        CheckpointError: not a checkpoint.
    """
    try:
        return parse_manifest((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: is no complete checkpoint (no readable {MANIFEST}); give a folder step_NNNNNNNN of a run"
        ) from error


def verify_checkpoint(folder: Path, *, contents: bool = False, on_read: Callable[[int], object] = ignore_count) -> None:
    """Compares the files with the manifest: sizes, and with `contents` checksums too.

    Args:
        on_read: is told how many bytes were read, each time that some were.
    Raises:
        CheckpointError: not a checkpoint, or not as it was written.
    """
    files = read_manifest(folder)
    for name, fingerprint in files.items():
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size != fingerprint["bytes"]:
                raise CheckpointError(f"{folder}: {name} is missing or has another size than when it was written")
            if contents and fingerprint_of(path, on_read) != fingerprint:
                raise CheckpointError(f"{folder}: {name} has changed since it was written (checksum)")
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} is not readable: {error}") from error


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
        CheckpointError: damaged, or the weights of another model; names the first differences. Or the last weights are
            wanted of a checkpoint that was consolidated without them.
    """
    stored = StoredState(folder)
    weights = read_weights(stored, choose_kind(stored, averaged=averaged))
    ours = task.state_dict()
    wrong = [name for name in ours if name not in weights or weights[name].shape != ours[name].shape]
    wrong += sorted(name for name in weights if name not in ours)
    if wrong:
        raise CheckpointError(
            f"{folder}: holds another model; {len(wrong)} weights differ, such as {', '.join(wrong[:3])}"
        )
    task.load_state_dict(weights)


def choose_kind(stored: StoredState, *, averaged: bool) -> str:
    """The kind of weights that is wanted and there: the moving average or the last ones.

    Raises:
        CheckpointError: it was consolidated without them.
    """
    if averaged and AVERAGE in stored.kinds:
        logger.info("%s: taking the moving average of the weights", stored.folder)
        return AVERAGE
    if not averaged and read_facts(stored.folder).get(CONSOLIDATED, {}).get("weights") == AVERAGE:
        raise CheckpointError(
            f"{stored.folder}: holds the moving average of the weights alone. For those of the last step, consolidate "
            "with --last-weights, or take the checkpoint that it was made from"
        )
    return MODEL


def read_weights(stored: StoredState, kind: str) -> dict[str, Tensor]:
    """All weights and buffers by name: of `kind` where it has them, else the last ones."""
    chosen = stored.shapes(kind)
    return {name: stored.tensor(kind if name in chosen else MODEL, name) for name in stored.shapes(MODEL)}
