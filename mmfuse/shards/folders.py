"""Folders of files -> rows: files with one stem are one sample, side by side or in parallel folders."""

import heapq
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import field_validator

from mmfuse.config import Settings
from mmfuse.errors import ConfigError, DataError
from mmfuse.shards.rows import Problem, Row, RowFile, clean_key
from mmfuse.shards.tables import Extensions

_GUESSED_FILES = 100


class FolderConfig(Settings):
    """How the files of a folder make samples. Sub-folders count, hidden files do not."""

    layout: Literal["together", "parallel"] = "together"
    """`together`: a/1.jpg and a/1.txt are one sample. `parallel`: images/1.jpg and captions/1.txt are."""
    caption: str | None = None
    """Caption of samples without a text file; {} stands for the name of the folder they are in."""
    ignore: tuple[str, ...] = ()
    """Patterns of file names that are left out, such as *.gif."""

    @field_validator("caption")
    @classmethod
    def _names_the_folder(cls, value: str | None) -> str | None:
        if value is not None and "{}" not in value:
            raise ValueError("must have {}, which stands for the folder's name")
        return value


class _File(NamedTuple):
    """Compared in this order: that of the samples' keys, then of their members."""

    key_parts: tuple[str, ...]
    extension: str
    path: str


def read_folder(root: Path, *, config: FolderConfig, extensions: Extensions) -> Iterator[Row]:
    """One row for each stem, sorted by key.

    Raises:
        ConfigError: there are files that no modality reads and `ignore` does not name; nothing was written then.
        DataError: a folder cannot be read.
    """
    known = {name for names in extensions.values() for name in names} | {"json"}
    strangers: Counter[str] = Counter()
    number = 0
    for key_parts, group in itertools.groupby(_find_files(root, config.layout), key=lambda file: file.key_parts):
        wanted = []
        for file in group:
            name = os.path.basename(file.path)
            if any(fnmatch(name, pattern) for pattern in config.ignore):
                continue
            if file.extension in known and key_parts:
                wanted.append(file)
            else:
                strangers[f"*.{file.extension}" if file.extension else name] += 1
        if wanted:
            yield _make_row(number, wanted, caption=config.caption, text=extensions.get("text", ()))
            number += 1
    if strangers:
        found = ", ".join(f"{count} {pattern}" for pattern, count in strangers.most_common(10))
        raise ConfigError(
            f"{root}: holds files that no modality reads: {found}; remove or ignore them. Known are "
            f"{' '.join('.' + name for name in sorted(known))}"
        )


def guess_layout(root: Path, *, extensions: Extensions) -> tuple[FolderConfig, str]:
    """How the first files of each sub-folder say that the folder is meant, and that in a sentence."""
    modality_of = {name: modality for modality, names in extensions.items() for name in names}
    kinds = []
    for entry in sorted(_list_folder(root), key=lambda entry: entry.name):
        if entry.is_dir():
            files = itertools.islice(_walk(root / entry.name, (), (_identity(root),)), _GUESSED_FILES)
            kinds.append({modality_of[file.extension] for file in files if file.extension in modality_of})
    kinds = [kind for kind in kinds if kind]
    alone = [next(iter(kind)) for kind in kinds if len(kind) == 1]
    if len(kinds) > 1 and len(alone) == len(kinds):
        if len(set(alone)) == len(kinds):
            return FolderConfig(layout="parallel"), "read as parallel folders: files of one name are one sample"
        if len(set(alone)) == 1 and alone[0] != "text":
            said = "read as folders of classes: a folder's name is the caption of its files, and their group"
            return FolderConfig(caption="{}"), said
    return FolderConfig(), "read as files side by side: those of one folder and one name are one sample"


def _find_files(root: Path, layout: str) -> Iterator[_File]:
    if layout == "together":
        return _walk(root, (), (_identity(root),))
    entries = _list_folder(root)
    walks = [_walk(root / entry.name, (), (_identity(root),)) for entry in entries if entry.is_dir()]
    outside = (_File((), _split(entry.name)[1], entry.path) for entry in entries if not entry.is_dir())
    return heapq.merge(sorted(outside), *walks)


def _walk(folder: Path, parents: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> Iterator[_File]:
    """The files below `folder` in the order of `_File`, so that walks can be merged."""
    found = []
    for entry in _list_folder(folder):
        stem, extension = (entry.name, "") if entry.is_dir() else _split(entry.name)
        found.append((stem, entry.is_dir(), extension, entry.name))
    for stem, is_folder, extension, name in sorted(found):
        if not is_folder:
            yield _File((*parents, stem), extension, str(folder / name))
            continue
        identity = _identity(folder / name)
        if identity in above:
            raise DataError(f"{folder / name}: is a link to a folder above it; remove it")
        yield from _walk(folder / name, (*parents, name), (*above, identity))


def _split(name: str) -> tuple[str, str]:
    """Stem and lower-cased extension, which begins at the last dot."""
    stem, extension = os.path.splitext(name)
    return stem, extension.lower().lstrip(".")


def _list_folder(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _make_row(number: int, group: list[_File], *, caption: str | None, text: tuple[str, ...]) -> Row:
    problems, files = [], {}
    for file in group:
        if file.extension in files:
            other = os.path.basename(files[file.extension].path)
            reason = f"the sample has a .{file.extension} already, {other}"
            problems.append(Problem(number, file.extension, file.path, reason))
        else:
            files[file.extension] = RowFile(file.extension, file.extension, file.path)
    parts = group[0].key_parts
    try:
        key = clean_key("/".join(parts))
    except ValueError as error:
        return Row(number, "", problems=(Problem(number, "", group[0].path, str(error)),))
    captions = ()
    if caption is not None and len(parts) > 1 and not files.keys() & set(text):
        captions = (caption.replace("{}", parts[-2].replace("_", " ")),)
    row = Row(number, key, tuple(files.values()), captions, "", tuple(problems))
    alone = Problem(number, "", group[0].path, "holds no member but metadata")
    return row if row.is_whole else row._replace(problems=(*problems, alone))
