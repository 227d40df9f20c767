"""Shards have the right bytes, whatever the processes, seeds and interruptions, and nothing is lost on the way."""

import csv
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from unit.shards.built_sets import (
    build,
    captions_table,
    media_table,
    read_indexed,
    read_problems,
    read_tars,
    read_webdataset,
    tar_bytes,
    write_csv,
)

from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.shard_index import ShardIndex
from mmfuse.errors import ConfigError, DataError
from mmfuse.shards.build import BuildConfig, build_shards


def test_a_table_becomes_tars_that_every_reader_reads_alike_and_that_can_be_trained_on(tmp_path: Path) -> None:
    last = build(media_table(tmp_path / "in"), to=tmp_path / "out", samples_per_shard=6)
    expected = {}
    for n in range(20):
        members = {"txt": f"thing {n}\nanother name, of {n}\n".encode()}
        members |= {"jpg": (tmp_path / f"in/{n}.JPG").read_bytes()} if n % 3 else {}
        members |= {"ogg": (tmp_path / f"in/{n}.ogg").read_bytes()} if n % 4 else {}
        expected[f"{n:09d}"] = members
    assert read_tars(tmp_path / "out") == read_indexed(tmp_path / "out") == expected
    assert read_webdataset(tmp_path / "out") == expected
    assert all(list(members) == sorted(members) for members in read_tars(tmp_path / "out").values())
    assert (last.rows, last.samples, last.shards, last.problems) == (20, 20, 4, 0)
    assert [len(ShardIndex(p)) for p in sorted((tmp_path / "out").glob("*.mmindex"))] == [5, 5, 5, 5]
    assert read_problems(tmp_path / "out") == []
    source = open_source(SourceConfig(recipe=str(last.recipe)), modalities=("image", "text", "audio"))
    assert len(source) == 20
    assert source.rules["text"].captions == "lines"
    assert source.rules["image"].extensions == ("jpg",)


def test_one_process_and_two_write_the_same_bytes_and_only_the_seed_changes_the_order(tmp_path: Path) -> None:
    table = media_table(tmp_path / "in")
    for name, jobs, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        build(table, to=tmp_path / name, jobs=jobs, seed=seed, samples_per_shard=7, validation_ratio=0.3)
    assert tar_bytes(tmp_path / "one") == tar_bytes(tmp_path / "two")
    assert read_tars(tmp_path / "one", "set-validation-*.tar") != read_tars(tmp_path / "other", "set-validation-*.tar")
    assert read_tars(tmp_path / "one") == read_tars(tmp_path / "other")
    for seed in (0, 1):
        build(table, to=tmp_path / f"seed{seed}", seed=seed)
    assert list(read_tars(tmp_path / "seed0")) != list(read_tars(tmp_path / "seed1"))
    build(table, to=tmp_path / "plain", samples_per_shard=7, shuffle=False)
    assert list(read_tars(tmp_path / "plain")) == [f"{n:09d}" for n in range(20)]


