"""`mmfuse shards`: the part of the command line that works on tars."""

import argparse
import json
import os
import sys
from pathlib import Path

from mmfuse.errors import ShardError


def add_shards(commands) -> None:
    """All commands of `mmfuse shards` with their help."""
    shards = commands.add_parser(
        "shards",
        help="index, check and count WebDataset tar shards",
        description="Works on tar files made by anyone: img2dataset, webdataset, tar.",
    ).add_subparsers(title="commands", required=True, metavar="COMMAND")

    index = shards.add_parser(
        "index",
        help="write the small index that reading needs beside every shard",
        description="Walks every header once, checks it, and writes NAME.tar.mmindex and the folder's manifest. Shards "
        "whose size and time of change are those of the manifest are left as they are, so an interrupted command goes "
        "on where it stopped. Remote shards are fetched, --jobs at a time, and deleted again.",
        epilog="Examples: mmfuse shards index /data/pictures   mmfuse shards index my_pictures.yaml   "
        "mmfuse shards index --index-dir indexes 's3://bucket/pictures/{00000..00127}.tar'",
    )
    index.add_argument("--force", action="store_true", help="index again, whatever is there")
    index.add_argument("--checksum", action="store_true", help="record checksums of local tars too (reads every byte)")
    index.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="shards at a time (%(default)s)"
    )
    index.add_argument(
        "--index-dir", type=Path, metavar="DIR", help="put indexes here; for remote shards and read-only folders"
    )
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
        command.add_argument("paths", nargs="+", metavar="PATH", help="tars, folders, patterns, URLs, or a recipe")


# The commands import what they need when they run: `mmfuse --help` must not wait for torch.


def _shards_index(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmfuse.shards.index import index_shards

    shards = _find(options.paths, index_folder=options.index_dir)
    results = index_shards(shards, jobs=options.jobs, force=options.force, checksum=options.checksum)
    damaged, samples, kept = 0, 0, 0
    for result in tqdm(results, total=len(shards), desc="indexing", unit="shard", leave=False, disable=None):
        if isinstance(result.outcome, ShardError):
            damaged += 1
            tqdm.write(f"mmfuse: error: {result.outcome}", file=sys.stderr)
        else:
            samples, kept = samples + result.outcome.samples, kept + (not result.is_new)
    found = f"{len(shards) - damaged} shards with {samples:,} samples are indexed"
    print(found + (f" ({kept} were up to date)" if kept else "") + (f"; {damaged} are damaged" if damaged else ""))
    return ShardError.exit_code if damaged else 0


def _find(paths: list[str], *, index_folder: Path | None) -> "list[Shard]":
    """Shards that are named by files, folders, patterns, URLs, or a recipe for all its splits."""
    from mmfuse.data.recipe import find_split, load_recipe, place_shards
    from mmfuse.data.urls import find_shards

    shards = []
    for name in (path for path in paths if path.endswith((".yaml", ".yml"))):
        recipe, place = load_recipe(name)
        shards += [shard for split in recipe.splits for shard in find_split(recipe, split, place=place)]
    if plain := tuple(path for path in paths if not path.endswith((".yaml", ".yml"))):
        shards += place_shards(find_shards(plain), index_folder=index_folder)
    return list(dict.fromkeys(shards))


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
