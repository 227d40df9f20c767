"""`mmfuse shards build`: a table of paths and captions, or a folder of files -> shards with their indexes and a recipe.

The bytes of the shards depend on the input and the settings alone: not on processes, machines or interruptions.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mmfuse.config import Settings
from mmfuse.data.recipe import Recipe
from mmfuse.data.tar import BLOCK
from mmfuse.errors import ConfigError, DataError
from mmfuse.shards.folders import FolderConfig, read_folder
from mmfuse.shards.output import Progress, open_output
from mmfuse.shards.recipes import known_extensions, make_split, member_rules, write_recipe
from mmfuse.shards.row_store import RowOrder, RowStore, RowWriter
from mmfuse.shards.rows import Problem, Row
from mmfuse.shards.tables import Extensions, TableConfig, choose_columns, read_tables
from mmfuse.shards.write import ShardRecord, ShardTask, is_mended, list_in_manifest, write_shard

SPLITS = ("train", "validation")
_ROWS_PER_EVENT = 10_000
_WEIGHED_ROWS = 1_000


class BuildConfig(Settings):
    """How a data set is built."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Of the recipe and of its shards, NAME-000000.tar; with a validation split NAME-train-000000.tar."""
    table: TableConfig = TableConfig()
    """For tables: which columns hold what."""
    folder: FolderConfig = FolderConfig()
    """For a folder: how its files make samples."""
    caption_lines: bool = False
    """Text files hold one caption a line. Captions from columns always do."""
    shuffle: bool = True
    """Mixes all rows before writing. Training shuffles across a few shards at a time, so unmixed classes stay apart."""
    seed: NonNegativeInt = 0
    """Of the shuffle and of the validation split."""
    shard_mib: PositiveFloat = 256
    """About how large a shard becomes, by the sizes of up to 1,000 rows."""
    samples_per_shard: PositiveInt | None = None
    """Most rows in a shard; null: as many as `shard_mib` holds."""
    validation_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows that become the split `validation`, by a hash of seed and key."""
    max_problem_ratio: float = Field(default=0.01, ge=0, le=1)
    """More problems than this per row stop the build."""


class BuildPlan(Settings):
    """What the shards of a folder are made of; `build.json`."""

    version: int = 1
    config: BuildConfig
    inputs: tuple[str, ...]
    rows: int
    rows_hash: str
    rows_per_shard: int


_FREE = ("config.max_problem_ratio", "rows_per_shard")
"""May differ when a build goes on: the first changes no byte; the second is weighed once, for files come and go."""


def build_shards(
    inputs: tuple[Path, ...], destination: Path, *, config: BuildConfig, jobs: int = 1
) -> Iterator[Progress]:
    """Builds shards, or goes on with a build that was interrupted; the last value names the recipe.

    Files that cannot be read and rows of which nothing is left are left out, counted, and told with row, column, path
    and reason in `build_problems.jsonl`.

    Args:
        inputs: one folder, or tables with the same columns.
    Raises:
        ConfigError: the settings do not fit the input, or `destination` holds something else.
        DataError: the input cannot be read, too much of it is bad, or the shards cannot be written.
    """
    known = known_extensions()
    inputs = tuple(Path(os.path.abspath(path)) for path in inputs)
    config, rows = _open_rows(inputs, destination, config=config, known=known)
    with open_output(destination, "build") as output:
        writer, problems = RowWriter(output.scratch), []
        for row in rows:
            writer.add(row)
            problems += row.problems
            if writer.rows % _ROWS_PER_EVENT == 0:
                yield Progress(writer.rows, problems=len(problems))
        counts, twins = writer.finish(RowOrder(config.seed, config.shuffle, config.validation_ratio))
        problems += twins
        progress = Progress(counts.rows, left_out=counts.rows - counts.stored, problems=len(problems))
        _check_problems(progress, config=config, told=_tell_first(problems))
        yield progress
        plan = BuildPlan(
            config=config,
            inputs=tuple(map(str, inputs)),
            rows=counts.rows,
            rows_hash=counts.hash,
            rows_per_shard=_weigh_rows(output.scratch, config=config),
        )
        recipe_file = destination / f"{config.name}.yaml"
        names = [task.shard for task in _plan_tasks(output.scratch, plan)]
        tasks = _plan_tasks(output.scratch, output.settle_plan(plan, files=[*names, recipe_file.name], free=_FREE))
        work = functools.partial(write_shard, scratch=output.scratch, folder=destination)
        try:
            for after in output.finish_shards(work, tasks, is_current=_lacks_nothing_new, progress=progress, jobs=jobs):
                _check_problems(after, config=config, told=f"all so far are in {output.problems_file}")
                yield (progress := after)
        finally:
            output.write_problems(problems)
        records = output.read_records()
        if progress.samples + progress.left_out != progress.rows or not all(task.shard in records for task in tasks):
            raise DataError(f"{destination}: rows were lost: something else writes here; run the same command again")
        list_in_manifest(destination / task.shard for task in tasks)
        recipe = _make_recipe(inputs, recipe_file, config=config, tasks=tasks, records=records, known=known)
        write_recipe(recipe, recipe_file, replace=True)
    yield progress._replace(recipe=recipe_file)


def _open_rows(
    inputs: tuple[Path, ...], destination: Path, *, config: BuildConfig, known: Extensions
) -> tuple[BuildConfig, Iterator[Row]]:
    """The rows of the input, and the settings with the columns that were chosen."""
    missing = [path for path in inputs if not path.exists()]
    if missing or not inputs:
        raise DataError(f"{missing[0]}: is not there" if missing else "no table and no folder is given")
    first, *others = inputs
    if not first.is_dir():
        if config.folder != FolderConfig():
            raise ConfigError(f"{first}: is a table, but settings for a folder are given (layout, caption, ignore)")
        table = choose_columns(inputs, config=config.table, modalities=tuple(known))
        return config.model_copy(update={"table": table}), read_tables(inputs, config=table, extensions=known)
    if config.table != TableConfig() or others:
        raise ConfigError(f"{first}: is a folder: give this one alone, and no columns")
    if destination.resolve().is_relative_to(first.resolve()):
        raise ConfigError(f"{destination}: lies in the folder that is read; choose one outside")
    return config, read_folder(first, config=config.folder, extensions=known)


def _check_problems(progress: Progress, *, config: BuildConfig, told: str) -> None:
    if progress.problems > config.max_problem_ratio * progress.rows:
        raise DataError(
            f"{progress.problems} problems in {progress.rows} rows are more than max_problem_ratio = "
            f"{config.max_problem_ratio:g}: {told}; mend them, or raise it and run the same command again"
        )


def _tell_first(problems: list[Problem]) -> str:
    told = [" ".join(filter(None, (f"row {p.row}", p.column, p.path))) + f": {p.reason}" for p in problems[:3]]
    return "; ".join(told) + (" ..." if len(problems) > len(told) else "")


def _weigh_rows(scratch: Path, *, config: BuildConfig) -> int:
    """How many rows make a shard of the wanted size, by a sample of them."""
    with RowStore(scratch) as store:
        if not len(store):
            raise DataError("no row of the input makes a sample")
        places = np.unique(np.linspace(0, len(store) - 1, _WEIGHED_ROWS).astype(np.int64)).tolist()
        mean = sum(_row_bytes(store[place]) for place in places) / len(places)
    fitting = max(1, int(config.shard_mib * 2**20 / mean))
    return min(fitting, config.samples_per_shard or fitting)


def _row_bytes(row: Row) -> int:
    """About what a row takes in a tar; a file that cannot be read takes nothing."""
    sizes = [len(text.encode()) for text in (*row.captions, row.extra) if text]
    for file in row.files:
        with contextlib.suppress(OSError, ValueError):
            sizes.append(os.stat(file.path).st_size)
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


def _plan_tasks(scratch: Path, plan: BuildPlan) -> list[ShardTask]:
    """The shards of both splits, each split cut into parts of equal length."""
    config, tasks = plan.config, []
    with RowStore(scratch) as store:
        lengths = {split: len(store.order(split)) for split in SPLITS}
    if bool(config.validation_ratio) != bool(lengths["validation"]) or not lengths["train"]:
        raise ConfigError(f"validation_ratio = {config.validation_ratio:g} leaves one split empty: {lengths}")
    for split, length in lengths.items():
        stem = f"{config.name}-{split}" if config.validation_ratio else config.name
        count = -(-length // plan.rows_per_shard)
        bounds = [length * number // max(count, 1) for number in range(count + 1)]
        tasks += [ShardTask(f"{stem}-{n:06d}.tar", split, bounds[n], bounds[n + 1]) for n in range(count)]
    return tasks


def _lacks_nothing_new(task: ShardTask, record: ShardRecord) -> bool:
    """Whether no file that was left out can be read now."""
    return task.shard == record.shard and not any(map(is_mended, record.problems))


def _make_recipe(
    inputs: tuple[Path, ...],
    path: Path,
    *,
    config: BuildConfig,
    tasks: list[ShardTask],
    records: dict[str, ShardRecord],
    known: Extensions,
) -> Recipe:
    found = {extension for record in records.values() for extension in record.extensions}
    splits = {}
    for split in dict.fromkeys(task.split for task in tasks):
        shards = [task.shard for task in tasks if task.split == split]
        pattern = path.parent / (shards[0].rpartition("-")[0] + "-*.tar")
        splits[split] = make_split([pattern], samples=sum(records[shard].samples for shard in shards), recipe=path)
    lines = config.caption_lines or bool(config.table.captions) or config.folder.caption is not None
    return Recipe(
        name=config.name,
        description=f"Built from {', '.join(path.name for path in inputs[:3])}{' ...' if len(inputs) > 3 else ''}.",
        members=member_rules(found, known=known, caption_lines=lines),
        group_pattern="^(.+)/|.+" if config.folder.caption is not None else None,
        splits=splits,
    )
