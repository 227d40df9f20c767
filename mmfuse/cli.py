"""`mmfuse`: the only place that reads the command line or prints."""

import argparse
import json
import os
import sys
from pathlib import Path

from mmfuse import __version__
from mmfuse.errors import CheckpointError, ConfigError, LaunchError, MmfuseError, ShardError
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
    _add_shards(commands)
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


def _add_shards(commands) -> None:
    shards = commands.add_parser(
        "shards",
        help="index, check and count WebDataset tar shards",
        description="Works on tar files made by anyone: img2dataset, webdataset, tar.",
    ).add_subparsers(title="commands", required=True, metavar="COMMAND")

    index = shards.add_parser(
        "index",
        help="write the small index that reading needs beside every shard",
        description="Walks every header once, checks it, and writes NAME.tar.mmindex. Shards that have an index of the "
        "right size are left as they are.",
    )
    index.add_argument("--force", action="store_true", help="index again, whatever is there")
    index.set_defaults(command=_shards_index)

    check = shards.add_parser(
        "check",
        help="read and decode every member; exit code 3 if anything is bad",
        description="Indexes where needed, then decodes every picture, text and sound as training would.",
    )
    check.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    check.set_defaults(command=_shards_check, force=True)

    stats = shards.add_parser("stats", help="count samples, modalities and sizes of indexed shards")
    stats.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    stats.set_defaults(command=_shards_stats)
    for command in (index, check, stats):
        command.add_argument("paths", nargs="+", metavar="PATH", help="tar files, glob patterns, or folders of tars")


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


def _shards_index(options: argparse.Namespace) -> int:
    damaged, samples, indexed = _index(options.paths, force=options.force)
    print(
        f"{indexed} shards with {samples:,} samples are indexed" + (f"; {len(damaged)} are damaged" if damaged else "")
    )
    return ShardError.exit_code if damaged else 0


def _index(paths: list[str], *, force: bool) -> tuple[dict[Path, str], int, int]:
    """Indexes with a progress bar and prints what is bad: a message by damaged shard, samples, good shards."""
    from tqdm import tqdm

    from mmfuse.data.checks import index_shards
    from mmfuse.data.recipe import find_shards

    damaged, samples, indexed = {}, 0, 0
    shards = find_shards(tuple(paths))
    for shard, outcome in tqdm(
        index_shards(shards, force=force), total=len(shards), desc="indexing", unit="shard", leave=False, disable=None
    ):
        if isinstance(outcome, ShardError):
            damaged[shard] = str(outcome)
            tqdm.write(f"mmfuse: error: {outcome}", file=sys.stderr)
        else:
            indexed, samples = indexed + 1, samples + len(outcome)
    return damaged, samples, indexed


def _shards_check(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmfuse.config import find_plugin, plugin_names
    from mmfuse.data.checks import check_members
    from mmfuse.data.recipe import find_shards

    damaged, samples, _ = _index(options.paths, force=True)
    modalities = [find_plugin("mmfuse.modalities", name) for name in plugin_names("mmfuse.modalities")]
    readers = {module.__name__: (module.EXTENSIONS, module.Config().build_processor()) for module in modalities}
    bad = list(damaged.values())
    whole = [shard for shard in find_shards(tuple(options.paths)) if shard not in damaged]
    for shard in tqdm(whole, desc="checking", unit="shard", leave=False, disable=None):
        for message in check_members(shard, readers):
            bad.append(message)
            tqdm.write(f"mmfuse: bad: {message}", file=sys.stderr)
    if options.json:
        print(json.dumps({"samples": samples, "bad": bad}, indent=1))
    else:
        print(f"{samples:,} samples checked: " + (f"{len(bad)} problems" if bad else "all good"))
    return ShardError.exit_code if bad else 0


def _shards_stats(options: argparse.Namespace) -> int:
    import numpy as np

    from mmfuse.data.checks import count_shards
    from mmfuse.data.recipe import find_shards

    stats = count_shards(find_shards(tuple(options.paths)))
    sizes = {extension: np.concatenate(parts) for extension, parts in stats.member_bytes.items()}
    if options.json:
        subsets = {"+".join(extensions): count for extensions, count in stats.subsets.items()}
        members = {e: {"count": len(s), "bytes": int(s.sum())} for e, s in sizes.items()}
        counts = {"shards": stats.shards, "samples": stats.samples, "bytes": stats.bytes}
        print(json.dumps({**counts, "subsets": subsets, "members": members}, indent=1))
        return 0
    print(f"{stats.shards} shards, {stats.samples:,} samples, {stats.bytes / 2**20:,.1f} MiB\n")
    print(f"{'members of a sample':<32}{'samples':>12}{'share':>9}")
    for extensions, count in stats.subsets.most_common():
        print(f"{' + '.join(extensions):<32}{count:>12,}{count / stats.samples:>9.1%}")
    print(f"\n{'member':<12}{'count':>12}{'mean bytes':>12}{'median':>10}{'largest':>12}")
    for extension, values in sorted(sizes.items()):
        print(
            f".{extension:<11}{len(values):>12,}{values.mean():>12,.0f}{np.median(values):>10,.0f}{values.max():>12,}"
        )
    return 0
