"""`mmfuse`: the only place that reads the command line or prints."""

import argparse
import os
import sys
from pathlib import Path

from mmfuse import __version__
from mmfuse.cli_shards import add_shards
from mmfuse.errors import CheckpointError, ConfigError, LaunchError, MmfuseError
from mmfuse.log import set_up_logging

_GLOBAL_ERRORS = (ConfigError, CheckpointError, LaunchError)
"""Errors that every rank meets; rank 0 speaks for all."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers fork after the tokenizer was used
    parser = build_parser()
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    set_up_logging(rank=rank)
    try:
        return options.command(options)
    except MmfuseError as error:
        if rank == 0 or not isinstance(error, _GLOBAL_ERRORS):
            print(f"mmfuse: error: {error}", file=sys.stderr)
        return error.exit_code


def build_parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    parser = argparse.ArgumentParser(
        prog="mmfuse",
        description="Trains and evaluates text + image + audio models on WebDataset tar shards, "
        "from samples with any subset of the three.",
        epilog="Exit codes: 2 wrong settings, 3 wrong data, 4 wrong checkpoint, 5 wrong launch, 6 training failed.",
    )
    parser.add_argument("--version", action="version", version=f"mmfuse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    add_shards(commands)
    return parser


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a run, or continue it from its newest checkpoint",
        description="Trains RUN in this process. Through `accelerate launch -m mmfuse train RUN`, or launch/train.sh, "
        "it is one of many. Started again, it goes on from the newest complete checkpoint in its folder.",
        epilog="Example: mmfuse train quickstart --set train.steps=50 --set output_dir=runs/short",
    )
    train.add_argument("run", metavar="RUN", help="a YAML file, or the name of a run that ships with mmfuse")
    _add_overrides(train)
    train.set_defaults(command=_train)


def _add_eval(commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="score a checkpoint: retrieval in all directions, beside chance and a random model",
        description="Evaluates a checkpoint, in this one process, on its run's validation sets and writes report.html "
        "and report.json.",
        epilog="Example: mmfuse eval runs/quickstart/checkpoints/step_00000400",
    )
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a folder step_NNNNNNNN of a run")
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: CHECKPOINT.evaluation)"
    )
    evaluate.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    _add_overrides(evaluate)
    evaluate.set_defaults(command=_evaluate)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME.NAME=VALUE",
        dest="overrides",
        help="change one setting of the run; the value is YAML; may be given many times",
    )


# The commands import what they need when they run: `mmfuse --help` must not wait for torch.


def _train(options: argparse.Namespace) -> int:
    from mmfuse.train.run import load_run

    run = load_run(options.run, overrides=options.overrides)
    from mmfuse.train.trainer import train

    train(run)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    import torch

    from mmfuse.train.evaluation import evaluate_checkpoint

    cuda = torch.cuda.is_available()
    try:
        device = torch.device(options.device or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {options.device}: no such device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not cuda:
        raise ConfigError(f"--device {options.device}: torch sees no CUDA device here")
    checkpoint = options.checkpoint.absolute()  # `.` has no name beside which a report could stand
    evaluate_checkpoint(checkpoint, output=options.out, overrides=options.overrides, device=device)
    return 0
