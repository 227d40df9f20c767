"""`mmfuse`: the only place that reads the command line or prints."""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from mmfuse.cli_checkpoint import add_checkpoint, add_checkpoints, add_last_weights
from mmfuse.cli_doctor import add_doctor
from mmfuse.cli_shards import add_paths, add_shards
from mmfuse.errors import ConfigError, MmfuseError, Stopped
from mmfuse.launch import forget_outcome, tell_launcher
from mmfuse.log import set_up_logging
from mmfuse.version import VERSION

_GLOBAL_ERRORS = (ConfigError, Stopped)
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
        stopped = isinstance(error, Stopped)
        if rank == 0 or not (error.on_all_ranks or isinstance(error, _GLOBAL_ERRORS)):
            print(f"mmfuse: {error}" if stopped else f"mmfuse: error: {error}", file=sys.stderr)
        is_told = tell_launcher(error.exit_code)
        return 0 if stopped and is_told else error.exit_code  # anything but 0 looks to torchrun like a crash


def build_parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    parser = argparse.ArgumentParser(
        prog="mmfuse",
        description="Trains and evaluates text + image + audio models on WebDataset tar shards, "
        "from samples with any subset of the three.",
        epilog="Exit codes: 2 wrong settings, 3 wrong data, 4 wrong checkpoint, 5 wrong launch, "
        "6 training failed, 75 stopped on request, hung, or rolled back: started again, it goes on.",
    )
    parser.add_argument("--version", action="version", version=f"mmfuse {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_embed(commands)
    add_checkpoints(commands)
    add_shards(commands)
    add_doctor(commands)
    return parser


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a run, or continue it from its newest checkpoint",
        description="Trains RUN in this process. Through `accelerate launch -m mmfuse train RUN`, or launch/train.sh, "
        "it is one of many. Started again, it goes on from the newest complete checkpoint in its folder, or at its "
        "train.checkpoint_url.",
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
    add_checkpoint(evaluate)
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: CHECKPOINT.evaluation, of a URL here)"
    )
    add_last_weights(evaluate, verb="score")
    evaluate.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    _add_overrides(evaluate)
    evaluate.set_defaults(command=_evaluate)


def _add_embed(commands) -> None:
    embed = commands.add_parser(
        "embed",
        help="write the embeddings of every sample of shards",
        description="Embeds every modality of every sample and, where the model has a fusion, the whole sample as "
        "`fused`, shard by shard. Through `torchrun --nproc_per_node N -m mmfuse embed ...` the shards are dealt to N "
        "processes. Started again, on any number of processes, it goes on with the shards that are missing. "
        "manifest.json, completed last, tells what the rows are; part-NNNNN.keys.jsonl names them. "
        "evaluation.batch_size is that of one process.",
        epilog="Examples: mmfuse embed runs/quickstart data_shards/recipes/emoji_sample.yaml --split new_drawings "
        "--out embedded   mmfuse embed CHECKPOINT /data/pictures --out embedded --set evaluation.batch_size=512",
    )
    add_checkpoint(embed)
    add_paths(embed)
    embed.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the embeddings go")
    embed.add_argument("--split", metavar="NAME", help="of the recipe (needed where it has several)")
    embed.add_argument("--layout", choices=("safetensors", "npy"), default="safetensors", help="form of the files")
    embed.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the stored numbers")
    _add_overrides(embed)
    embed.set_defaults(command=_embed)


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

    forget_outcome()
    # `launch/train.sh` hides it from the launcher, which could not end processes that begin.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run = load_run(options.run, overrides=options.overrides)
    from mmfuse.train.trainer import train

    try:
        train(run)
    except MmfuseError:
        raise
    except Exception:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        # At once: on its way out Python would wait for loader workers, and all ranks for this one.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(MmfuseError.exit_code)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from mmfuse.train.checkpoint_store import find_checkpoint, is_url
    from mmfuse.train.environment import find_device
    from mmfuse.train.evaluation import evaluate_checkpoint

    device = find_device(options.device)
    checkpoint = find_checkpoint(options.checkpoint).absolute()  # `.` has no name beside which a report could stand
    evaluate_checkpoint(
        checkpoint,
        output=options.out or (Path(f"{checkpoint.name}.evaluation") if is_url(options.checkpoint) else None),
        overrides=options.overrides,
        device=device,
        averaged=not options.last_weights,
    )
    return 0


def _embed(options: argparse.Namespace) -> int:
    from mmfuse.data.recipe import choose_split
    from mmfuse.embed.shards import embed_shards
    from mmfuse.embed.store import Form

    chosen = choose_split(options.paths, split=options.split, index_folder=options.index_dir)
    form = Form(options.layout, options.dtype)
    embed_shards(options.checkpoint, chosen, out=options.out, form=form, overrides=options.overrides)
    return 0
