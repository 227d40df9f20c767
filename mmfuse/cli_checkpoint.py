"""`mmfuse checkpoint`: the part of the command line that looks at checkpoints, and writes them for use elsewhere."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmfuse.errors import CheckpointError

if TYPE_CHECKING:
    from tqdm import tqdm


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT: what `find_checkpoint` takes."""
    where = "a folder step_NNNNNNNN, or a run's folder; or the URL of either (train.checkpoint_url)"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=where)


def add_last_weights(parser: argparse.ArgumentParser, *, verb: str) -> None:
    """--last-weights: not the moving average."""
    parser.add_argument(
        "--last-weights",
        action="store_true",
        help=f"{verb} the weights of the last step also where the run kept a moving average (train.ema_decay)",
    )


def add_checkpoints(commands) -> None:
    """All commands of `mmfuse checkpoint` with their help."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="look at checkpoints, check their files, or write whole weights for use elsewhere",
        description="Works on checkpoints as `mmfuse train` writes them.",
    ).add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_info(checkpoint)
    _add_verify(checkpoint)
    _add_consolidate(checkpoint)


def _add_info(commands) -> None:
    info = commands.add_parser(
        "info",
        help="step, data, weights, files and versions",
        description="Tells what a checkpoint, or the newest complete one of a run, says of itself; reads no weights.",
    )
    add_checkpoint(info)
    info.add_argument("--json", action="store_true", help="print one JSON object instead")
    info.set_defaults(command=_info)


def _add_verify(commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare every byte with the checksums; exit code 4 if anything has changed",
        description="Reads all files of a checkpoint, or of all checkpoints in a run's folder, and compares them with "
        "their checksums; of a URL without step_NNNNNNNN, of the newest.",
    )
    add_checkpoint(verify)
    verify.set_defaults(command=_verify)


def _add_consolidate(commands) -> None:
    consolidate = commands.add_parser(
        "consolidate",
        help="write whole weights in one file, without Adam's moments",
        description="Writes a checkpoint for use elsewhere, which `mmfuse eval`, `mmfuse embed` and `mmfuse.load` "
        "take: model.safetensors with whole fp32 weights under their plain names, for any reader of safetensors, "
        "run.yaml, and tokenizers and structures of the encoders. Training cannot go on from it. The weights of a run "
        "with train.ema_decay are the moving average.",
        epilog="Example: mmfuse checkpoint consolidate runs/quickstart --out quickstart_model",
    )
    add_checkpoint(consolidate)
    consolidate.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    add_last_weights(consolidate, verb="write")
    consolidate.set_defaults(command=_consolidate)


# The commands import what they need when they run: `mmfuse --help` must not wait for torch.


def _info(options: argparse.Namespace) -> int:
    from mmfuse.train.checkpoint_info import describe_checkpoint, to_table
    from mmfuse.train.checkpoint_store import find_checkpoint

    info = describe_checkpoint(find_checkpoint(options.checkpoint))
    print(info.to_json() if options.json else to_table(info))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from mmfuse.files import format_bytes
    from mmfuse.train.checkpoint_info import check_checkpoint, list_checkpoints

    damaged = 0
    for folder in list_checkpoints(options.checkpoint):
        try:
            with _reading_bar(folder) as bar:
                size = check_checkpoint(folder, on_read=bar.update)
        except CheckpointError as error:
            damaged += 1
            print(f"mmfuse: error: {error}", file=sys.stderr)
        else:
            print(f"{folder}: as it was written, {format_bytes(size)}")
    return CheckpointError.exit_code if damaged else 0


def _consolidate(options: argparse.Namespace) -> int:
    from mmfuse.train.checkpoint_store import find_checkpoint
    from mmfuse.train.consolidate import consolidate_checkpoint

    folder = find_checkpoint(options.checkpoint)
    with _reading_bar(folder) as bar:
        consolidate_checkpoint(folder, options.out, averaged=not options.last_weights, on_read=bar.update)
    print(f"{options.out}: the weights of {folder}")
    return 0


def _reading_bar(folder: Path) -> "tqdm":
    """Over the bytes of a checkpoint."""
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return tqdm(total=total, desc=folder.name, unit="B", unit_scale=True, leave=False, disable=None)
