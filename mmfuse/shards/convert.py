"""`mmfuse shards convert`: what other tools wrote -> a recipe, and new shards only where something must change."""

import functools
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from mmfuse.config import Settings
from mmfuse.data.manifest import ShardFacts, index_path
from mmfuse.data.recipe import Recipe, place_shards
from mmfuse.data.shard_index import ShardIndex
from mmfuse.errors import ConfigError, DataError, ShardError
from mmfuse.shards.build import BuildConfig, build_shards
from mmfuse.shards.energon import META, check_energon, read_energon
from mmfuse.shards.folders import guess_layout
from mmfuse.shards.img2dataset import check_img2dataset, is_img2dataset
from mmfuse.shards.index import index_shards
from mmfuse.shards.output import Progress, open_output
from mmfuse.shards.recipes import known_extensions, make_split, member_rules, write_recipe
from mmfuse.shards.repack import RepackTask, find_changes, repack_shard
from mmfuse.shards.workers import run_tasks
from mmfuse.shards.write import ShardRecord, list_in_manifest

Layout = Literal["energon", "img2dataset", "tars", "files"]
_TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_MOST_TOLD = 5


class ConvertConfig(Settings):
    """How a folder is converted."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Of the recipe, NAME.yaml."""
    dotted_keys: bool = False
    """Keys of tars hold dots: the extension begins at the last dot of a name, and other dots become underscores."""


class ConvertPlan(Settings):
    """What the rewritten tars of a folder are made of; `convert.json`."""

    version: int = 1
    config: ConvertConfig
    source: str


