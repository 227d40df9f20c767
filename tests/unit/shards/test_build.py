"""Tables and folders become shards: the right bytes, whatever the processes and interruptions, and nothing lost."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from helpers import picture_bytes, sound_bytes

from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.shard_index import ShardIndex
from mmfuse.errors import ConfigError, DataError
from mmfuse.shards.build import BuildConfig, build_shards
from mmfuse.shards.output import Progress

Samples = dict[str, dict[str, bytes]]


def build(*inputs: Path, to: Path, jobs: int = 1, **settings) -> Progress:
    """The last event of a whole build called `set`."""
    config = BuildConfig.model_validate({"name": "set", **settings})
    *_, last = build_shards(inputs, to, config=config, jobs=jobs)
    assert last.samples + last.left_out == last.rows
    return last


def write_csv(path: Path, header: str, rows: Iterable[Iterable[object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(), *rows])
    return path


def media_table(folder: Path, *, rows: int = 20) -> Path:
    """A table in which every third row has no picture and every fourth no sound; captions are there always."""
    folder.mkdir(exist_ok=True)
    sounds = [sound_bytes(n) for n in range(3)]
    lines = []
    for n in range(rows):
        (folder / f"{n}.JPG").write_bytes(picture_bytes(n))
        (folder / f"{n}.ogg").write_bytes(sounds[n % 3])
        captions = json.dumps([f"thing {n}", f"another name,\nof {n}"])
        lines.append([f"{n}.JPG" if n % 3 else "", f"{n}.ogg" if n % 4 else "", captions])
    return write_csv(folder / "table.csv", "image audio caption", lines)


def read_tars(folder: Path, pattern: str = "*.tar") -> Samples:
    """By key and extension, as Python's tarfile reads them."""
    samples: Samples = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def read_indexed(folder: Path) -> Samples:
    """The same, as our index finds them."""
    samples: Samples = {}
    for shard in sorted(folder.glob("*.tar")):
        data, index = shard.read_bytes(), ShardIndex(Path(f"{shard}.mmindex"))
        for number in range(len(index)):
            sample = index.sample(number)
            samples[sample.key] = {e: data[start : start + size] for e, (start, size) in sample.members.items()}
    return samples


def read_webdataset(folder: Path) -> Samples:
    """The same, as the webdataset library reads them."""
    shards = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return {s["__key__"]: {e: data for e, data in s.items() if not e.startswith("__")} for s in samples}


def tar_bytes(folder: Path) -> dict[str, bytes]:
    return {shard.name: shard.read_bytes() for shard in folder.glob("*.tar")}


def problems(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "build_problems.jsonl").read_text().splitlines()]


def captions_only(folder: Path, keys: Iterable[str], name: str = "table.csv") -> Path:
    folder.mkdir(exist_ok=True)
    return write_csv(folder / name, "key caption", [[key, f"thing {key}"] for key in keys])


def test_a_table_becomes_tars_that_every_reader_reads_alike_and_that_can_be_trained_on(tmp_path: Path) -> None:
    last = build(media_table(tmp_path / "in"), to=tmp_path / "out", samples_per_shard=6)
    expected: Samples = {}
    for n in range(20):
        members = {"txt": f"thing {n}\nanother name, of {n}\n".encode()}
        members |= {"jpg": (tmp_path / f"in/{n}.JPG").read_bytes()} if n % 3 else {}
        members |= {"ogg": (tmp_path / f"in/{n}.ogg").read_bytes()} if n % 4 else {}
        expected[f"{n:09d}"] = members
    assert read_tars(tmp_path / "out") == read_indexed(tmp_path / "out") == expected
    assert read_webdataset(tmp_path / "out") == expected
    assert (last.rows, last.samples, last.shards, last.problems) == (20, 20, 4, 0)
    assert [len(ShardIndex(p)) for p in sorted((tmp_path / "out").glob("*.mmindex"))] == [5, 5, 5, 5]
    assert problems(tmp_path / "out") == []
    source = open_source(SourceConfig(recipe=str(last.recipe)), modalities=("image", "text", "audio"))
    assert len(source) == 20
    assert source.rules["text"].captions == "lines"
    assert source.rules["image"].extensions == ("jpg",)


