"""Tables of paths and captions, CSV, JSONL or Parquet -> rows, streamed."""

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, NamedTuple

from pydantic import Field

from mmfuse.config import Settings, suggest
from mmfuse.errors import ConfigError, DataError
from mmfuse.shards.rows import Problem, Row, RowFile, clean_key, is_missing, read_captions

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_CAPTION_NAMES = ("text", "caption", "captions")
_PEEKED_LINES = 1000
"""JSONL names no columns; those of its first lines count."""
_BATCH_ROWS = 2048
_MAX_CELL_BYTES = 1 << 26
_UNREADABLE = (OSError, EOFError, zlib.error)

Extensions = Mapping[str, tuple[str, ...]]
"""By modality, those that its file reads."""


class TableConfig(Settings):
    """Which columns of a table hold what. Null and empty cells are missing modalities."""

    paths: dict[str, str] = Field(default={})
    """By modality, the column with the path of a file."""
    captions: tuple[str, ...] = ()
    """Columns with captions themselves, several of them in a list or in a JSON list."""
    key: str | None = None
    """Column with the key; null: the row's number. Dots in it become underscores."""
    keep: tuple[str, ...] = ()
    """Columns that are kept in a member .json."""
    root: Path | None = None
    """What relative paths are relative to; null: the table's folder."""

    @property
    def named(self) -> tuple[str, ...]:
        """All columns that are read."""
        key = () if self.key is None else (self.key,)
        return tuple(dict.fromkeys((*self.paths.values(), *self.captions, *key, *self.keep)))


class _Cells(NamedTuple):
    """One row as the table has it."""

    values: Mapping[str, object]
    problem: str = ""


