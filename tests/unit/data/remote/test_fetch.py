"""Downloads from a real nginx: what is received, tried again, given up, and never shown."""

import logging
import os
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import FAULTY_TIMES, HttpServer, free_ports, serve_http

from mmfuse.data.remote import retry
from mmfuse.data.remote.fetch import FetchConfig, RemoteFile, checksum_of, download, stat_remote
from mmfuse.errors import DataError, ShardError

DATA = random.Random(0).randbytes(600_000)
QUICK = FetchConfig(deadline_seconds=20, timeout_seconds=5, piece_bytes=250_000)
IMPATIENT = FetchConfig(deadline_seconds=20, timeout_seconds=0.5, piece_bytes=1_000_000)
HASTY = FetchConfig(deadline_seconds=1.5, timeout_seconds=0.4, piece_bytes=250_000)
PATIENT = HASTY.model_copy(update={"timeout_seconds": 30})
SECRETS = ("us3r", "pa55word", "s1gnature")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with serve_http(tmp_path_factory.mktemp("http")) as http:
        (http.files / "a.tar").write_bytes(DATA)
        (http.files / "empty.tar").write_bytes(b"")
        yield http


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)


def remote(server: HttpServer, fault: str) -> RemoteFile:
    """The file as it is, to be read from where the fault is."""
    return stat_remote(server.url("plain", "a.tar"))._replace(url=server.url(fault, "a.tar"))


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_thread(work: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    """A thread that is running, and what it raises."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_size_and_etag_come_with_the_first_byte(server: HttpServer) -> None:
    url = server.url("plain", "a.tar")
    changed = int((server.files / "a.tar").stat().st_mtime)
    assert stat_remote(url) == RemoteFile(url, len(DATA), f'"{changed:x}-{len(DATA):x}"')
    assert stat_remote(server.url("whole", "a.tar")).size == len(DATA)


@pytest.mark.parametrize(
    ("fault", "name", "message"),
    [("plain", "empty.tar", "is empty"), ("short", "a.tar", "does not say how large"), ("plain", "b.tar", "404 Not")],
)
def test_a_file_without_size_is_refused(server: HttpServer, fault: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=f"/{fault}/{name}: .*{message}"):
        stat_remote(server.url(fault, name), config=HASTY)


def test_a_file_is_read_in_pieces(server: HttpServer, tmp_path: Path) -> None:
    (server.files / "pieces.tar").write_bytes(DATA)
    file = stat_remote(server.url("plain", "pieces.tar"))
    download(file, tmp_path / "a.tar", config=QUICK)
    assert (tmp_path / "a.tar").read_bytes() == DATA
    pieces = ["bytes=0-249999 206", "bytes=250000-499999 206", "bytes=500000-599999 206"]
    assert server.asked(file.url) == ["bytes=0-0 206", *pieces]


def test_a_server_without_ranges_sends_the_whole_file_once(server: HttpServer, tmp_path: Path) -> None:
    file = remote(server, "whole")
    before = len(server.asked(file.url))
    download(file, tmp_path / "a.tar", config=QUICK)
    assert (tmp_path / "a.tar").read_bytes() == DATA
    assert server.asked(file.url)[before:] == ["bytes=0-249999 200"]


def test_a_server_that_may_compress_is_asked_not_to(server: HttpServer, tmp_path: Path) -> None:
    download(remote(server, "gzip"), tmp_path / "a.tar", config=QUICK)
    assert (tmp_path / "a.tar").read_bytes() == DATA
    with pytest.raises(DataError, match=r"packed/a.tar: the server compresses the file"):
        download(remote(server, "packed"), tmp_path / "b.tar", config=QUICK)


@pytest.mark.parametrize("fault", ["cut", "whole_cut", "reset", "short", "long", "shifted", "stall", "busy", "limited"])
def test_a_passing_fault_is_outlived(server: HttpServer, tmp_path: Path, fault: str) -> None:
    (server.files / "faulty.tar").write_bytes(DATA)
    good = stat_remote(server.url("plain", "faulty.tar"))
    file = good._replace(url=server.url(fault, "faulty.tar"))
    began = time.monotonic()
    download(file, tmp_path / "a.tar", config=IMPATIENT if fault == "stall" else QUICK)
    assert (tmp_path / "a.tar").read_bytes() == DATA
    assert len(server.asked(file.url)) > (1 if fault in ("whole_cut", "stall") else 3), "the fault did not happen"
    assert fault != "limited" or time.monotonic() - began >= FAULTY_TIMES, "Retry-After: 1 was not respected"


def test_a_broken_connection_costs_no_bytes_that_have_come(server: HttpServer, tmp_path: Path) -> None:
    (server.files / "resumed.tar").write_bytes(DATA)
    good = stat_remote(server.url("plain", "resumed.tar"))
    file = good._replace(url=server.url("stall", "resumed.tar"))
    download(file, tmp_path / "a.tar", config=IMPATIENT)
    assert (tmp_path / "a.tar").read_bytes() == DATA
    starts = [int(line.removeprefix("bytes=").partition("-")[0]) for line in server.asked(file.url)]
    assert starts[0] == 0 < starts[1] < starts[2]


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_not_tried_again(server: HttpServer, tmp_path: Path, status: int) -> None:
    file = remote(server, f"status/{status}")
    with pytest.raises(DataError, match=f"/status/{status}/a.tar: the server answers {status}"):
        download(file, tmp_path / "a.tar", config=QUICK)
    assert server.asked(file.url) == [f"bytes=0-249999 {status}"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["status/500", "half", "closed", "hang", "trickle", "nobody"])
def test_a_lasting_fault_is_given_up_within_the_deadline(server: HttpServer, tmp_path: Path, fault: str) -> None:
    file = remote(server, fault)
    if fault == "nobody":
        file = file._replace(url=f"http://127.0.0.1:{free_ports(1)[0]}/a.tar")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"a.tar: .*gave up at attempt \d+ \(deadline_seconds = 1.5\)"):
        download(file, tmp_path / "a.tar", config=PATIENT if fault == "hang" else HASTY)
    assert time.monotonic() - began < HASTY.deadline_seconds + 5
    assert not any(tmp_path.iterdir())
    if fault in ("status/500", "half", "trickle"):
        assert 1 < len(server.asked(file.url)) < 30, "tried again, with pauses"


def test_a_wait_beyond_the_deadline_is_not_begun(server: HttpServer, tmp_path: Path) -> None:
    file = remote(server, "later")
    with pytest.raises(DataError, match="429 Too Many Requests and asks to wait 3600 s; gave up at attempt 1"):
        download(file, tmp_path / "a.tar", config=QUICK)
    assert server.asked(file.url) == ["bytes=0-249999 429"]


def test_a_server_that_vanishes_and_returns_costs_only_what_was_on_its_way(tmp_path: Path) -> None:
    (tmp_path / "http").mkdir()
    with serve_http(tmp_path / "http") as server:
        (server.files / "a.tar").write_bytes(DATA)
        file = stat_remote(server.url("slow", "a.tar"))
        config = QUICK.model_copy(update={"piece_bytes": 10**6})
        here = tmp_path / "a.tar"
        thread, errors = in_thread(lambda: download(file, here, config=config))
        eventually(lambda: here.exists() and here.stat().st_size > 100_000)
        server.process.kill()
        time.sleep(0.5)
        server.process.start()
        thread.join()
        assert errors == []
        assert here.read_bytes() == DATA
        assert int(server.asked(file.url)[-1].removeprefix("bytes=").partition("-")[0]) > 100_000


def test_a_file_that_changed_since_it_was_indexed_is_not_read(server: HttpServer, tmp_path: Path) -> None:
    (server.files / "changed.tar").write_bytes(DATA)
    file = stat_remote(server.url("plain", "changed.tar"))
    for wrong in (file._replace(version='"1-2"'), file._replace(size=7, version=""), file._replace(size=7)):
        with pytest.raises(DataError, match=r"changed\.tar: ") as error:
            download(wrong, tmp_path / "a.tar", config=HASTY)
        # One version in two sizes is not a change, but a broken answer, which may pass.
        is_change = wrong[1:] != (7, file.version)
        assert isinstance(error.value, ShardError) == is_change == ("has changed since it was indexed" in str(error))
        assert not any(tmp_path.iterdir())
    (server.files / "changed.tar").write_bytes(DATA[:300_000])
    with pytest.raises(ShardError, match=r"has changed since it was indexed: 600,000 bytes of .*, now 300,000 of"):
        download(file, tmp_path / "a.tar", config=QUICK)
    assert len(server.asked(file.url)) < 20
    with pytest.raises(ShardError, match=r"a.tar: is shorter than 600,000 bytes"):
        download(remote(server, "status/416"), tmp_path / "a.tar", config=QUICK)


def test_a_file_that_changes_during_the_download_is_not_mixed(server: HttpServer, tmp_path: Path) -> None:
    (server.files / "moving.tar").write_bytes(DATA)
    file, here = stat_remote(server.url("slow", "moving.tar")), tmp_path / "a.tar"
    thread, errors = in_thread(lambda: download(file, here, config=QUICK))
    eventually(lambda: here.exists() and here.stat().st_size > 100_000)
    (server.files / "new.tar").write_bytes(DATA[::-1])
    os.utime(server.files / "new.tar", (1, 1))
    (server.files / "new.tar").replace(server.files / "moving.tar")
    thread.join()
    assert isinstance(errors[0], ShardError)
    assert "has changed since it was indexed" in str(errors[0])
    assert not here.exists()


def test_the_checksum_is_that_of_xxh3_128(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert checksum_of(tmp_path / "a") == "xxh3:99aa06d3014798d86001c324468d497f"  # of nothing, as published


def test_damaged_bytes_are_read_once_more_and_then_refused(server: HttpServer, tmp_path: Path) -> None:
    for name in ("passing.tar", "lasting.tar"):
        (server.files / name).write_bytes(DATA)
    checksum = checksum_of(server.files / "a.tar")
    one_piece = QUICK.model_copy(update={"piece_bytes": 10**6})
    file = stat_remote(server.url("flip", "passing.tar"))
    download(file, tmp_path / "a.tar", config=one_piece, checksum=checksum)
    assert (tmp_path / "a.tar").read_bytes() == DATA
    assert len(server.asked(file.url)) == FAULTY_TIMES + 1

    file = stat_remote(server.url("plain", "lasting.tar"))._replace(url=server.url("flip", "lasting.tar"))
    with pytest.raises(ShardError, match=f"lasting.tar: has the checksum xxh3:[0-9a-f]{{32}}, not {checksum}"):
        download(file, tmp_path / "b.tar", config=one_piece, checksum=checksum)
    assert not (tmp_path / "b.tar").exists()


def test_a_place_that_cannot_be_written_is_named(server: HttpServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/none/a.tar: cannot be written: No such file"):
        download(remote(server, "plain"), tmp_path / "none/a.tar", config=QUICK)


def test_signatures_and_passwords_arrive_as_they_were_given(server: HttpServer, tmp_path: Path) -> None:
    signed = server.url("signed", "a.tar?X-Signature=a%2Fb%2Bc%3D")
    private = server.url("private", "a.tar").replace("http://", "http://reader:s3cr3t@")
    for url in (signed, server.url("moved", "a.tar"), private):
        download(stat_remote(url), tmp_path / "a.tar", config=QUICK)
        assert (tmp_path / "a.tar").read_bytes() == DATA


@pytest.mark.parametrize("fault", ["status/403", "status/500", "cut", "hang", "plain", "tls", "nobody", "no name"])
def test_no_secret_is_in_an_error_or_a_log(server: HttpServer, tmp_path: Path, caplog, fault: str) -> None:
    caplog.set_level(logging.INFO)
    url = server.url(fault, "a.tar")
    url = {"tls": url.replace("http:", "https:"), "nobody": f"http://127.0.0.1:{free_ports(1)[0]}/a.tar"}.get(
        fault, url
    )
    url = "http://host.invalid/a.tar" if fault == "no name" else url
    url = url.replace("://", "://us3r:pa55word@") + "?X-Amz-Signature=s1gnature"
    file = RemoteFile(url, 1 << 40 if fault == "cut" else len(DATA), '"another version"' if fault == "plain" else "")
    with pytest.raises(DataError) as caught:
        download(file, tmp_path / "a.tar", config=FetchConfig(deadline_seconds=0.6, timeout_seconds=0.25))
    told = caplog.text + "".join(traceback.format_exception(caught.value))
    error: BaseException | None = caught.value
    while error is not None:
        told, error = told + repr(error), error.__cause__ or error.__context__
    assert "a.tar: " in told
    assert not [secret for secret in SECRETS if secret in told]


THREADS = """
import multiprocessing, sys, threading
from pathlib import Path

def fetch_all(url, folder):
    from mmfuse.data.remote.fetch import download, stat_remote
    file = stat_remote(url)
    places = [Path(folder) / str(n) for n in range(4)]
    threads = [threading.Thread(target=download, args=(file, place)) for place in places]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

if __name__ == "__main__":
    import mmfuse.data.remote.fetch, mmfuse.data.remote.urls
    assert threading.active_count() == 1, "a thread was started at import"
    assert "torch" not in sys.modules
    for method in ("spawn", "fork"):
        arguments = (sys.argv[1], sys.argv[2] + method)
        process = multiprocessing.get_context(method).Process(target=fetch_all, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode == 0
"""


def test_threads_of_spawned_and_forked_processes_download(server: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(THREADS)
    for method in ("spawn", "fork"):
        (tmp_path / method).mkdir()
    command = [sys.executable, str(tmp_path / "threads.py"), server.url("plain", "a.tar"), f"{tmp_path}/"]
    subprocess.run(command, check=True, timeout=180)
    received = [path.read_bytes() for method in ("spawn", "fork") for path in (tmp_path / method).iterdir()]
    assert received == [DATA] * 8