def test_members_have_neither_owner_nor_time(tmp_path: Path) -> None:
    build(captions_table(tmp_path / "in", "ab"), to=tmp_path / "out")
    with tarfile.open(tmp_path / "out/set-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


KILLED_BUILD = """
import sys
from pathlib import Path
from mmfuse.shards.build import BuildConfig, build_shards
if __name__ == "__main__":
    config = BuildConfig(name="set", samples_per_shard=2, max_problem_ratio=0.5)
    for progress in build_shards((Path(sys.argv[1]),), Path(sys.argv[2]), config=config, jobs=2):
        print(progress.shards_done, flush=True)
"""


def test_a_killed_build_goes_on_to_the_same_bytes_and_keeps_what_was_done(tmp_path: Path) -> None:
    table = media_table(tmp_path / "in", rows=320)
    (tmp_path / "in/31.JPG").unlink()
    settings = {"samples_per_shard": 2, "max_problem_ratio": 0.5}
    build(table, to=tmp_path / "whole", **settings)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_BUILD, str(table), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while int(process.stdout.readline()) < 12:
            pass
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers end with the process that started them"
        time.sleep(0.05)
    kept = {shard: shard.stat().st_ino for shard in out.glob("*.tar")}
    assert 12 <= len(kept) < 160
    assert all(shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes() for shard in kept)
    with open(out / "build_shards.jsonl", "a") as records:
        records.write('{"shard": "set-0000')  # as a kill in the middle of a line leaves it
    last = build(table, to=out, **settings)
    assert tar_bytes(out) == tar_bytes(tmp_path / "whole")
    assert (out / "set.yaml").read_bytes() == (tmp_path / "whole/set.yaml").read_bytes()
    assert read_problems(out) == read_problems(tmp_path / "whole") and last.problems == 1
    written_again = [shard for shard, inode in kept.items() if shard.stat().st_ino != inode]
    assert len(written_again) <= 4, "at most those that two workers had finished and nobody had listed"
    assert not (out / "build.tmp").exists()


def is_running(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_finished_build_writes_nothing_and_a_lost_shard_comes_back(tmp_path: Path) -> None:
    table, out = media_table(tmp_path / "in"), tmp_path / "out"
    build(table, to=out, samples_per_shard=5)
    (out / "set.yaml").write_text((out / "set.yaml").read_text() + "licence: MIT\n")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("set*")}
    build(table, to=out, samples_per_shard=5)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("set*")} == before
    lost = (out / "set-000002.tar").read_bytes()
    (out / "set-000002.tar").unlink()
    build(table, to=out, samples_per_shard=5)
    assert (out / "set-000002.tar").read_bytes() == lost


def test_a_shard_that_was_cut_since_is_written_again(tmp_path: Path) -> None:
    table, out = media_table(tmp_path / "in"), tmp_path / "out"
    build(table, to=out, samples_per_shard=5)
    whole = (out / "set-000001.tar").read_bytes()
    os.truncate(out / "set-000001.tar", 3000)
    build(table, to=out, samples_per_shard=5)
    assert (out / "set-000001.tar").read_bytes() == whole


