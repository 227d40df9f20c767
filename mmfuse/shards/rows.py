"""Rows: what one sample of a data set that is being built is made of, whichever table or folder says so."""

import json
import math
import re
from typing import NamedTuple

_SKIPPED = re.compile(r"__[^/]*__/")
"""webdataset and Energon take what is below such a folder for notes about the tar."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class RowFile(NamedTuple):
    """A file that becomes a member as it is."""

    column: str
    extension: str
    """Of the member, without the dot, in lower case."""
    path: str


class Problem(NamedTuple):
    """A member or a whole row that is left out, and why."""

    row: int
    column: str
    path: str
    reason: str


class Row(NamedTuple):
    """One sample to be."""

    number: int
    """0-based, of the table's rows or the folder's samples."""
    key: str
    """Empty where there is none that can be used; `problems` then says why."""
    files: tuple[RowFile, ...] = ()
    captions: tuple[str, ...] = ()
    """Of one line each; they become the member .txt."""
    extra: str = ""
    """JSON text that becomes the member .json."""
    problems: tuple[Problem, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether a sample can come of it: it has a key, and more than metadata."""
        return bool(self.key and (any(file.extension != "json" for file in self.files) or self.captions))


def dump_row(row: Row) -> bytes:
    """One line of JSON; without the problems, which are told at once."""
    return json.dumps([row.number, row.key, row.files, row.captions, row.extra]).encode() + b"\n"


def parse_row(line: bytes) -> Row:
    """What `dump_row` wrote."""
    number, key, files, captions, extra = json.loads(line)
    return Row(number, key, tuple(RowFile(*file) for file in files), tuple(captions), extra)


def clean_key(text: str) -> str:
    """The key as it may stand in a tar: relative, and no dots after the last slash, where an extension would begin.

    Raises:
        ValueError: nothing is left of it, or it would be skipped or misread; the message is the reason.
    """
    parts = [part for part in text.strip().split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError(f"{text!r} cannot be a key: it is empty or leads out of its folder")
    key = "/".join([*parts[:-1], parts[-1].replace(".", "_")])
    if _CONTROL.search(key) or not is_unicode(key):
        raise ValueError(f"{text!r} cannot be a key: it has control characters or is not UTF-8")
    if _SKIPPED.match(key):
        raise ValueError(f"{text!r} cannot be a key: webdataset skips folders called __NAME__")
    return key


def is_unicode(text: str) -> bool:
    """Whether the text has no stray bytes, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_missing(value: object) -> bool:
    """An empty cell, null, or the NaN that pandas writes for one."""
    return value is None or (isinstance(value, str) and not value.strip()) or _is_nan(value)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def read_captions(value: object) -> list[str]:
    """The captions of a cell, each on one line: a text, a list of texts, or a JSON list of texts.

    Raises:
        ValueError: it is neither; the message is the reason.
    """
    if is_missing(value):
        return []
    if isinstance(value, str):
        texts = _json_list(value) or [value]
    elif isinstance(value, list):
        texts = [text for text in value if not is_missing(text)]
    else:
        texts = [value]
    captions = []
    for text in texts:
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise ValueError(f"holds a {type(text).__name__}, not a caption")
        if not is_unicode(str(text)):
            raise ValueError("is not UTF-8")
        captions.append(" ".join(str(text).split()))
    return [caption for caption in captions if caption]


def _json_list(text: str) -> list[str] | None:
    """The texts of a JSON list; None where it is just a caption that begins with a bracket."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if found and all(isinstance(item, str) for item in found) else None
