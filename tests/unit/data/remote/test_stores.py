"""S3 from a real server, the faults of nginx spoken to as if it were S3, and what is not installed."""

import random
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import HttpServer, S3Server, serve_http, serve_s3

from mmfuse.data.remote import retry
from mmfuse.data.remote.fetch import FetchConfig, RemoteFile, download, stat_remote
from mmfuse.data.remote.urls import find_shards
from mmfuse.errors import ConfigError, DataError, ShardError

s3fs = pytest.importorskip("s3fs", reason="NOT TESTED: no s3fs here; install the extra s3")

DATA = random.Random(0).randbytes(9_000_000)
"""SeaweedFS stores it as three pieces of its own."""
CONFIG = FetchConfig(deadline_seconds=30, timeout_seconds=10, piece_bytes=4_000_000)
QUICK = FetchConfig(deadline_seconds=20, timeout_seconds=0.5, piece_bytes=250_000)
HASTY = FetchConfig(deadline_seconds=1, timeout_seconds=0.4)
PATIENT = FetchConfig(deadline_seconds=1, timeout_seconds=10)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as s3:
        s3.files.pipe(
            {"shards/set/a.tar": DATA, "shards/set/b.tar": b"b", "shards/set/b.txt": b"", "shards/c.tar": b"c"}
        )
        s3.files.pipe({"shards/other/a.tar": b"a", "shards/odd/a#1.tar": b"odd", "shards/set/.a.tar": b"hidden"})
        yield s3


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with serve_http(tmp_path_factory.mktemp("http")) as http:
        (http.files / "a.tar").write_bytes(DATA[:600_000])
        yield http


@pytest.fixture(autouse=True)
def nobody_s_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what the user's own files or machine would give, and without a client of the test before."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)
    pytest.importorskip(
        "s3fs", reason="NOT TESTED: no s3fs here; install the extra s3"
    ).S3FileSystem.clear_instance_cache()


def use(monkeypatch: pytest.MonkeyPatch, server: S3Server, **changes: str) -> None:
    """Gives the server's account to the environment, and to a new client."""
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in (server.environment | changes).items():
        monkeypatch.setenv(name, value)


def test_an_object_is_found_and_read_with_the_account_of_the_environment(bucket, tmp_path, monkeypatch) -> None:
    use(monkeypatch, bucket)
    file = stat_remote("s3://shards/set/a.tar")
    assert file == ("s3://shards/set/a.tar", len(DATA), bucket.files.info("shards/set/a.tar")["ETag"])
    download(file, tmp_path / "a.tar", config=CONFIG)
    assert (tmp_path / "a.tar").read_bytes() == DATA


def test_patterns_and_folders_find_objects(bucket, monkeypatch) -> None:
    use(monkeypatch, bucket)
    for pattern, found in {
        "s3://shards/set/*.tar": ["set/a.tar", "set/b.tar"],
        "s3://shards/set/?.tar": ["set/a.tar", "set/b.tar"],
        "s3://shards/set/": ["set/a.tar", "set/b.tar"],
        "s3://shards/set": ["set/a.tar", "set/b.tar"],
        "s3://shards/[os]*/a.tar": ["other/a.tar", "set/a.tar"],
        "s3://shards/{set,other}/a*": ["other/a.tar", "set/a.tar"],
        "s3://shards": ["c.tar"],
        "s3://shards/set/b.txt": ["set/b.txt"],
    }.items():
        assert find_shards((pattern,)) == [f"s3://shards/{name}" for name in found], pattern


def test_a_pattern_without_usable_match_is_named(bucket, monkeypatch) -> None:
    use(monkeypatch, bucket)
    for pattern, kind, message in (
        ("s3://shards/set/c*.tar", DataError, r"s3://shards/set/c\*.tar: matches no file"),
        ("s3://shards/none/", DataError, "s3://shards/none/: .*404"),
        ("s3://nobody/*.tar", DataError, "s3://nobody/: .*404 NoSuchBucket"),
        ("s3://shards/odd/*.tar", ConfigError, "s3://shards/odd/a: has a fragment"),
    ):
        with pytest.raises(kind, match=message):
            find_shards((pattern,))


