"""Where shards are: local paths and URLs, checked, found by patterns, and shown without their secrets."""

import glob
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from braceexpand import braceexpand

from mmfuse.data.remote.retry import Deadline, keep_trying
from mmfuse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmfuse.data.remote.stores import Entry

_REMOTE = ("http", "https", "s3", "gs")
_ALLOWED = "a shard is a local path, or a URL of file, http, https, s3 or gs"
_COMMAND = re.compile(r"\s*(pipe:|\|)|.*(\|\s*$|\$\(|`)", re.IGNORECASE | re.DOTALL)
"""webdataset hands such names to a shell."""
_SCHEME = re.compile(r"(?P<scheme>[^/]*?)://|(?P<half>file|https?|s3|gs):/?", re.IGNORECASE)
_QUERY = re.compile(r"[?#]")
_BUCKET_QUERY = re.compile(r"\?(?=[\w.~%-]+=)|#")
"""In s3 and gs a `?` that no `name=` follows is part of a pattern."""
_HOST = re.compile(r"arn:.+|(\[[^\]]*\]|[^:\[\]]+)(:\d*)?")
_HIDDEN = "..."
_LISTING_SECONDS = 300.0
"""For all listings that one pattern needs."""


class _Parts(NamedTuple):
    """A URL in pieces; together, and with `://` after the scheme, they are the whole."""

    scheme: str
    """In lower case."""
    authority: str
    """With user and password."""
    path: str
    """From the slash on."""
    query: str
    """From the question mark on, with the fragment."""

    @property
    def host(self) -> str:
        """Without user and password; empty where it can be no host, because a password with a slash is cut in two."""
        host = self.authority.rpartition("@")[2]
        return host if _HOST.fullmatch(host) else ""


def _split(url: str) -> _Parts | None:
    """The pieces of a URL; None for a local path."""
    found = _SCHEME.match(url)
    if found is None:
        return None
    scheme, rest = (found["scheme"] or found["half"] or "").lower(), url[found.end() :]
    query = None if scheme == "file" else (_BUCKET_QUERY if scheme in ("s3", "gs") else _QUERY).search(rest)
    rest, tail = (rest[: query.start()], rest[query.start() :]) if query else (rest, "")
    authority, slash, path = rest.partition("/")
    return _Parts(scheme, authority, slash + path, tail)


def is_remote(url: str) -> bool:
    """Whether a shard lies behind a network and must be fetched before it is read."""
    parts = _split(url)
    return parts is not None and parts.scheme in _REMOTE


def show_url(url: str) -> str:
    """The URL without user, password, query and fragment: the only form for logs, errors, file names and reports.

    Never raises. Nothing is left of a command, nor of a URL that has no host where one should be.
    """
    if _COMMAND.match(url):
        return f"pipe:{_HIDDEN}"
    parts = _split(url)
    if parts is None:
        return url
    if parts.scheme == "file":
        return f"file://{parts.authority}{parts.path}"
    scheme = parts.scheme if re.fullmatch(r"[\w+.:-]+", parts.scheme) else _HIDDEN
    return f"{scheme}://{parts.host}{parts.path}" if parts.host else f"{scheme}://{_HIDDEN}"


def check_url(url: str) -> None:
    """Refuses what is neither a local path nor a URL that we read.

    Raises:
        ConfigError: a command, an unknown scheme, or a URL that cannot be meant; the message shows no secrets.
    """
    if problem := _problem(url):
        raise ConfigError(f"{show_url(url)}: {problem}; {_ALLOWED}")


def _problem(url: str) -> str | None:
    """What is wrong with a URL, in words without any of it."""
    if _COMMAND.match(url):
        return "is a command, and nothing is run to read a shard"
    parts = _split(url)
    if parts is None:
        return "holds a zero byte" if "\0" in url else None
    if parts.scheme not in ("file", *_REMOTE):
        return "has a scheme that is not read"
    if "://" not in url[: len(parts.scheme) + 3]:
        return f"lacks slashes after {parts.scheme}:"
    if parts.scheme == "file":
        return "names a host; write file:///absolute/path" if parts.authority else None
    if not parts.host:
        return "names no host or bucket, or one that cannot be"
    if "#" in parts.query or not url.isprintable():
        return "has a fragment (#) or a control character; in http, write %23 for a # in a name"
    if parts.scheme in ("s3", "gs") and ("@" in parts.authority or parts.query):
        return "holds credentials or a query; they belong in the environment or in the provider's own files"
    return None


