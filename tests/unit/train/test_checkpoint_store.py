"""Checkpoints at a URL: whole or not there, whatever dies or fails on the way."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from servers import serve_s3
from unit.train.test_checkpoint import names_in
from unit.train.tiny_runs import assert_same_state, read_lines, read_metrics, stored_state, train_tiny

from mmfuse.cli import main
from mmfuse.errors import CheckpointError, ConfigError
from mmfuse.train.checkpoint import Keep
from mmfuse.train.checkpoint_store import CheckpointStore, find_checkpoint
from mmfuse.train.manifest import MANIFEST, RUN, store_file
from mmfuse.train.run import load_run
from mmfuse.train.state_files import StoredState

CHANGES = ("makedirs", "put_file", "rm_file", "rm")


class Died(BaseException):
    """A process was killed: nothing of it catches this."""


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, *, at: int, error: BaseException, half: bool) -> Iterator[list[str]]:
    """The file system fails at its change number `at`; `half` of a file may be there then. Gives the changes so far."""
    done: list[str] = []

    def wrap(name: str) -> None:
        change = getattr(LocalFileSystem, name)

        def act(files: LocalFileSystem, *arguments: Any, **settings: Any) -> Any:
            done.append(name)
            if len(done) == at:
                if half and name == "put_file":
                    source, target = map(Path, arguments)
                    target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
                if half and name == "rm":
                    next(path for path in Path(arguments[0]).rglob("*") if path.is_file()).unlink()
                raise error
            return change(files, *arguments, **settings)

        patch.setattr(LocalFileSystem, name, act)

    with monkeypatch.context() as patch:
        for name in CHANGES:
            wrap(name)
        yield done


def save(store: CheckpointStore, staging: Path, step: int, *, keep: int = 1, keep_every: int | None = None) -> None:
    """As two ranks and the first of them do, whose files all have the step in them."""
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "modalities/text").mkdir(parents=True)
    written = {}
    for rank in range(2):
        path = staging / f"model-{rank:05d}.safetensors"
        path.write_text(f"{step} of rank {rank}")
        written[path.name] = store_file(path)
        store.upload(path, f"step_{step:08d}/{path.name}")
        path.unlink()
    (staging / "modalities/text/config.json").write_text(str(step))
    (staging / RUN).write_text(f"name: x{step}")
    store.publish(staging, written, step=step, facts={"step": step}, keep=Keep(keep, keep_every))


def check_newest(store: CheckpointStore, root: Path) -> int:
    """Its step, when every byte of it is as it was saved."""
    found = store.newest()
    assert found is not None
    folder = store.download(*found, root)
    assert (folder / RUN).read_text() == f"name: x{found[0]}"
    assert (folder / "model-00001.safetensors").read_text() == f"{found[0]} of rank 1"
    return found[0]


@pytest.mark.parametrize("half", [False, True])
def test_a_kill_before_or_within_any_change_at_the_url_leaves_a_whole_checkpoint_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    first, url = tmp_path / "first", tmp_path / "url"
    save(CheckpointStore(first.as_uri()), tmp_path / "staging", 1)
    reached, at, lived = [], 0, False
    while not lived:
        at += 1
        shutil.rmtree(url, ignore_errors=True)
        shutil.copytree(first, url)
        store = CheckpointStore(url.as_uri())
        try:
            with interrupted(monkeypatch, at=at, error=Died(), half=half) as done:
                save(store, tmp_path / "staging", 2)
            lived = len(done) < at
        except Died:
            pass
        reached.append(check_newest(store, tmp_path / "copies"))
        save(store, tmp_path / "staging", 3)
        assert names_in(url) == ["step_00000003"]
    assert at > 10 and reached == sorted(reached) and set(reached) == {1, 2}


def test_the_newest_and_milestones_stay_and_later_steps_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path.as_uri() + "/url")
    for step in (2, 3, 4, 6, 7, 12, 8, 9):
        save(store, tmp_path / "staging", step, keep=2, keep_every=3)
    assert store.steps() == [9, 8, 6, 3]


@pytest.mark.parametrize("change", ["flip", "cut", "delete"])
def test_a_damaged_one_is_named_and_the_run_goes_on_from_the_one_before(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: str
) -> None:
    url = tmp_path / "url"
    train_tiny(tiny_run, tmp_path / "whole", f"train.checkpoint_url={url.as_uri()}")
    damaged = url / "step_00000004/exp_avg-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.unlink()
    if change != "delete":
        damaged.write_bytes(content if change == "flip" else content[:-1])
    train_tiny(tiny_run, tmp_path / "again", f"train.checkpoint_url={url.as_uri()}")
    assert f"WARNING not used: {url.as_uri()}/step_00000004/exp_avg-00000.safetensors: " in capfd.readouterr().err
    assert read_metrics(tmp_path / "again", "loss") == read_metrics(tmp_path / "whole", "loss")


def test_a_run_goes_on_in_an_empty_folder_and_equals_one_that_was_not_moved(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, at_url = tmp_path / "url", f"train.checkpoint_url={(tmp_path / 'url').as_uri()}"
    validated = f"data.validation={{new: {{recipe: {tmp_path / 'set/recipe.yaml'}}}}}"
    settings = (validated, "train.evaluate_every=1")
    whole = train_tiny(tiny_run, tmp_path / "whole", *settings)
    train_tiny(tiny_run, tmp_path / "first", *settings, at_url, "train.keep_checkpoints=9")
    assert names_in(tmp_path / "first/checkpoints") == []
    shutil.rmtree(url / "step_00000004")
    moved = train_tiny(tiny_run, tmp_path / "moved", *settings, at_url)
    assert names_in(moved / "checkpoints") == [] and not (moved / "copies").exists()
    assert read_metrics(moved, "loss") == read_metrics(whole, "loss")
    assert names_in(moved / "evaluations") == names_in(whole / "evaluations") != []
    assert {"report.html", "report.json", "run.yaml", "metrics.jsonl"} <= set(names_in(url))
    monkeypatch.setattr("mmfuse.train.checkpoint_store._CACHE", tmp_path / "cache")
    assert_same_state(StoredState(find_checkpoint(url.as_uri())), stored_state(whole))
    for place in (url.as_uri(), f"{url.as_uri()}/step_00000002"):
        assert main(["checkpoint", "info", place]) == 0
        assert main(["checkpoint", "verify", place]) == 0
    assert "step          2 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ConnectionError("reset"), OSError(28, "No space left on device")])
def test_an_upload_that_fails_is_a_loud_error_the_run_goes_on_and_the_next_one_succeeds(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: OSError
) -> None:
    """An error that passes is repeated until patience ends."""
    put, failed, lock = LocalFileSystem.put_file, [], threading.Lock()

    def fail(files: LocalFileSystem, source: str, target: str, **settings: Any) -> None:
        if "step_00000002/exp" in target:
            with lock:
                failed.append(target)
            raise error
        put(files, source, target, **settings)

    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    monkeypatch.setattr("mmfuse.data.remote.retry.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("mmfuse.train.saver._PATIENCE_SHARE", 1800)  # one second
    settings = (f"train.checkpoint_url={(tmp_path / 'url').as_uri()}", "train.checkpoint_every=1")
    run = train_tiny(tiny_run, tmp_path / "out", *settings, "train.keep_checkpoints=9")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if " ERROR " in line]
    assert "step 2 was not written" in line and str(error) in line and "file://" in line
    assert (len(failed) > 1) == isinstance(error, ConnectionError)
    assert CheckpointStore((tmp_path / "url").as_uri()).steps() == [4, 3, 1]
    assert len(read_lines(run / "metrics.jsonl")) == 4 and names_in(run / "checkpoints") == []


def test_a_url_that_cannot_be_used_is_refused_before_the_first_step(tiny_run: Path, tmp_path: Path) -> None:
    for url, message in {
        "gdrve://run": "no protocol 'gdrve'; did you mean 'gdrive'",
        "gs://bucket/run": r"pip install 'mmfuse\[gcs\]'",
        "file://run": "write file:///absolute/path",
        "abfs://data@account/run": "Install adlfs",
    }.items():
        with pytest.raises(ConfigError, match=message):
            train_tiny(tiny_run, tmp_path / "out", f"train.checkpoint_url={url}")
    for url in ("/data/run", "sftp://me:secret@host/run", "s3://bucket/run?key=secret"):
        with pytest.raises(ConfigError, match=r"train.checkpoint_url.*expected a URL such as s3://"):
            load_run(str(tiny_run), overrides=[f"train.checkpoint_url={url}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file:///.*/file/run: .*(NotADirectory|FileExists)Error"):
        train_tiny(tiny_run, tmp_path / "out", f"train.checkpoint_url={(tmp_path / 'file').as_uri()}/run")


def test_a_local_checkpoint_that_is_newer_than_all_at_the_url_is_not_forgotten(tiny_run: Path, tmp_path: Path) -> None:
    train_tiny(tiny_run, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"step_00000004: is newer than all at train.checkpoint_url"):
        train_tiny(tiny_run, tmp_path / "out", f"train.checkpoint_url={(tmp_path / 'url').as_uri()}")


def test_a_manifest_that_names_files_elsewhere_is_none(tmp_path: Path) -> None:
    store = CheckpointStore((tmp_path / "url").as_uri())
    save(store, tmp_path / "staging", 1)
    path = tmp_path / "url/step_00000001" / MANIFEST
    path.write_text(path.read_text().replace("modalities/text/config.json", "../../outside"))
    assert store.newest() is None


def test_a_bucket_keeps_what_a_folder_keeps_and_says_who_may_not(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs", reason="NOT TESTED: no s3fs here; install the extra s3")
    with serve_s3(tmp_path) as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        store = CheckpointStore("s3://shards/run")
        for step in (1, 2):
            save(store, tmp_path / "staging", step)
        assert all("/step_00000002/" in path for path in bucket.files.find("shards/run"))
        assert check_newest(store, tmp_path / "copies") == 2
        bucket.files.pipe("s3://shards/run/step_00000002/model-00000.safetensors", b"cut")
        assert store.newest() is None
        moved = [train_tiny(tiny_run, tmp_path / "first", "train.checkpoint_url=s3://shards/tiny")]
        bucket.files.rm("s3://shards/tiny/step_00000004", recursive=True)
        moved.append(train_tiny(tiny_run, tmp_path / "moved", "train.checkpoint_url=s3://shards/tiny"))
        assert read_metrics(moved[0], "loss") == read_metrics(moved[1], "loss")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(CheckpointError, match=r"s3://shards/tiny: the server answers 403 .*credentials"):
            train_tiny(tiny_run, tmp_path / "refused", "train.checkpoint_url=s3://shards/tiny")
