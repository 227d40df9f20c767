"""URLs of shards: what is refused, what is shown, and what patterns find."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import HttpServer, serve_http

from mmfuse.data.remote.urls import check_url, find_shards, is_remote, show_url
from mmfuse.errors import ConfigError, DataError

NOWHERE = "http://127.0.0.1:9"
"""Nobody listens: who asks it fails."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with serve_http(tmp_path_factory.mktemp("http")) as http:
        touch(
            http.files, "b-1.tar", "b-2.tar", "a 1.tar", "b-3.tar/folder.txt", "notes.txt", "b-1.tar.mmindex", "set-3"
        )
        touch(
            http.files, "set-1/x.tar", "set-2/x.tar", "set-2/y.tar", "other/x.tar", "none/notes.txt", "page/index.html"
        )
        yield http


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("data/train-000.tar", "data/train-000.tar"),
        ("odd?name#1@2.tar", "odd?name#1@2.tar"),
        ("file:///data/a?b.tar", "file:///data/a?b.tar"),
        ("https://host/a.tar", "https://host/a.tar"),
        ("https://me:s3cr3t@host:8080/a.tar", "https://host:8080/a.tar"),
        ("HTTPS://s3cr3t@[::1]:80/@scope/a.tar?sig=s3cr3t", "https://[::1]:80/@scope/a.tar"),
        ("https://host/a.tar?X-Amz-Signature=s3cr3t&b=1#s3cr3t", "https://host/a.tar"),
        ("https://host/a.tar#s3cr3t?x", "https://host/a.tar"),
        ("https://host?sig=s3cr3t/a.tar", "https://host"),
        ("https://me:s3cr3t/with/slash@host/a.tar", "https://..."),
        ("https://me:p?s3cr3t@host/a.tar", "https://..."),
        ("s3://bucket/train-?.tar", "s3://bucket/train-?.tar"),
        ("s3://bucket/a.tar?X-Amz-Signature=s3cr3t", "s3://bucket/a.tar"),
        ("s3://AKIA:s3cr3t@bucket/a.tar", "s3://bucket/a.tar"),
        ("s3://AKIA:s3c/s3cr3t@bucket/a.tar", "s3://..."),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/team/a.tar", "s3://arn:aws:s3:eu-west-1:1:accesspoint/team/a.tar"),
        ("pipe:curl -H 'Authorization: s3cr3t' https://host/a.tar", "pipe:..."),
        ("curl -u me:s3cr3t https://host/a.tar |", "pipe:..."),
        ("zip://a.tar?key=s3cr3t::https://me:s3cr3t@host/x", "zip://a.tar"),
        ("me:s3cr3t@host://a.tar", "...://a.tar"),
        ("https:/me:s3cr3t@host/a.tar?sig=s3cr3t", "https://host/a.tar"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert show_url(url) == shown


def test_whatever_is_to_be_shown_is_shown_without_an_error() -> None:
    draw = random.Random(0)
    parts = [
        "http",
        "s3",
        "file",
        "pipe:",
        ":",
        "//",
        "/",
        "?",
        "#",
        "@",
        "[",
        "]",
        "=",
        "|",
        "$(",
        "a",
        "\n",
        "\0",
        "é",
    ]
    for _ in range(20_000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 9)))
        assert isinstance(show_url(text), str)
        assert is_remote(text) in (True, False)