def find_shards(patterns: tuple[str, ...], *, folder: Path = Path()) -> list[str]:
    """Shards that the patterns name, sorted: local paths, and remote URLs with the query that they were given.

    `{000..127}` and `{a,b}` stand for each of their names, then `*`, `?` and `[..]` for what is there; a folder stands
    for all tars in it. Over http a `?` begins the query, a URL with a query is one file, and globs and folders need a
    directory listing. Whether a remote file that is named in full exists is seen when it is read.

    Args:
        folder: what local patterns are relative to.

    Raises:
        ConfigError: `check_url` refuses a pattern, or its braces do not balance.
        DataError: a pattern matches nothing, a folder cannot be listed, or two URLs differ in their query alone.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        check_url(pattern)
        for url in _find_remote(pattern) if is_remote(pattern) else _find_local(pattern, folder=folder):
            if found.setdefault(show_url(url) if is_remote(url) else url, url) != url:
                raise DataError(
                    f"{show_url(url)}: two URLs of it differ in their queries; a query is a secret and tells no shards "
                    "apart: name each shard once, or serve them under paths of their own"
                )
    # Folder by folder as paths are, "a/x" before "a-b/x", so that data sets keep the order that they were trained in.
    return [found[shown] for shown in sorted(found, key=lambda shown: (PurePosixPath(shown).parts, shown))]


def _find_local(pattern: str, *, folder: Path) -> Iterator[str]:
    parts = _split(pattern)
    pattern = parts.path if parts else pattern
    exists = (folder / pattern).exists()  # a name that looks like a pattern is a name where it is there
    for name in [pattern] if exists else _expand_braces(pattern):
        place = folder / name
        if place.is_dir():
            matches = list(place.glob("*.tar"))
        else:
            matches = [place] if place.is_file() else [folder / match for match in glob.glob(name, root_dir=folder)]
        if not matches:
            what = "has no .tar files" if place.is_dir() else "matches no file"
            raise DataError(f"{place}: {what}; check the path, or build the data set first (data_shards/README.md)")
        yield from map(str, matches)


def _find_remote(pattern: str) -> Iterator[str]:
    parts = _split(pattern)
    assert parts is not None
    user, deadline = parts.authority.removesuffix(parts.host), Deadline(_LISTING_SECONDS)
    for name in _expand_braces(parts.host + parts.path):
        url = f"{parts.scheme}://{user}{name}"
        if parts.query:
            yield url + parts.query
            continue
        matches = _expand_globs(url, deadline=deadline)
        if not matches:
            raise DataError(f"{show_url(url)}: matches no file; check the name, and list what is there")
        yield from matches


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise ConfigError(f"{pattern}: its braces do not balance") from None


def _expand_globs(url: str, *, deadline: Deadline) -> list[str]:
    """The files that a URL without braces and query names; it is asked for only where it must be."""
    parts = _split(url)
    assert parts is not None
    head, names = f"{parts.scheme}://{parts.authority}", parts.path.split("/")
    if names[-1] == "":
        names[-1] = "*.tar"
    if not glob.has_magic(parts.path) and names[-1] != "*.tar":
        if _is_http(url) or url.endswith(".tar"):
            return [url]
        if [entry.url for entry in _list(url, deadline=deadline)] == [url]:
            return [url]
        names.append("*.tar")
    first = next(number for number, name in enumerate(names) if glob.has_magic(name))
    places = [head + "/".join(names[:first])]
    for number, name in enumerate(names[first:], start=first):
        listed = [entry for place in places for entry in _list(f"{place}/", deadline=deadline)]
        is_last = number == len(names) - 1
        places = [e.url.rstrip("/") for e in listed if e.is_folder != is_last and _matches(e.url, name)]
    for place in places:
        check_url(place)  # a name in a bucket may hold what a URL cannot
    return places


def _is_http(url: str) -> bool:
    return url.lower().startswith("http")


def _matches(url: str, pattern: str) -> bool:
    """As in a shell: a leading dot is matched by nothing but a dot."""
    name = url.rstrip("/").rpartition("/")[2]
    if _is_http(url):
        name, pattern = unquote(name), unquote(pattern)
    return fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")


def _list(url: str, *, deadline: Deadline) -> "list[Entry]":
    from mmfuse.data.remote.request import (  # takes 0.4 s, which readers of local shards need not
        FetchConfig,
        list_folder,
    )

    return keep_trying(
        lambda: list_folder(url, deadline=deadline, config=FetchConfig()), what=show_url(url), deadline=deadline
    )