def test_a_presigned_url_is_read_over_http_while_it_is_valid(bucket, tmp_path) -> None:
    url = bucket.files.sign("shards/set/a.tar", expiration=600)
    assert find_shards((url,)) == [url]
    download(stat_remote(url), tmp_path / "a.tar", config=CONFIG)
    assert (tmp_path / "a.tar").read_bytes() == DATA
    wrong = re.sub(r"Signature=[^&]*", "Signature=s1gn3d", url)
    with pytest.raises(DataError, match=r"/shards/set/a.tar: the server answers 403 .* wrong or expired") as error:
        stat_remote(wrong)
    assert "s1gn3d" in wrong
    assert "s1gn3d" not in str(error.value) + repr(error.value.__context__)


def test_a_wrong_secret_is_refused_at_once_and_not_told(bucket, monkeypatch) -> None:
    use(monkeypatch, bucket, AWS_SECRET_ACCESS_KEY="wr0ng/secret")
    for ask in (lambda: stat_remote("s3://shards/set/a.tar"), lambda: find_shards(("s3://shards/set/*.tar",))):
        with pytest.raises(DataError, match=r"s3://shards/set.*403 SignatureDoesNotMatch") as error:
            ask()
        assert "wr0ng" not in "".join(traceback.format_exception(error.value))


def test_what_is_wrong_with_the_account_is_told(bucket, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"no usable credentials .*AWS_ACCESS_KEY_ID"):
        stat_remote("s3://shards/set/a.tar", config=CONFIG)
    use(monkeypatch, bucket, AWS_ENDPOINT_URL="127.0.0.1:9")
    with pytest.raises(DataError, match="check AWS_ENDPOINT_URL"):
        stat_remote("s3://shards/set/a.tar", config=CONFIG)


def test_an_object_that_was_replaced_is_not_read(bucket, tmp_path, monkeypatch) -> None:
    use(monkeypatch, bucket)
    bucket.files.pipe("shards/new.tar", b"old")
    file = stat_remote("s3://shards/new.tar")
    bucket.files.pipe("shards/new.tar", b"new")
    with pytest.raises(ShardError, match=r"s3://shards/new.tar: has changed since it was indexed"):
        download(file, tmp_path / "a.tar", config=CONFIG)
    bucket.files.rm("shards/new.tar")
    with pytest.raises(DataError, match=r"s3://shards/new.tar: the server answers 404 NoSuchKey"):
        download(file, tmp_path / "a.tar", config=CONFIG)


def test_faults_of_an_s3_server_are_outlived(nginx: HttpServer, tmp_path, monkeypatch) -> None:
    file = as_s3(nginx, monkeypatch)
    for fault in ("cut", "reset", "stall", "busy", "whole"):
        download(file._replace(url=f"s3://{fault}/a.tar"), tmp_path / fault, config=QUICK)
        assert (tmp_path / fault).read_bytes() == DATA[:600_000]
        assert fault == "whole" or len(nginx.asked(nginx.url(fault, "a.tar"))) > 3, f"{fault} did not happen"


@pytest.mark.parametrize("fault", ["status/500", "closed", "hang"])
def test_attempts_and_deadline_are_ours_and_not_the_library_s(nginx, tmp_path, monkeypatch, fault: str) -> None:
    file, config = as_s3(nginx, monkeypatch)._replace(url=f"s3://{fault}/a.tar"), HASTY if fault == "hang" else PATIENT
    patient = config.model_copy(update={"deadline_seconds": 30.0})
    download(file._replace(url="s3://whole/a.tar"), tmp_path / "whole", config=patient)  # making a client takes a while
    with pytest.raises(DataError, match=rf"s3://{fault}/a.tar: .* \(deadline_seconds = 1\)") as error:
        download(file, tmp_path / "a.tar", config=config)
    attempts = int(str(error.value).partition("gave up at attempt ")[2].partition(" ")[0])
    assert attempts > 1 or fault == "hang"
    at_once = 2 if fault == "closed" else 1  # aiohttp asks again where a connection that it kept was closed
    assert len(nginx.asked(nginx.url(fault, "a.tar"))) <= attempts * at_once
    assert not (tmp_path / "a.tar").exists()


def as_s3(nginx: HttpServer, monkeypatch: pytest.MonkeyPatch) -> RemoteFile:
    """Makes nginx the endpoint, whose buckets are its faults."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", nginx.url("", "").rstrip("/"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    return stat_remote("s3://plain/a.tar")


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'mmfuse\[gcs\]'"):
        stat_remote("gs://bucket/a.tar")