def test_only_four_schemes_are_remote() -> None:
    remote = ["http://h/x", "HTTPS://h/x", "s3://b/x", "gs://b/x"]
    local = ["x.tar", "/x.tar", "file:///x.tar", "a:b.tar", "http.tar", "s3/x.tar", "hdfs://h/x", "x/http://h"]
    assert [url for url in remote + local if is_remote(url)] == remote


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("pipe:curl https://host/s3cr3t.tar", "is a command"),
        ("PIPE:cat s3cr3t", "is a command"),
        ("cat s3cr3t |", "is a command"),
        ("| cat s3cr3t", "is a command"),
        ("$(cat s3cr3t)/a.tar", "is a command"),
        ("`cat s3cr3t`.tar", "is a command"),
        ("hdfs://me:s3cr3t@host/a.tar", "has a scheme that is not read"),
        ("simplecache::s3://bucket/a.tar", "has a scheme that is not read"),
        ("https:/host/a.tar", "lacks slashes"),
        ("s3:bucket/a.tar", "lacks slashes"),
        ("file://data/a.tar", "file:///absolute/path"),
        ("s3://", "no host or bucket"),
        ("https:///a.tar", "no host or bucket"),
        ("https://me:s3/cr3t@host/a.tar", "no host or bucket"),
        ("https://host/a#1.tar", "%23"),
        ("https://host/a.tar\nX-Header: 1", "control character"),
        ("s3://AKIA:s3cr3t@bucket/a.tar", "holds credentials"),
        ("s3://bucket/a.tar?sig=s3cr3t", "holds credentials"),
        ("a\0.tar", "zero byte"),
    ],
)
def test_what_is_neither_path_nor_known_url_is_refused_with_what_is_allowed(url: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_url(url)
    assert problem in str(error.value)
    assert "a shard is a local path, or a URL of file, http, https, s3 or gs" in str(error.value)
    assert "s3cr3t" not in str(error.value)
    with pytest.raises(ConfigError):
        find_shards((url,))


def test_local_braces_globs_folders_and_file_urls_find_plain_paths(tmp_path: Path) -> None:
    touch(tmp_path, "t-000.tar", "t-001.tar", "t-002.tar", "a/x.tar", "a-b/x.tar", "notes.txt")
    train = [f"{tmp_path}/t-00{n}.tar" for n in range(3)]
    for patterns in [
        ("t-{000..002}.tar",),
        ("t-*.tar",),
        ("t-00[0-2].tar", "t-000.tar"),
        (".",),
        (f"file://{tmp_path}",),
    ]:
        assert find_shards(patterns, folder=tmp_path) == train
    assert find_shards(("{a-b,a}",), folder=tmp_path) == [f"{tmp_path}/a/x.tar", f"{tmp_path}/a-b/x.tar"]
    assert find_shards(("*/x.tar", "t-000.tar"), folder=tmp_path)[0] == f"{tmp_path}/a/x.tar"


def test_a_name_that_looks_like_a_pattern_is_a_name_where_it_exists(tmp_path: Path) -> None:
    names = ["{a,b}.tar", "{.tar", "[1].tar"]
    touch(tmp_path, *names, "a.tar", "1.tar")
    for name in names:
        assert find_shards((name,), folder=tmp_path) == [f"{tmp_path}/{name}"]


@pytest.mark.parametrize(("pattern", "missing"), [("t-{000..003}.tar", "t-003.tar"), ("{t-*,u-*}.tar", "u-*.tar")])
def test_every_name_of_a_brace_must_be_there(tmp_path: Path, pattern: str, missing: str) -> None:
    touch(tmp_path, "t-000.tar", "t-001.tar", "t-002.tar")
    with pytest.raises(DataError, match="matches no file") as error:
        find_shards((pattern,), folder=tmp_path)
    assert f"{tmp_path}/{missing}:" in str(error.value)


def test_braces_that_do_not_balance_are_refused(tmp_path: Path) -> None:
    for pattern in ("t-{0..3.tar", f"{NOWHERE}/t-{{0..3.tar"):
        with pytest.raises(ConfigError, match="do not balance"):
            find_shards((pattern,), folder=tmp_path)


def test_remote_names_in_full_are_found_without_asking_and_keep_their_query() -> None:
    query = "?sv=1&sig=a%2Fb*[0]{1,2}"
    assert find_shards((f"{NOWHERE}/t-{{08..10}}.tar{query}",)) == [
        f"{NOWHERE}/t-{n}.tar{query}" for n in ("08", "09", "10")
    ]
    assert find_shards(("s3://bucket/{b,a}.tar",)) == ["s3://bucket/a.tar", "s3://bucket/b.tar"]
    twice = f"http://me:s3cr3t@host/a.tar{query}"
    assert find_shards((twice, twice)) == [twice]


def test_urls_that_differ_in_their_query_alone_are_refused() -> None:
    with pytest.raises(DataError, match="differ in their queries") as error:
        find_shards((f"{NOWHERE}/get?id=s3cr3t1", f"{NOWHERE}/get?id=s3cr3t2"))
    assert "s3cr3t" not in str(error.value)


def test_a_directory_listing_gives_globs_and_folders_over_http(server: HttpServer) -> None:
    root = server.url("list", "")
    b = [f"{root}b-1.tar", f"{root}b-2.tar"]
    assert find_shards((f"{root}b-*.tar",)) == b
    assert find_shards((f"{root}b-[2-9].tar",)) == b[1:]
    assert find_shards((root,)) == [f"{root}a%201.tar", *b]
    assert find_shards((f"{root}a *.tar",)) == [f"{root}a%201.tar"]
    assert find_shards((f"{root}set-*/{{x,y}}*.tar",)) == [f"{root}set-{n}.tar" for n in ("1/x", "2/x", "2/y")]
    assert find_shards((f"{root}set-*/x.tar",)) == [f"{root}set-1/x.tar", f"{root}set-2/x.tar"]
    assert find_shards((f"{root}set-*/",)) == [f"{root}set-{n}.tar" for n in ("1/x", "2/x", "2/y")]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("plain", "b-*.tar"), "403 Forbidden.*need a directory listing; write the names out"),
        (("plain", "set-1/"), "403 Forbidden.*need a directory listing"),
        (("list", "gone/*.tar"), "404 Not Found"),
        (("list", "page/*.tar"), "shows no listing; .*need a directory listing"),
        (("list", "c-*.tar"), "matches no file"),
        (("list", "none/"), "matches no file"),
    ],
)
def test_a_pattern_without_listing_or_match_is_named(server: HttpServer, place: tuple[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        find_shards((server.url(*place).replace("http://", "http://me:s3cr3t@"),))
    assert "s3cr3t" not in str(error.value)