def test_csv_jsonl_and_parquet_of_one_content_give_the_same_tars(tmp_path: Path) -> None:
    table = media_table(tmp_path / "in", rows=7)
    build(table, to=tmp_path / "csv")
    with open(table, newline="") as lines:
        rows = [{name: value or None for name, value in row.items()} for row in csv.DictReader(lines)]
    rows = [row | {"caption": json.loads(row["caption"])} for row in rows]
    (tmp_path / "in/table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(tmp_path / "in/table.jsonl", to=tmp_path / "jsonl")
    whole = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(whole.slice(0, 4), tmp_path / "in/a.parquet", row_group_size=2)
    pyarrow.parquet.write_table(whole.slice(4), tmp_path / "in/b.parquet")
    build(tmp_path / "in/a.parquet", tmp_path / "in/b.parquet", to=tmp_path / "parquet")
    assert tar_bytes(tmp_path / "csv") == tar_bytes(tmp_path / "jsonl") == tar_bytes(tmp_path / "parquet")


def test_one_process_and_two_write_the_same_bytes_and_only_the_seed_changes_the_order(tmp_path: Path) -> None:
    table = media_table(tmp_path / "in")
    for name, jobs, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        build(table, to=tmp_path / name, jobs=jobs, seed=seed, samples_per_shard=7, validation_ratio=0.3)
    assert tar_bytes(tmp_path / "one") == tar_bytes(tmp_path / "two")
    assert list(read_tars(tmp_path / "one")) != list(read_tars(tmp_path / "other"))
    assert read_tars(tmp_path / "one") == read_tars(tmp_path / "other")
    build(table, to=tmp_path / "plain", samples_per_shard=7, shuffle=False)
    assert list(read_tars(tmp_path / "plain")) == [f"{n:09d}" for n in range(20)]


def test_members_have_neither_owner_nor_time(tmp_path: Path) -> None:
    build(captions_only(tmp_path / "in", "ab"), to=tmp_path / "out")
    with tarfile.open(tmp_path / "out/set-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


KILLED_BUILD = """
import sys
from pathlib import Path
from mmfuse.shards.build import BuildConfig, build_shards
if __name__ == "__main__":
    config = BuildConfig(name="set", samples_per_shard=8, max_problem_ratio=0.5)
    for progress in build_shards((Path(sys.argv[1]),), Path(sys.argv[2]), config=config, jobs=2):
        print(progress.shards_done, flush=True)
"""


def test_a_killed_build_goes_on_to_the_same_bytes_and_keeps_what_was_done(tmp_path: Path) -> None:
    table = media_table(tmp_path / "in", rows=320)
    (tmp_path / "in/31.JPG").unlink()
    settings = {"samples_per_shard": 8, "max_problem_ratio": 0.5}
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
    assert 12 <= len(kept) < 40
    assert all(shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes() for shard in kept)
    with open(out / "build_shards.jsonl", "a") as records:
        records.write('{"shard": "set-0000')  # as a kill in the middle of a line leaves it
    last = build(table, to=out, **settings)
    assert tar_bytes(out) == tar_bytes(tmp_path / "whole")
    assert (out / "set.yaml").read_bytes() == (tmp_path / "whole/set.yaml").read_bytes()
    assert problems(out) == problems(tmp_path / "whole") and last.problems == 1
    written_again = [shard for shard, inode in kept.items() if shard.stat().st_ino != inode]
    assert len(written_again) <= 4, "at most those that two workers had finished and nobody had listed"
    assert not (out / "build.tmp").exists()


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
    told = {(p["row"], p["column"], p["reason"]) for p in problems(tmp_path / "out")}
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
    table, out = captions_only(tmp_path / "in", "ab"), tmp_path / "out"
    out.mkdir()
    (out / "set-000000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"has a file set-000000.tar, but no build.json"):
        build(table, to=out)
    assert {path.name for path in out.iterdir()} == {"set-000000.tar"}


def test_two_builds_do_not_write_to_one_folder(tmp_path: Path) -> None:
    table, out = captions_only(tmp_path / "in", "ab"), tmp_path / "out"
    out.mkdir()
    with open(out / "build_shards.jsonl", "wb") as records:
        fcntl.flock(records, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing to it"):
            build(table, to=out)
    assert build(table, to=out).samples == 2


def test_keys_lose_their_dots_and_double_ones_their_later_rows(tmp_path: Path) -> None:
    keys = ["a.b", "a_b", "n01/x.jpg", "./c", "..", "", "__x__/y", "d", "d", "u\n"]
    table = captions_only(tmp_path / "in", keys)
    last = build(table, to=tmp_path / "out", table={"key": "key"}, max_problem_ratio=1)
    assert read_indexed(tmp_path / "out").keys() == read_webdataset(tmp_path / "out").keys()
    assert read_tars(tmp_path / "out").keys() == {"a_b", "n01/x_jpg", "c", "d", "u"}
    assert read_tars(tmp_path / "out")["a_b"] == {"txt": b"thing a.b\n"}
    reasons = {p["row"]: p["reason"] for p in problems(tmp_path / "out")}
    assert reasons.keys() == {1, 4, 5, 6, 8} and last.left_out == 5
    assert reasons[1] == "has the key 'a_b' of row 0"
    assert "empty or leads out" in reasons[4] and "empty or leads out" in reasons[5]
    assert "webdataset skips" in reasons[6]


def test_captions_come_from_several_columns_and_lists_and_others_are_kept_as_json(tmp_path: Path) -> None:
    rows = [
        {"a": "one", "b": ["two", None, "  three \n lines "], "url": "u0", "n": 1.5},
        {"a": "[laughs] not a list", "b": None, "url": None, "n": float("nan")},
        {"a": ["x"], "b": {"no": "caption"}, "url": "u2", "n": 3},
        {"a": "", "b": [], "url": "u3", "n": 4},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n\n[1]\n")
    columns = {"captions": ["a", "b"], "keep": ["url", "n"]}
    last = build(tmp_path / "t.jsonl", to=tmp_path / "out", table=columns, max_problem_ratio=1)
    samples = read_tars(tmp_path / "out")
    assert [samples[f"{n:09d}"]["txt"] for n in range(3)] == [
        b"one\ntwo\nthree lines\n",
        b"[laughs] not a list\n",
        b"x\n",
    ]
    assert [json.loads(samples[f"{n:09d}"]["json"]) for n in range(2)] == [
        {"url": "u0", "n": 1.5},
        {"url": None, "n": None},
    ]
    assert (last.rows, last.samples, last.left_out) == (6, 3, 3)
    assert [(p["row"], p["reason"]) for p in problems(tmp_path / "out")] == [
        (2, "holds a dict, not a caption"),
        (3, "holds no member: all its cells are empty"),
        (4, "is not JSON"),
        (5, "is no JSON object"),
    ]


def test_the_validation_split_is_chosen_by_key_so_that_more_rows_move_none(tmp_path: Path) -> None:
    keys = [f"k{n}" for n in range(400)]
    few, many = (captions_only(tmp_path / "in", keys[:count], f"{count}.csv") for count in (300, 400))
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


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_files_of_one_stem_in_a_folder_or_below_are_one_sample(tmp_path: Path) -> None:
    files = {"a/1.jpg": b"j", "a/1.txt": b"t", "a/1.JSON": b"{}", "a-b/1.wav": b"w", "2.v1.png": b"p", ".x/y.txt": b"h"}
    folder = write_files(tmp_path / "in", files | {"a/.DS_Store": b"h", "a/1/2.txt": b"deep"})
    assert build(folder, to=tmp_path / "out", shuffle=False).samples == 4
    assert read_tars(tmp_path / "out") == read_indexed(tmp_path / "out")
    assert read_tars(tmp_path / "out") == {
        "2_v1": {"png": b"p"},
        "a/1": {"jpg": b"j", "json": b"{}", "txt": b"t"},
        "a/1/2": {"txt": b"deep"},
        "a-b/1": {"wav": b"w"},
    }


def test_files_that_no_modality_reads_are_refused_with_what_is_read(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"1.jpg": b"j", "1.gif": b"g", "2.gif": b"g", "README": b"r"})
    with pytest.raises(ConfigError, match=r"2 \*\.gif, 1 README; remove or ignore them. Known are \.flac \.jpeg \.jpg"):
        build(folder, to=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    last = build(folder, to=tmp_path / "out", folder={"ignore": ["*.gif", "README"]})
    assert read_tars(tmp_path / "out") == {"1": {"jpg": b"j"}} and last.rows == 1


def test_parallel_folders_are_joined_by_stem(tmp_path: Path) -> None:
    files = {f"images/{n}.jpg": b"j%d" % n for n in (1, 2, 10)} | {f"captions/{n}.txt": b"t" for n in (2, 10, 3)}
    folder = write_files(tmp_path / "in", files | {"images/x/1.jpg": b"jx", "captions/x/1.txt": b"tx"})
    build(folder, to=tmp_path / "out", folder={"layout": "parallel"})
    assert read_tars(tmp_path / "out") == {
        "1": {"jpg": b"j1"},
        "2": {"jpg": b"j2", "txt": b"t"},
        "3": {"txt": b"t"},
        "10": {"jpg": b"j10", "txt": b"t"},
        "x/1": {"jpg": b"jx", "txt": b"tx"},
    }


def test_folders_of_classes_give_captions_and_groups(tmp_path: Path) -> None:
    files = {"red_fox/1.jpg": b"1", "red_fox/2.jpg": b"2", "cat/1.jpg": b"3", "cat/9.jpg": b"4", "cat/9.txt": b"own"}
    folder = write_files(tmp_path / "in", files)
    last = build(folder, to=tmp_path / "out", folder={"caption": "a photo of a {}"})
    captions = {key: members["txt"] for key, members in read_tars(tmp_path / "out").items()}
    fox, cat = b"a photo of a red fox\n", b"a photo of a cat\n"
    assert captions == {"red_fox/1": fox, "red_fox/2": fox, "cat/1": cat, "cat/9": b"own"}
    source = open_source(SourceConfig(recipe=str(last.recipe)), modalities=("image", "text"))
    groups = [(raw.key.partition("/")[0], raw.group) for raw in map(source.read, range(4))]
    assert sorted(groups) == [("cat", "cat"), ("cat", "cat"), ("red_fox", "red_fox"), ("red_fox", "red_fox")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": {"captions": ["captoin"]}}, r"has no column 'captoin'; did you mean 'caption'\?"),
        ({"table": {"paths": {"imgae": "key"}}}, r"no modality 'imgae'; did you mean 'image'\?"),
        ({"table": {"paths": {"text": "key"}, "captions": ["caption"]}}, "a sample has one member .txt"),
        ({"folder": {"layout": "parallel"}}, "is a table, but settings for a folder are given"),
        ({"validation_ratio": 0.0001}, "leaves one split empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict, message: str
) -> None:
    table = captions_only(tmp_path / "in", "abc")
    with pytest.raises(ConfigError, match=message):
        build(table, to=tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_what_is_no_table_or_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"t.xlsx: is no table of a known format \(.csv"):
        build(tmp_path / "t.xlsx", to=tmp_path / "out")
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"t.parquet: cannot be read"):
        build(tmp_path / "t.parquet", to=tmp_path / "out")
    (tmp_path / "t.csv").write_text('caption\n"opened\nand never closed\n')
    with pytest.raises(DataError, match=r"t.csv: cannot be read after line 3: unexpected end of data"):
        build(tmp_path / "t.csv", to=tmp_path / "out")
    (tmp_path / "u.csv").write_text("caption,image\nfine,\none,,more\n")
    assert build(tmp_path / "u.csv", to=tmp_path / "out", max_problem_ratio=0.5).samples == 1
    assert problems(tmp_path / "out")[0]["reason"] == "has 3 cells, the header has 2"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pip install 'mmfuse\[parquet\]'"):
        build(tmp_path / "t.parquet", to=tmp_path / "out")


def is_running(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