def table_format(table: Path) -> str | None:
    """`.csv`, `.jsonl`, ...; None where the file's name says of no table."""
    suffix = PurePath(table.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS else None


def choose_columns(tables: tuple[Path, ...], *, config: TableConfig, modalities: tuple[str, ...]) -> TableConfig:
    """The settings with the columns that are meant: their own, or else those called like a modality or `caption`.

    Raises:
        ConfigError: a table lacks a column, text comes from two places, or nothing is called so.
    """
    names = _column_names(tables[0])
    if config.root is not None:
        config = config.model_copy(update={"root": config.root.absolute()})  # resumed from elsewhere it is the same
    if not config.paths and not config.captions:
        found = {name: name for name in modalities if name in names and name not in _CAPTION_NAMES}
        captions = tuple(name for name in _CAPTION_NAMES if name in names)
        config = config.model_copy(update={"paths": found, "captions": captions})
    if not config.paths and not config.captions:
        wanted = ", ".join(dict.fromkeys((*modalities, *_CAPTION_NAMES)))
        raise ConfigError(f"{tables[0]}: no column is called {wanted}; say which hold what; it has {', '.join(names)}")
    if unknown := set(config.paths) - set(modalities):
        raise ConfigError(f"table.paths: there is no modality {suggest(min(unknown), modalities)}")
    if "text" in config.paths and config.captions:
        raise ConfigError("table.captions and table.paths.text: a sample has one member .txt; name one of the two")
    for table in tables:
        names = names if table is tables[0] else _column_names(table)
        for column in config.named:
            if column not in names:
                raise ConfigError(f"{table}: has no column {suggest(column, names)}")
    return config


def read_tables(tables: tuple[Path, ...], *, config: TableConfig, extensions: Extensions) -> Iterator[Row]:
    """The rows of all tables, one table after the other, numbered through.

    Raises:
        DataError: a table cannot be read to its end.
    """
    number = 0
    for table in tables:
        root = table.parent if config.root is None else config.root
        for cells in _read_cells(table, config.named):
            yield _make_row(number, cells, config=config, extensions=extensions, root=root)
            number += 1


def _make_row(number: int, cells: _Cells, *, config: TableConfig, extensions: Extensions, root: Path) -> Row:
    if cells.problem:
        return Row(number, "", problems=(Problem(number, "", "", cells.problem),))
    problems: list[Problem] = []
    key = f"{number:09d}" if config.key is None else _read_key(number, config.key, cells, problems)
    files = []
    for modality, column in config.paths.items():
        value = cells.values.get(column)
        if is_missing(value):
            continue
        try:
            extension = _extension_of(value, modality, extensions[modality])
            files.append(RowFile(column, extension, str(root / str(value).strip())))
        except ValueError as error:
            problems.append(Problem(number, column, str(value)[:200], str(error)))
    captions: list[str] = []
    for column in config.captions:
        try:
            captions += read_captions(cells.values.get(column))
        except ValueError as error:
            problems.append(Problem(number, column, "", str(error)))
    kept = {column: None if is_missing(value := cells.values.get(column)) else value for column in config.keep}
    extra = json.dumps(kept, sort_keys=True, default=str) if kept else ""
    row = Row(number, key, tuple(files), tuple(captions), extra, tuple(problems))
    empty = Problem(number, "", "", "holds no member: all its cells are empty")
    return row if row.is_whole or problems else row._replace(problems=(empty,))


def _read_key(number: int, column: str, cells: _Cells, problems: list[Problem]) -> str:
    value = cells.values.get(column)
    value = int(value) if isinstance(value, float) and value.is_integer() else value  # as pandas writes 7 beside a null
    try:
        return clean_key("" if is_missing(value) else str(value))
    except ValueError as error:
        problems.append(Problem(number, column, "", str(error)))
        return ""


def _extension_of(value: object, modality: str, known: tuple[str, ...]) -> str:
    """The extension of the file that a cell names; ValueError with the reason where it is none to read."""
    if not isinstance(value, str):
        raise ValueError(f"holds a {type(value).__name__}, not a path")
    if "://" in value:
        raise ValueError("is a URL; download it first, for instance with img2dataset")
    extension = PurePath(value.strip()).suffix.lower().lstrip(".")
    if extension not in known:
        raise ValueError(f"{modality} is read from {' '.join('.' + name for name in known)}, not from .{extension}")
    return extension


def _column_names(table: Path) -> list[str]:
    """The columns of a table, in its order.

    Raises:
        ConfigError: no table of a known format, or two columns have one name.
    """
    kind = table_format(table)
    if kind == ".parquet":
        names = _open_parquet(table).schema_arrow.names
    elif kind in (".csv", ".tsv"):
        with _open_text(table) as lines:
            names = next(_csv_rows(table, lines), [])
    elif kind is not None:
        peeked = itertools.islice(_read_jsonl(table), _PEEKED_LINES)
        return list(dict.fromkeys(name for cells in peeked for name in cells.values))
    else:
        raise ConfigError(f"{table}: is no table of a known format ({' '.join(FORMATS)}, also with .gz)")
    if len(set(names)) < len(names):
        raise ConfigError(f"{table}: two columns are called {max(names, key=names.count)!r}; rename one")
    return names


def _read_cells(table: Path, columns: tuple[str, ...]) -> Iterator[_Cells]:
    kind = table_format(table)
    if kind == ".parquet":
        return _read_parquet(table, columns)
    return _read_csv(table) if kind in (".csv", ".tsv") else _read_jsonl(table)


def _open_binary(table: Path) -> IO[bytes]:
    try:
        return gzip.open(table, "rb") if table.suffix.lower() == ".gz" else open(table, "rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"{table}: cannot be read: {error.strerror}") from error


def _open_text(table: Path) -> IO[str]:
    # Stray bytes pass: a path may hold them, and a caption that does is told of as a problem.
    return io.TextIOWrapper(_open_binary(table), "utf-8-sig", "surrogateescape", newline="")


def _csv_rows(table: Path, lines: IO[str]) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_CELL_BYTES)
    # strict: a caption that opens a quote and never closes it would swallow the rows after it
    rows = csv.reader(lines, delimiter="\t" if table_format(table) == ".tsv" else ",", strict=True)
    try:
        yield from (row for row in rows if row)
    except (csv.Error, *_UNREADABLE) as error:
        raise DataError(f"{table}: cannot be read after line {rows.line_num}: {error}") from error


def _read_csv(table: Path) -> Iterator[_Cells]:
    with _open_text(table) as lines:
        rows = _csv_rows(table, lines)
        header = next(rows, [])
        for row in rows:
            if len(row) == len(header):
                yield _Cells(dict(zip(header, row, strict=True)))
            else:
                yield _Cells({}, f"has {len(row)} cells, the header has {len(header)}")


def _read_jsonl(table: Path) -> Iterator[_Cells]:
    with _open_binary(table) as lines:
        try:
            yield from (_parse_line(line) for line in lines if line.strip())
        except _UNREADABLE as error:
            raise DataError(f"{table}: cannot be read to its end: {error}") from error


def _parse_line(line: bytes) -> _Cells:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return _Cells({}, "is not JSON")
    return _Cells(values) if isinstance(values, dict) else _Cells({}, "is no JSON object")


def _open_parquet(table: Path):
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"{table}: Parquet needs pyarrow: pip install 'mmfuse[parquet]'") from error
    try:
        return parquet.ParquetFile(table)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise DataError(f"{table}: cannot be read: {error}") from error


def _read_parquet(table: Path, columns: tuple[str, ...]) -> Iterator[_Cells]:
    with _open_parquet(table) as file:
        try:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False):
                yield from (_Cells(values) for values in batch.to_pylist())
        except (OSError, ValueError) as error:
            raise DataError(f"{table}: cannot be read to its end: {error}") from error
