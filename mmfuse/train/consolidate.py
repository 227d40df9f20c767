"""A checkpoint for use alone: whole weights under their names in one file, a third of the bytes or less."""

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from mmfuse.errors import CheckpointError, ConfigError
from mmfuse.train.checkpoint import (
    CHECKPOINTS,
    CONSOLIDATED,
    MODALITIES,
    RUN,
    choose_kind,
    complete_files,
    read_facts,
    read_weights,
    rename_folder,
    verify_checkpoint,
)
from mmfuse.train.engines.base import MODEL
from mmfuse.train.state_files import StoredState, write_whole
from mmfuse.version import VERSION


def _check_output(out: Path) -> None:
    """Refuses a place where a consolidated checkpoint must not go.

    Raises:
        ConfigError: it is there already, or lies among a run's checkpoints.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; choose another folder, or remove it")
    if out.absolute().parent.name == CHECKPOINTS:
        raise ConfigError(
            f"--out {out}: lies among the checkpoints of a run, which could not go on from it; choose another folder"
        )


def consolidate_checkpoint(
    checkpoint: Path, out: Path, *, averaged: bool = True, on_read: Callable[[int], object] = lambda _: None
) -> None:
    """Writes whole weights and all that loading them needs as the checkpoint `out`; complete, or nothing is there.

    Args:
        averaged: the moving average of the weights, where the run kept one, not the last ones.
        on_read: as of `verify_checkpoint`, which comes first.
    Raises:
        CheckpointError: damaged, or `out` cannot be written.
        ConfigError: `out` is there already, or lies among a run's checkpoints.
    """
    _check_output(out)
    verify_checkpoint(checkpoint, contents=True, on_read=on_read)
    stored, facts = StoredState(checkpoint), read_facts(checkpoint)
    kind = choose_kind(stored, averaged=averaged)
    origin = {"from": checkpoint.absolute().name, "weights": kind, "mmfuse": VERSION}
    temporary = out.with_name(f"{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_whole(temporary / f"{MODEL}.safetensors", read_weights(stored, kind))
        shutil.copyfile(checkpoint / RUN, temporary / RUN)
        if (checkpoint / MODALITIES).is_dir():  # checkpoints of earlier versions have none
            shutil.copytree(checkpoint / MODALITIES, temporary / MODALITIES)
        complete_files(temporary, {}, facts={CONSOLIDATED: origin, **facts})  # of the first time, if twice
        rename_folder(temporary, out)
    except (OSError, SafetensorError) as error:  # a full disk may be either
        raise CheckpointError(f"{out}: cannot be written: {error}; make room there, or choose another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
