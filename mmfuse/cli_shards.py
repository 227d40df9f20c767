"""`mmfuse shards`: the part of the command line that works on tars."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmfuse.cli_build import add_build, add_convert
from mmfuse.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmfuse.data.recipe import MemberRule, Shard


def add_shards(commands) -> None:
    """All commands of `mmfuse shards` with their help."""
    shards = commands.add_parser(
        "shards",
        help="index, check, count, look at, build and convert WebDataset tar shards",
        description="Works on tar files made by anyone: img2dataset, webdataset, tar.",
    ).add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_index, _add_check, _add_stats, _add_view, _add_quarantine):
        add(shards)
    add_build(shards)
    add_convert(shards)


def add_paths(parser: argparse.ArgumentParser) -> None:
    """PATH and --index-dir: the shards that a command works on."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="tars, folders, patterns, URLs, or a recipe")
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help="folder of the indexes, if not beside the tars")


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")


def _add_index(commands) -> None:
    index = commands.add_parser(
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
    _add_jobs(index)
    add_paths(index)
    index.set_defaults(command=_index)


def _add_check(commands) -> None:
    check = commands.add_parser(
        "check",
        help="read and decode every member; exit code 3 if anything is bad",
        description="Compares every tar with its index, then decodes every picture, text and sound as training would. "
        "A member that crashes or hangs its decoder is named like any other. Tars without an index get one first.",
    )
    check.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    check.add_argument("--findings", type=Path, metavar="FILE", help="write each finding as a line of JSON")
    check.add_argument("--member-seconds", type=float, default=60.0, help="longest time over one member (default: 60)")
    _add_jobs(check)
    add_paths(check)
    check.set_defaults(command=_check)


def _add_stats(commands) -> None:
    stats = commands.add_parser(
        "stats",
        help="count samples, modalities and sizes; with --probe also resolutions, durations and caption lengths",
        description="Reads the indexes alone, or with --probe also the headers of pictures and sounds, and the texts.",
    )
    stats.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    stats.add_argument("--probe", action="store_true", help="also read resolutions, durations, caption lengths")
    stats.add_argument("--limit", type=int, metavar="N", help="probe so many samples, of every shard its share")
    stats.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    _add_jobs(stats)
    add_paths(stats)
    stats.set_defaults(command=_stats)


def _add_view(commands) -> None:
    view = commands.add_parser(
        "view",
        help="a page of samples: pictures, playable sound, texts",
        description="Writes one self-contained page of samples drawn from all shards, of given keys, or of those that "
        "a check or a run found bad.",
        epilog="Example: mmfuse shards view data/emoji --out samples.html --samples 60",
    )
    view.add_argument("--out", type=Path, default=Path("samples.html"), metavar="FILE", help="default: samples.html")
    view.add_argument("--samples", type=int, default=48, metavar="N", help="so many, drawn evenly (default: 48)")
    view.add_argument("--seed", type=int, default=0, help="of the draw")
    view.add_argument("--key", action="append", default=[], metavar="KEY", help="this one instead; may repeat")
    view.add_argument("--findings", type=Path, metavar="FILE", help="those that the lines of this JSONL name instead")
    view.add_argument("--augment", type=int, default=0, metavar="N", help="also N times as training would see them")
    _add_jobs(view)
    add_paths(view)
    view.set_defaults(command=_view)


def _add_quarantine(commands) -> None:
    quarantine = commands.add_parser(
        "quarantine",
        help="leave out samples that runs, or a check, found bad",
        description="Takes samples out of the manifests, so that they are not dealt any more. The index hash changes: "
        "a run that has begun refuses to go on with another order. `mmfuse shards index --force` takes all back.",
        epilog="Example: mmfuse shards quarantine my_pictures.yaml --from runs/my_run",
    )
    quarantine.add_argument(
        "--from", action="append", type=Path, required=True, dest="places", metavar="PLACE", help="run folder or JSONL"
    )
    quarantine.add_argument("--any-member", action="store_true", help="also samples that have a good member left")
    add_paths(quarantine)
    quarantine.set_defaults(command=_quarantine)


# The commands import what they need when they run: `mmfuse --help` must not wait for torch.


def _index(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmfuse.shards.index import compare_with_img2dataset, index_shards

    shards = _find(options.paths, index_folder=options.index_dir)
    results = index_shards(shards, jobs=options.jobs, force=options.force, checksum=options.checksum)
    damaged, samples, kept, done = 0, 0, 0, []
    for result in tqdm(results, total=len(shards), desc="indexing", unit="shard", leave=False, disable=None):
        done.append(result)
        if isinstance(result.outcome, ShardError):
            damaged += 1
            tqdm.write(f"mmfuse: error: {result.outcome}", file=sys.stderr)
        else:
            samples, kept = samples + result.outcome.samples, kept + (not result.is_new)
    notes = [result.note for result in done if result.note]
    for note in (*notes, *compare_with_img2dataset(done)):
        print(f"mmfuse: warning: {note}", file=sys.stderr)
    found = f"{len(shards) - damaged} shards with {samples:,} samples are indexed"
    print(found + (f" ({kept} were up to date)" if kept else "") + (f"; {damaged} are damaged" if damaged else ""))
    return ShardError.exit_code if damaged else 0


def _find(paths: list[str], *, index_folder: Path | None) -> "list[Shard]":
    """Shards that are named by files, folders, patterns, URLs, or a recipe for all its splits."""
    from mmfuse.data.recipe import find_split, load_recipe, place_shards
    from mmfuse.data.remote.urls import find_shards

    recipes = [path for path in paths if path.endswith((".yaml", ".yml"))]
    if recipes and index_folder:
        raise ConfigError(f"--index-dir does not go with {recipes[0]}: set `index` in the recipe")
    shards = []
    for name in recipes:
        recipe, place = load_recipe(name)
        shards += [shard for split in recipe.splits for shard in find_split(recipe, split, place=place)]
    if plain := tuple(path for path in paths if path not in recipes):
        shards += place_shards(find_shards(plain), index_folder=index_folder)
    return list(dict.fromkeys(shards))


def _rules(paths: list[str]) -> "Mapping[str, MemberRule] | None":
    """The member rules of the only recipe that is named; else each modality's own."""
    from mmfuse.data.recipe import load_recipe

    return load_recipe(paths[0])[0].members if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")) else None


def _check(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmfuse.data.manifest import read_manifest
    from mmfuse.shards.check import check_shards
    from mmfuse.shards.findings import CheckSummary, write_findings
    from mmfuse.shards.index import index_shards

    shards = _find(options.paths, index_folder=options.index_dir)
    known = {folder: read_manifest(folder) for folder in {shard.index_folder for shard in shards}}
    unknown = [shard for shard in shards if shard.name not in known[shard.index_folder]]
    for _ in index_shards(unknown, jobs=options.jobs):
        pass  # what is damaged is found again below, with its kind
    summary = CheckSummary()
    parts = check_shards(
        shards, rules=_rules(options.paths), num_workers=options.jobs, member_seconds=options.member_seconds
    )
    with contextlib.ExitStack() as stack:
        if options.findings:
            parts = write_findings(parts, stack.enter_context(open(options.findings, "w", encoding="utf-8")))
        for checked in tqdm(parts, desc="checking", leave=False, disable=None):
            summary.add(checked)
            for finding in checked.findings:
                tqdm.write(finding.to_line(), file=sys.stderr)
    print(summary.to_json() if options.json else summary.to_table())
    return summary.exit_code


def _stats(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmfuse.data.remote.urls import show_url
    from mmfuse.files import write_text
    from mmfuse.shards.stats import collect_stats
    from mmfuse.shards.stats_table import to_table

    progress = collect_stats(
        _find(options.paths, index_folder=options.index_dir),
        rules=_rules(options.paths),
        probe=options.probe,
        limit=options.limit,
        num_workers=options.jobs,
    )
    *_, stats = tqdm(progress, desc="reading", leave=False, disable=None)
    print(stats.to_json() if options.json else to_table(stats))
    if options.html:
        from mmfuse.shards.stats_page import render_stats

        write_text(options.html, render_stats(stats, title=" ".join(map(show_url, options.paths))))
        print(f"page: {options.html}", file=sys.stderr)
    return 0


def _quarantine(options: argparse.Namespace) -> int:
    from mmfuse.shards.quarantine import read_bad_keys, skip_samples

    bad = read_bad_keys(options.places, any_member=options.any_member)
    added = 0
    for skipped in skip_samples(_find(options.paths, index_folder=options.index_dir), bad):
        added += skipped.added
        print(f"{skipped.shard.shown}: {skipped.added} samples left out, {skipped.samples:,} remain")
    print(f"{added} samples in {len(bad)} shards are left out from now on")
    return 0


def _view(options: argparse.Namespace) -> int:
    from mmfuse.data.remote.urls import show_url
    from mmfuse.files import write_text
    from mmfuse.shards.view import draw_samples, find_keys, read_findings, render_samples

    shards = _find(options.paths, index_folder=options.index_dir)
    if options.findings:
        wanted = read_findings(options.findings, shards=shards, limit=options.samples)
    elif options.key:
        wanted = find_keys(shards, options.key)
    else:
        wanted = draw_samples(shards, count=options.samples, seed=options.seed)
    page = render_samples(
        wanted,
        title=" ".join(map(show_url, options.paths)),
        rules=_rules(options.paths),
        augmentations=options.augment,
        num_workers=options.jobs,
    )
    write_text(options.out, page)
    print(f"{len(wanted)} samples: {options.out}")
    return 0
