"""Build the tri-modal emoji sets: pictures, names and synthetic speech as WebDataset tars.

`sample` is the committed quick-start set (550 samples, 96 px, Ogg Vorbis); `full` holds 6,300 (128 px, FLAC).
Two builds of the same set with the same programs are byte-identical.
"""

import argparse
import collections
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import emoji_sources as sources
from emoji_plan import HELD_OUT_VENDOR, NEW_DRAWINGS, NEW_EMOJI, SETS, TRAIN, EmojiSample, plan_samples, write_captions
from emoji_render import cached_path, render_all
from emoji_sources import VENDORS, SourceError

REPOSITORY = Path(__file__).resolve().parents[2]

MODIFIED = 1_704_067_200
"""Modification time of every member, 1 January 2024; a whole number, which needs no extended tar header."""


def read_members(sample: EmojiSample, work: Path) -> dict[str, bytes]:
    """Members of `sample` by extension, in the order in which the tar holds them."""
    members = {}
    if "image" in sample.modalities:
        members["jpg"] = cached_path(sample.picture, work).read_bytes()
    if "text" in sample.modalities:
        members["txt"] = "".join(f"{line}\n" for line in write_captions(sample.concept, key=sample.key)).encode()
    if "audio" in sample.modalities:
        members[sample.audio_extension] = cached_path(sample.speech, work).read_bytes()
    members["json"] = json.dumps(sample.facts, ensure_ascii=False).encode()
    return members


def write_shards(split: str, samples: list[EmojiSample], *, folder: Path, work: Path, samples_per_shard: int) -> None:
    """Tars of nearly equal size, `{split}-000000.tar` and on."""
    from webdataset import ShardWriter  # imports torch: not before the worker processes have started

    num_shards = math.ceil(len(samples) / samples_per_shard) if split == TRAIN else 1
    pattern = str(folder / f"{split}-%06d.tar")
    maxcount = math.ceil(len(samples) / num_shards)
    with ShardWriter(pattern, maxcount=maxcount, verbose=0, encoder=False, mtime=MODIFIED) as writer:
        for sample in samples:
            # one call per member: a single call would sort them by extension; only the first counts towards the shard
            write = writer.write
            for extension, content in read_members(sample, work).items():
                write({"__key__": sample.key, extension: content})
                write = writer.tarstream.write


def publish(partial: Path, out: Path) -> None:
    """Move the complete tars from `partial` to `out` and drop those of an earlier build that they do not replace."""
    built = {path.name for path in partial.glob("*.tar")}
    for split in (TRAIN, NEW_DRAWINGS, NEW_EMOJI):
        for stale in out.glob(f"{split}-*.tar"):
            if stale.name not in built:
                stale.unlink()
    for name in sorted(built):
        (out / f"{name}.mmindex").unlink(missing_ok=True)  # mmfuse's index of an earlier tar of this name
        (partial / name).replace(out / name)
    partial.rmdir()


def describe(splits: Mapping[str, Iterable[EmojiSample]]) -> str:
    """Counts for the recipe: samples per split, and per set of modalities within it."""
    lines = []
    for split, samples in splits.items():
        counts = collections.Counter("+".join(sample.modalities) for sample in samples)
        subsets = ", ".join(f"{count} {subset}" for subset, count in counts.most_common())
        lines.append(f"{split}: {counts.total()} samples ({subsets})")
    return "\n".join(lines)


def build(name: str, *, out: Path, package_folder: Path, work: Path, num_processes: int) -> str:
    """Write the tars of the set `name` into `out`; returns the counts.

    Raises:
        SourceError: a program or package is missing.
    """
    spec = SETS[name]
    vendors = [VENDORS[vendor] for vendor in (*spec.train_vendors, HELD_OUT_VENDOR)]
    splits = plan_samples(name, sources.read_concepts(package_folder, vendors))
    renderings = [rendering for samples in splits.values() for sample in samples for rendering in sample.renderings]
    render_all(renderings, work=work, num_processes=num_processes)
    partial = out / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.iterdir():
        leftover.unlink()
    for split, samples in splits.items():
        write_shards(split, samples, folder=partial, work=work, samples_per_shard=spec.samples_per_shard)
    publish(partial, out)
    return describe(splits)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="An interrupted build goes on where it stopped.\nNeeds rsvg-convert, espeak-ng and npm (or --sources).",
    )
    parser.add_argument("set", choices=sorted(SETS), help="which set to build")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the tars")
    parser.add_argument(
        "--sources",
        type=Path,
        metavar="DIR",
        help="unpacked npm packages; without it, `npm pack` fetches the pinned ones",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        default=REPOSITORY / "data" / "emoji_work",
        help="cache of packages, pictures and speech, safe to delete (default: data/emoji_work in the repository)",
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="rendering processes (default: 2)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        sources.require_programs(["rsvg-convert", "espeak-ng"])
        package_folder = arguments.sources
        if package_folder is None:
            package_folder = arguments.work / "packages"
            vendors = (*SETS[arguments.set].train_vendors, HELD_OUT_VENDOR)
            packages = [sources.NAMES_PACKAGE, *(VENDORS[vendor].package for vendor in vendors)]
            sources.fetch_packages(packages, cache=package_folder)
        counts = build(
            arguments.set,
            out=arguments.out,
            package_folder=package_folder,
            work=arguments.work / "rendered",
            num_processes=arguments.processes,
        )
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}:\n{counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