def detect_layout(folder: Path) -> Layout:
    """Who wrote the folder.

    Raises:
        DataError: it is no folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; a table is read by `mmfuse shards build`")
    if (folder / META).is_dir():
        return "energon"
    if not _find_tars(folder):
        return "files"
    return "img2dataset" if is_img2dataset(folder) else "tars"


def convert_folder(source: Path, destination: Path, *, config: ConvertConfig, jobs: int = 1) -> Iterator[Progress]:
    """Makes a folder trainable, or goes on with what was interrupted; the last value has the recipe and notes.

    Tars that can be read as they are stay where they are and are indexed there; else all are rewritten into
    `destination`. Folders of files become shards there.

    Raises:
        ConfigError: `destination` holds something else.
        DataError: the folder, or a shard, is damaged or cannot be written; the message names it.
    """
    layout = detect_layout(source)
    if layout == "energon":
        yield from _describe_energon(source, destination, config=config, jobs=jobs)
    elif layout == "files":
        yield from _build_from_files(source, destination, config=config, jobs=jobs)
    else:
        tasks = _plan_tasks(source, config=config)
        must_change = yield from _look_at_tars(tasks, jobs=jobs)
        if must_change:
            yield from _rewrite_tars(source, destination, tasks, config=config, jobs=jobs)
        else:
            yield from _describe_tars(source, destination, config=config, jobs=jobs)


def _find_tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _TAR.search(path.name) and not path.name.startswith("."))


def _build_from_files(source: Path, destination: Path, *, config: ConvertConfig, jobs: int) -> Iterator[Progress]:
    folder, said = guess_layout(source, extensions=known_extensions())
    if is_img2dataset(source):
        folder = folder.model_copy(update={"ignore": ("*.parquet", "*_stats.json")})
    build = BuildConfig(name=config.name, folder=folder)
    for progress in build_shards((source,), destination, config=build, jobs=jobs):
        yield progress._replace(notes=(said,)) if progress.recipe else progress


def _plan_tasks(source: Path, *, config: ConvertConfig) -> list[RepackTask]:
    tars = _find_tars(source)
    names = [_TAR.sub(".tar", tar.name) for tar in tars]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{source}: two of its files would become {twice[0]}; move one away")
    origins = [f"{tar.name} {tar.stat().st_size} {tar.stat().st_mtime_ns}" for tar in tars]
    return [RepackTask(tar, name, config.dotted_keys, o) for tar, name, o in zip(tars, names, origins, strict=True)]


def _look_at_tars(tasks: list[RepackTask], *, jobs: int) -> Generator[Progress, None, bool]:
    """Whether any tar must be rewritten.

    Raises:
        ShardError: of some no clean tar can be made; names them before anything is written.
    """
    damaged, must_change = [], False
    for number, found in enumerate(run_tasks(find_changes, tasks, jobs=jobs), start=1):
        if isinstance(found, ShardError):
            damaged.append(str(found))
        else:
            must_change = must_change or bool(found)
        yield Progress(rows=number, problems=len(damaged))
    _refuse(damaged, of=len(tasks))
    return must_change


def _refuse(damaged: list[str], *, of: int) -> None:
    if damaged:
        told = "\n  ".join([*damaged[:_MOST_TOLD], *(["..."] if len(damaged) > _MOST_TOLD else [])])
        raise ShardError(f"{len(damaged)} of {of} tars cannot be used; replace them or move them away:\n  {told}")


def _rewrite_tars(
    source: Path, destination: Path, tasks: list[RepackTask], *, config: ConvertConfig, jobs: int
) -> Iterator[Progress]:
    recipe_file, shards = destination / f"{config.name}.yaml", [task.shard for task in tasks]
    with open_output(destination, "convert") as output:
        plan = ConvertPlan(config=config, source=os.path.abspath(source))
        output.settle_plan(plan, files=[*shards, recipe_file.name])
        output.scratch.mkdir()
        work = functools.partial(repack_shard, scratch=output.scratch, folder=destination)
        progress = Progress(rows=len(tasks))
        for after in output.finish_shards(work, tasks, is_current=_is_current, progress=progress, jobs=jobs):
            yield (progress := after)
        records = output.read_records()
        list_in_manifest(destination / shard for shard in shards)
        found = {extension for shard in shards for extension in records[shard].extensions}
        recipe = Recipe(
            name=config.name,
            description=f"Rewritten from the tars of {source.name}.",
            members=member_rules(found, known=known_extensions(), caption_lines=False),
            splits={
                "train": make_split(
                    [destination / shard for shard in shards], samples=progress.samples, recipe=recipe_file
                )
            },
        )
        write_recipe(recipe, recipe_file, replace=True)
    notes = tuple(f"{shard}: {', '.join(records[shard].changes)}" for shard in shards if records[shard].changes)
    yield progress._replace(recipe=recipe_file, notes=notes)


def _is_current(task: RepackTask, record: ShardRecord) -> bool:
    return record.origin == task.origin


def _describe_tars(source: Path, destination: Path, *, config: ConvertConfig, jobs: int) -> Iterator[Progress]:
    """Indexes tars where they are and writes the recipe alone."""
    facts = yield from _index(_find_tars(source), jobs=jobs)
    samples = {shard: known.all_samples for shard, known in facts.items()}
    notes = ["nothing must be changed: the tars are read as they are", *check_img2dataset(samples.items())]
    recipe_file = destination / f"{config.name}.yaml"
    recipe = Recipe(
        name=config.name,
        description=f"The tars of {source.name}{', written by img2dataset' if is_img2dataset(source) else ''}.",
        splits={"train": make_split([source], samples=sum(samples.values()), recipe=recipe_file)},
    )
    write_recipe(recipe, recipe_file, replace=False)
    yield _total(facts)._replace(recipe=recipe_file, notes=tuple(notes), problems=len(notes) - 1)


def _describe_energon(source: Path, destination: Path, *, config: ConvertConfig, jobs: int) -> Iterator[Progress]:
    """Indexes the tars of all splits and writes the recipe alone."""
    data = read_energon(source, known=known_extensions())
    facts = yield from _index(list(dict.fromkeys(tar for tars in data.splits.values() for tar in tars)), jobs=jobs)
    indexes = {tar: ShardIndex(index_path(tar.parent, tar.name)) for tar in facts}
    differing = tuple(check_energon(data, indexes))
    recipe_file = destination / f"{config.name}.yaml"
    recipe = Recipe(
        name=config.name,
        description=f"The tars of {source.name}, prepared for Megatron-Energon.",
        members=data.members or None,
        splits={
            name: make_split(tars, samples=sum(facts[tar].all_samples for tar in tars), recipe=recipe_file)
            for name, tars in data.splits.items()
        },
    )
    write_recipe(recipe, recipe_file, replace=False)
    notes = ("nothing must be changed: the tars are read as they are", *data.notes, *differing)
    yield _total(facts)._replace(recipe=recipe_file, notes=notes, problems=len(differing))


def _index(tars: list[Path], *, jobs: int) -> Generator[Progress, None, dict[Path, ShardFacts]]:
    """What the indexes beside the tars say of each; missing and outdated ones are written."""
    facts: dict[Path, ShardFacts] = {}
    damaged, progress = [], Progress(rows=len(tars), shards=len(tars))
    shards = place_shards(map(str, tars), index_folder=None)
    for shard, outcome, *_ in index_shards(shards, jobs=jobs):
        if isinstance(outcome, ShardError):
            damaged.append(str(outcome))
        else:
            facts[Path(shard.parts[0])] = outcome
        yield progress._replace(shards_done=len(facts) + len(damaged), problems=len(damaged))
    _refuse(damaged, of=len(tars))
    return facts


def _total(facts: dict[Path, ShardFacts]) -> Progress:
    return Progress(
        rows=len(facts),
        shards=len(facts),
        shards_done=len(facts),
        samples=sum(known.samples for known in facts.values()),
        bytes=sum(part.size for known in facts.values() for part in known.parts),
    )