def test_missing_and_unreadable_files_are_left_out_and_all_told(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    table = media_table(folder, rows=12)
    (folder / "1.JPG").unlink()
    (folder / "2.JPG").write_bytes(b"")
    (folder / "5.JPG").unlink()
    (folder / "5.JPG").mkdir()
    (folder / "7.ogg").unlink()
    os.mkfifo(folder / "7.ogg")
    with open(table, newline="") as lines:
        rows = list(csv.reader(lines))[1:]
    rows += [["gone.jpg", "", ""], ["", "", ""], ["x.gif", "", "kept"], ["http://a/b.jpg", "", "kept too"]]
    write_csv(table, "image audio caption", rows)
    with pytest.raises(
        DataError, match=r"3 problems in 16 rows are more than max_problem_ratio = 0.1: row 13: holds no"
    ):
        build(table, to=tmp_path / "out", max_problem_ratio=0.1)
    with pytest.raises(DataError, match=r"8 problems in 16 rows .* all so far are in .*build_problems.jsonl"):
        build(table, to=tmp_path / "out", max_problem_ratio=0.2)
    last = build(table, to=tmp_path / "out", max_problem_ratio=0.5)
    assert (last.rows, last.samples, last.left_out, last.problems) == (16, 14, 2, 8)
    told = {(p["row"], p["column"], p["reason"]) for p in read_problems(tmp_path / "out")}
    known = ".jpg .jpeg .png .webp"
    assert told == {
        (1, "image", "cannot be read: No such file or directory"),
        (2, "image", "is empty"),
        (5, "image", "is not a file"),
        (7, "audio", "is not a file"),
        (12, "image", "cannot be read: No such file or directory"),
        (13, "", "holds no member: all its cells are empty"),
        (14, "image", f"image is read from {known}, not from .gif"),
        (15, "image", "is a URL; download it first, for instance with img2dataset"),
    }
    samples = read_tars(tmp_path / "out")
    assert samples.keys() == {f"{n:09d}" for n in range(16)} - {"000000012", "000000013"}
    assert samples["000000005"].keys() == {"txt", "ogg"}


def test_a_file_that_is_mended_comes_into_its_shard_and_no_other_is_written(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    table = media_table(folder)
    build(table, to=tmp_path / "whole", samples_per_shard=5)
    mended, still_gone = (folder / "4.JPG").read_bytes(), folder / "5.JPG"
    (folder / "4.JPG").unlink()
    still_gone.unlink()
    build(table, to=out, samples_per_shard=5, max_problem_ratio=0.5)
    before = {shard.name: shard.stat().st_ino for shard in out.glob("*.tar")}
    (folder / "4.JPG").write_bytes(mended)
    assert build(table, to=out, samples_per_shard=5, max_problem_ratio=0.5).problems == 1
    differing = {name for name, data in tar_bytes(tmp_path / "whole").items() if (out / name).read_bytes() != data}
    assert len(differing) == 1 and "000000005" in read_tars(out, differing.pop())
    assert len({name for name, inode in before.items() if (out / name).stat().st_ino != inode}) == 1
    assert read_tars(out)["000000004"]["jpg"] == mended


def test_another_plan_in_the_folder_is_refused_and_named(tmp_path: Path) -> None:
    table, out = media_table(tmp_path / "in"), tmp_path / "out"
    build(table, to=out, samples_per_shard=5)
    before = tar_bytes(out)
    with pytest.raises(ConfigError, match=r"shards of another plan: config.seed was 0, is 3; choose another folder"):
        build(table, to=out, samples_per_shard=5, seed=3)
    media_table(tmp_path / "in", rows=21)
    with pytest.raises(ConfigError, match=r"rows was 20, is 21; rows_hash was"):
        build(table, to=out, samples_per_shard=5)
    assert tar_bytes(out) == before


def test_files_that_no_plan_accounts_for_are_not_overwritten(tmp_path: Path) -> None:
    table, out = captions_table(tmp_path / "in", "ab"), tmp_path / "out"
    out.mkdir()
    (out / "set-000000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"has a file set-000000.tar, but no build.json"):
        build(table, to=out)
    assert {path.name for path in out.iterdir()} == {"set-000000.tar"}


def test_two_builds_do_not_write_to_one_folder(tmp_path: Path) -> None:
    table, out = captions_table(tmp_path / "in", "ab"), tmp_path / "out"
    first = build_shards((table,), out, config=BuildConfig(name="set"))
    next(first)
    with pytest.raises(DataError, match="another process is writing to it"):
        build(table, to=out)
    assert list(first)[-1].samples == 2


def test_the_validation_split_is_chosen_by_key_so_that_more_rows_move_none(tmp_path: Path) -> None:
    keys = [f"k{n}" for n in range(400)]
    few, many = (captions_table(tmp_path / "in", keys[:count], f"{count}.csv") for count in (300, 400))
    for table in (few, many):
        build(table, to=tmp_path / table.stem, table={"key": "key"}, validation_ratio=0.2)
    parts = {
        (stem, split): set(read_tars(tmp_path / stem, f"set-{split}-*.tar"))
        for stem in ("300", "400")
        for split in ("train", "validation")
    }
    assert parts["400", "validation"] & set(keys[:300]) == parts["300", "validation"]
    assert parts["400", "train"] | parts["400", "validation"] == set(keys)
    assert not parts["400", "train"] & parts["400", "validation"]
    assert 60 <= len(parts["400", "validation"]) <= 100
    recipe = str(tmp_path / "400/set.yaml")
    source = open_source(SourceConfig(recipe=recipe, split="validation"), modalities=("text",))
    assert len(source) == len(parts["400", "validation"])


def test_shards_are_about_as_large_as_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n}.wav").write_bytes(bytes(20_000 + 500 * n))
    last = build(folder, to=tmp_path / "out", shard_mib=0.25)
    sizes = [shard.stat().st_size / 2**20 for shard in (tmp_path / "out").glob("*.tar")]
    assert last.shards == 9 and all(0.17 < size < 0.3 for size in sizes)
