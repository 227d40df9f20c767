"""`mmfuse shards build` and `convert`: the part of the command line that writes tars."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfuse.errors import ConfigError

if TYPE_CHECKING:
    from mmfuse.shards.output import Progress


def add_build(commands: Any) -> None:
    """`mmfuse shards build` with its help."""
    build = commands.add_parser(
        "build",
        help="write shards from a table of paths and captions, or from a folder of files",
        description="Writes NAME-000000.tar, ... with their indexes and the recipe NAME.yaml into OUT. Bytes are "
        "copied, not encoded again. The same input gives the same bytes, whatever --jobs is; started again, it goes on "
        "where it stopped. Files that cannot be read are left out, counted, and named in build_problems.jsonl.",
        epilog="Columns called text, caption, captions, image or audio are taken where none is named. "
        "Examples: mmfuse shards build captions.csv --out shards/mine --image path --caption title   "
        "mmfuse shards build pictures/ --out shards/mine --caption-from-folder 'a photo of a {}'",
    )
    build.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="CSV, JSONL or Parquet tables, or a folder"
    )
    _add_output(build)
    table = build.add_argument_group("tables")
    for modality in ("image", "audio", "text"):
        table.add_argument(f"--{modality}", metavar="COLUMN", help=f"column with the path of the {modality} file")
    table.add_argument(
        "--caption", action="append", default=[], metavar="COLUMN", help="column with captions; may repeat"
    )
    table.add_argument("--key", metavar="COLUMN", help="column with the key (default: the number of the row)")
    table.add_argument(
        "--keep", action="append", default=[], metavar="COLUMN", help="keep in a .json member; may repeat"
    )
    table.add_argument(
        "--root", type=Path, metavar="DIR", help="what paths are relative to (default: the table's folder)"
    )
    folder = build.add_argument_group("folders")
    folder.add_argument(
        "--layout",
        choices=("together", "parallel"),
        default="together",
        help="together: a/1.jpg and a/1.txt are one sample; parallel: images/1.jpg and captions/1.txt are",
    )
    folder.add_argument(
        "--caption-from-folder", metavar="TEXT", help="caption where there is no text; {} is the folder"
    )
    folder.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="leave out such files")
    build.add_argument("--caption-lines", action="store_true", help="text files hold one caption a line")
    build.add_argument("--no-shuffle", action="store_true", help="keep the order of the input")
    build.add_argument("--seed", type=int, default=0, help="of the shuffle and the validation split")
    build.add_argument("--shard-mib", type=float, default=256, help="about the size of a shard (default: 256)")
    build.add_argument("--samples-per-shard", type=int, metavar="N", help="at most so many")
    build.add_argument(
        "--validation", type=float, default=0.0, metavar="SHARE", help="rows that become a split of their own"
    )
    build.add_argument("--max-problems", type=float, default=0.01, metavar="SHARE", help="stop above (default: 0.01)")
    build.set_defaults(command=_build)


def add_convert(commands: Any) -> None:
    """`mmfuse shards convert` with its help."""
    convert = commands.add_parser(
        "convert",
        help="make what other tools wrote trainable: a recipe, and new tars only where something must change",
        description="Knows img2dataset, Megatron-Energon, plain WebDataset tars and folders of files. Tars that can be "
        "read as they are stay where they are; packed tars, scattered members, dotted keys and pickles are rewritten "
        "into OUT. No pickle is ever opened.",
        epilog="Example: mmfuse shards convert /data/energon_set --out shards/mine",
    )
    convert.add_argument("folder", type=Path, metavar="FOLDER")
    _add_output(convert)
    convert.add_argument(
        "--dotted-keys", action="store_true", help="keys hold dots: the extension begins at the last dot of a name"
    )
    convert.set_defaults(command=_convert)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards and the recipe")
    parser.add_argument("--name", help="of recipe and shards (default: the name of OUT)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="shards at a time")


def _build(options: argparse.Namespace) -> int:
    from mmfuse.config import validate
    from mmfuse.shards.build import BuildConfig, build_shards

    paths = {m: column for m in ("image", "audio", "text") if (column := getattr(options, m))}
    settings = {
        "name": options.name or options.out.absolute().name,
        "table": {
            "paths": paths,
            "captions": options.caption,
            "key": options.key,
            "keep": options.keep,
            "root": options.root,
        },
        "folder": {"layout": options.layout, "caption": options.caption_from_folder, "ignore": options.ignore},
        "caption_lines": options.caption_lines,
        "shuffle": not options.no_shuffle,
        "seed": options.seed,
        "shard_mib": options.shard_mib,
        "samples_per_shard": options.samples_per_shard,
        "validation_ratio": options.validation,
        "max_problem_ratio": options.max_problems,
    }
    config = validate(BuildConfig, settings, source="mmfuse shards build")
    return _show(build_shards(tuple(options.inputs), options.out, config=config, jobs=options.jobs), what="building")


def _convert(options: argparse.Namespace) -> int:
    from mmfuse.config import validate
    from mmfuse.shards.convert import ConvertConfig, convert_folder

    settings = {"name": options.name or options.out.absolute().name, "dotted_keys": options.dotted_keys}
    config = validate(ConvertConfig, settings, source="mmfuse shards convert")
    return _show(convert_folder(options.folder, options.out, config=config, jobs=options.jobs), what="converting")


def _show(events: "Iterator[Progress]", *, what: str) -> int:
    """A bar while it lasts, then what came of it."""
    from tqdm import tqdm

    last = None
    with tqdm(desc=what, unit="shard", leave=False, disable=None) as bar:
        for last in events:
            bar.total, bar.n = last.shards or None, last.shards_done
            rows = {} if last.shards else {"rows": f"{last.rows:,}"}
            bar.set_postfix(rows | {"samples": f"{last.samples:,}", "problems": last.problems})
    if last is None or last.recipe is None:
        raise ConfigError(f"nothing came of {what}")
    for note in last.notes:
        print(note, file=sys.stderr)
    print(f"{last.shards_done:,} shards with {last.samples:,} samples, {last.bytes / 2**20:,.1f} MiB")
    if last.problems:
        print(f"{last.problems:,} problems, {last.left_out:,} rows left out, named above or in {last.recipe.parent}")
    print(f"recipe: {last.recipe}")
    return 0
