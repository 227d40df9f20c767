"""The folder that shards are written to: one plan, one writer at a time, and a list of what is finished.

    TOOL.json            the plan; a run with another plan is refused
    TOOL_shards.jsonl    one line for each finished shard; locked by the run that writes
    TOOL_problems.jsonl  one line for each member and row that was left out
    TOOL.tmp/            unfinished work; nothing has its final name before it is whole

where TOOL is `build` or `convert`.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

from mmfuse.config import Settings, flatten, validate
from mmfuse.data.shard_index import SUFFIX, ShardIndex
from mmfuse.errors import ConfigError, DataError, ShardError
from mmfuse.files import write_text
from mmfuse.shards.rows import Problem
from mmfuse.shards.workers import run_tasks
from mmfuse.shards.write import ShardRecord

logger = logging.getLogger(__name__)


class _Task(Protocol):
    @property
    def shard(self) -> str: ...


Plan = TypeVar("Plan", bound=Settings)
Task = TypeVar("Task", bound=_Task)


class Progress(NamedTuple):
    """How far a tool is; its last value says what came of it."""

    rows: int = 0
    """Rows of the input, or tars where tars are converted: read so far, then all."""
    shards: int = 0
    """0 while rows are still read."""
    shards_done: int = 0
    samples: int = 0
    bytes: int = 0
    left_out: int = 0
    """Rows of which nothing was written."""
    problems: int = 0
    """Members and rows that were left out."""
    recipe: Path | None = None
    """In the last value: the recipe of the data set."""
    notes: tuple[str, ...] = ()
    """In the last value: sentences for the user."""

    def after(self, record: ShardRecord) -> "Progress":
        """One shard further."""
        return self._replace(
            shards_done=self.shards_done + 1,
            samples=self.samples + record.samples,
            bytes=self.bytes + record.bytes,
            left_out=self.left_out + record.left_out,
            problems=self.problems + len(record.problems),
        )


class OutputFolder:
    """A folder that this process alone writes to; made by `open_output`."""

    def __init__(self, folder: Path, tool: str, records: BinaryIO) -> None:
        self.folder = folder
        self.plan_file = folder / f"{tool}.json"
        self.problems_file = folder / f"{tool}_problems.jsonl"
        self.scratch = folder / f"{tool}.tmp"
        self._records = records

    def settle_plan(self, plan: Plan, *, files: Iterable[str], free: tuple[str, ...] = ()) -> Plan:
        """The plan that the finished shards belong to, or else `plan`, which is then written.

        Args:
            files: the names of what will be written; one that is there without a plan is not ours to replace.
            free: settings that may differ; they keep their first value.
        Raises:
            ConfigError: the folder holds shards of another plan, or files that no plan accounts for.
        """
        first = self._read_plan(type(plan)) if self.plan_file.exists() else None
        differing = _differences(first, plan, free=free) if first else []
        if first and not differing:
            return first
        if first and self.read_records():
            raise ConfigError(
                f"{self.folder}: holds shards of another plan: {'; '.join(differing)}; choose another folder"
            )
        strangers = [name for name in files if (self.folder / name).exists()]
        if strangers:
            raise ConfigError(
                f"{self.folder}: has a file {strangers[0]}, but no {self.plan_file.name} that accounts for it, and "
                "nothing is overwritten: choose another folder or name"
            )
        write_text(self.plan_file, plan.model_dump_json(indent=1) + "\n")
        return plan

    def _read_plan(self, plan: type[Plan]) -> Plan:
        try:
            raw = json.loads(self.plan_file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.plan_file}: not readable: {error}; choose another folder") from error
        return validate(plan, raw, source=str(self.plan_file))

    def finish_shards(
        self,
        work: Callable[[Task], ShardRecord],
        tasks: Sequence[Task],
        *,
        is_current: Callable[[Task, ShardRecord], bool],
        progress: Progress,
        jobs: int,
    ) -> Iterator[Progress]:
        """Does the tasks whose shards are not finished, or not current; the first value counts the others."""
        records = self.read_records()
        progress, missing = progress._replace(shards=len(tasks)), []
        for task in tasks:
            record = records.get(task.shard)
            if record and is_current(task, record):
                progress = progress.after(record)
            else:
                missing.append(task)
        yield progress
        for record in run_tasks(work, missing, jobs=jobs):
            self._records.seek(0, os.SEEK_END)
            self._records.write(json.dumps(record._asdict()).encode() + b"\n")
            self._records.flush()
            progress = progress.after(record)
            yield progress

    def write_problems(self, problems: Iterable[Problem]) -> None:
        """Tells what was left out before shards were written, and then in each finished shard, in their order."""
        records = self.read_records()
        by_shard = ((None, problems), *((shard, records[shard].problems) for shard in sorted(records)))
        lines = (json.dumps(problem._asdict() | {"shard": shard}) for shard, told in by_shard for problem in told)
        write_text(self.problems_file, "".join(line + "\n" for line in lines))

    def read_records(self) -> dict[str, ShardRecord]:
        """Finished shards by name, those whose tar and index are still there as they were written."""
        self._records.seek(0)
        found = (_parse_record(line) for line in self._records)
        return {record.shard: record for record in found if _is_finished(self.folder / record.shard, record)}


def _differences(first: Settings, plan: Settings, *, free: tuple[str, ...]) -> list[str]:
    """What is set otherwise than in the first plan, in words."""
    there, here = flatten(first.model_dump(mode="json")), flatten(plan.model_dump(mode="json"))
    differing = [name for name in sorted(there | here) if there.get(name) != here.get(name) and name not in free]
    return [f"{name} was {there.get(name)!r}, is {here.get(name)!r}" for name in differing]


@contextlib.contextmanager
def open_output(folder: Path, tool: str) -> Iterator[OutputFolder]:
    """The folder, made where needed, for this process alone; unfinished work is removed before and after.

    Raises:
        DataError: another process writes to it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records = open(folder / f"{tool}_shards.jsonl", "a+b")  # noqa: SIM115  # closed below
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to: {error.strerror}") from error
    with records:
        try:
            fcntl.flock(records, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel, however this process ends
        except BlockingIOError as error:
            raise DataError(f"{folder}: another process is writing to it; wait for it or end it") from error
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): let nothing else write to it", folder, error.strerror)
        output = OutputFolder(folder, tool, records)
        _drop_cut_line(records)
        shutil.rmtree(output.scratch, ignore_errors=True)
        try:
            yield output
        except OSError as error:
            raise DataError(f"{folder}: cannot be written to: {error}; run the same command again to go on") from error
        finally:
            shutil.rmtree(output.scratch, ignore_errors=True)
            if not records.seek(0, os.SEEK_END):
                os.unlink(records.name)


def _drop_cut_line(records: BinaryIO) -> None:
    """Cuts off what a kill left after the last whole line."""
    records.seek(0)
    records.truncate(records.read().rfind(b"\n") + 1)


def _parse_record(line: bytes) -> ShardRecord:
    values = json.loads(line)
    problems = tuple(Problem(*problem) for problem in values.pop("problems"))
    extensions, changes = tuple(values.pop("extensions")), tuple(values.pop("changes"))
    return ShardRecord(**values, extensions=extensions, problems=problems, changes=changes)


def _is_finished(shard: Path, record: ShardRecord) -> bool:
    try:
        index = ShardIndex(shard.with_name(shard.name + SUFFIX))
        return shard.stat().st_size == record.bytes and len(index) == record.samples
    except (OSError, ShardError):
        return False
