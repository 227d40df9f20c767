"""What other tools wrote becomes trainable: as it is where it can, rewritten where it must, and every change told."""

import bz2
import gzip
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset
from helpers import write_tar, write_yaml
from unit.shards.converted_sets import convert, count_readable, read_members

from mmfuse.data.recipe import load_recipe
from mmfuse.data.shard_index import ShardIndex
from mmfuse.errors import ConfigError, ShardError
from mmfuse.shards.convert import detect_layout

PAIR = [("1.jpg", b"j1"), ("1.txt", b"t1"), ("2.jpg", b"j2"), ("2.txt", b"t2")]


def write_img2dataset(folder: Path, *, successes: Sequence[int] = (2, 2)) -> Path:
    """Two shards of two samples as img2dataset lays them out, with the counts that their statistics claim."""
    for number, claimed in enumerate(successes):
        name = f"{number:05d}"
        members = [(f"{name}000{i}.{e}", b"x") for i in range(2) for e in ("jpg", "txt", "json")]
        write_tar(folder / f"{name}.tar", members)
        (folder / f"{name}.parquet").write_bytes(b"")
        (folder / f"{name}_stats.json").write_text(json.dumps({"count": 3, "successes": claimed, "duration": 1.5}))
    return folder


def test_what_img2dataset_wrote_needs_nothing_but_a_recipe(tmp_path: Path) -> None:
    source = write_img2dataset(tmp_path / "in")
    before = {path.name for path in source.iterdir()}
    last = convert(source, source)
    assert detect_layout(source) == "img2dataset"
    assert last.notes == ("nothing must be changed: the tars are read as they are",)
    assert (last.samples, last.shards, last.problems) == (4, 2, 0)
    new = {"set.yaml", "manifest.mmindex.json", "00000.tar.mmindex", "00001.tar.mmindex"}
    assert {path.name for path in source.iterdir() if not path.name.startswith(".")} == before | new
    assert load_recipe(str(last.recipe))[0].splits["train"].shards == (".",)
    assert count_readable(last.recipe) == 4
    assert count_readable(convert(source, tmp_path / "elsewhere").recipe) == 4


def test_a_shard_of_which_img2dataset_wrote_another_number_of_samples_is_named(tmp_path: Path) -> None:
    source = write_img2dataset(tmp_path / "in", successes=(2, 3))
    write_tar(source / "00002.tar", PAIR)
    (source / "00003_stats.json").write_text('{"successes": 1}')
    _, changed, unfinished, lost = (last := convert(source, source)).notes
    assert changed.startswith(f"{source}/00001.tar: has 2 samples, 00001_stats.json says 3")
    assert unfinished.startswith(f"{source}/00002.tar: has no 00002_stats.json")
    assert lost.startswith(f"{source}/00003.tar: is not there")
    assert last.problems == 3


def test_a_recipe_that_says_otherwise_is_not_overwritten(tmp_path: Path) -> None:
    source = write_img2dataset(tmp_path / "in")
    write_yaml(source / "set.yaml", {"name": "mine", "splits": {"train": {"shards": ["00000.tar"]}}})
    with pytest.raises(ConfigError, match=r"set.yaml: is there and names other shards or counts"):
        convert(source, source)


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("jobs", [1, 2])
def test_tars_that_cannot_be_read_in_place_are_rewritten_and_each_change_is_told(tmp_path: Path, jobs: int) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    write_tar(source / "clean.tar", PAIR)
    write_tar(source / "scattered.tar", [PAIR[0], PAIR[2], PAIR[1], PAIR[3]])
    write_tar(source / "pickles.tar", [*PAIR, ("2.pkl", bomb), ("3.pyd", bomb), ("notes", b"n")])
    write_tar(source / "twice.tar", [*PAIR, ("2.txt", b"again")])
    plain = write_tar(tmp_path / "plain.tar", PAIR).read_bytes()
    (source / "zipped.tar.gz").write_bytes(gzip.compress(plain))
    (source / "zipped2.tar").write_bytes(bz2.compress(plain))
    last = convert(source, out, jobs=jobs)
    names = ("clean", "scattered", "pickles", "twice", "zipped", "zipped2")
    assert {shard.stem: read_members(shard) for shard in out.glob("*.tar")} == dict.fromkeys(names, PAIR)
    assert all(len(ShardIndex(out / f"{name}.tar.mmindex")) == 2 for name in names)
    samples = list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["1", "2"] * 6
    assert set(last.notes) == {
        "scattered.tar: members moved to their sample: 2",
        "pickles.tar: members dropped that have no KEY.EXTENSION: 1, pickles dropped: 2",
        "twice.tar: members dropped that the sample has already: 1",
        "zipped.tar: unpacked: 1",
        "zipped2.tar: unpacked: 1",
    }
    assert (last.samples, count_readable(last.recipe)) == (12, 12)
    assert not (tmp_path / "exploded").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert convert(source, out, jobs=jobs) == last
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before


def test_clean_tars_stay_where_they_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/a.tar", [("./x/1.jpg", b"j"), ("./x/1.txt", b"t"), ("README", b"r")])
    write_tar(tmp_path / "in/b.tar", [("2.seg.png", b"p"), ("2.jpg", b"j")])
    last = convert(tmp_path / "in", tmp_path / "out")
    assert last.notes == ("nothing must be changed: the tars are read as they are",)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"set.yaml"}
    assert count_readable(last.recipe) == 2


def test_keys_with_dots_are_rewritten_on_demand_and_never_merged(tmp_path: Path) -> None:
    members = [("v.1/a.b.JPG", b"j1"), ("v.1/a.b.txt", b"t1"), ("v.1/a.c.jpg", b"j2")]
    write_tar(tmp_path / "in/a.tar", members)
    last = convert(tmp_path / "in", tmp_path / "out", dotted_keys=True)
    clean = [("v.1/a_b.jpg", b"j1"), ("v.1/a_b.txt", b"t1"), ("v.1/a_c.jpg", b"j2")]
    assert read_members(tmp_path / "out/a.tar") == clean
    assert last.notes == ("a.tar: keys renamed: 2",)
    write_tar(tmp_path / "two/a.tar", [("a.b.jpg", b"1"), ("a_b.txt", b"2")])
    with pytest.raises(ShardError, match=r"'a.b' and 'a_b' would both become the key 'a_b'"):
        convert(tmp_path / "two", tmp_path / "out2", dotted_keys=True)
    write_tar(tmp_path / "many/a.tar", [(f"frame.{n}.{e}", b"x") for n in range(1200) for e in ("jpg", "txt")])
    with pytest.raises(ShardError, match=r"has 2,400 different extensions, such as 0.jpg, .*: keys hold dots"):
        convert(tmp_path / "many", tmp_path / "out3")
    assert convert(tmp_path / "many", tmp_path / "out3", dotted_keys=True).samples == 1200


def test_damaged_tars_are_all_named_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_tar(source / "a.tar", [PAIR[0], PAIR[2], PAIR[1]])
    for name in ("b.tar", "c.tar"):
        data = write_tar(source / name, PAIR).read_bytes()
        (source / name).write_bytes(data[:1500])
    (source / "d.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(ShardError, match="3 of 4 tars cannot be used") as error:
        convert(source, tmp_path / "out")
    assert all(f"{source}/{name}: " in str(error.value) for name in ("b.tar", "c.tar", "d.tar.zst"))
    assert not (tmp_path / "out").exists()


def test_a_cut_archive_stops_and_once_it_is_replaced_the_rest_is_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_tar(source / "a.tar", [PAIR[0], PAIR[2], PAIR[1]])
    packed = gzip.compress(write_tar(tmp_path / "plain.tar", PAIR).read_bytes())
    (source / "b.tgz").write_bytes(packed[:-20])
    with pytest.raises(ShardError, match=r"b.tgz: cannot be unpacked"):
        convert(source, out)
    assert {path.name for path in out.glob("*.tar")} == {"a.tar"} and not (out / "set.yaml").exists()
    kept = (out / "a.tar").stat().st_ino
    (source / "b.tgz").write_bytes(packed)
    last = convert(source, out)
    assert read_members(out / "b.tar") == PAIR and (out / "a.tar").stat().st_ino == kept
    write_tar(source / "a.tar", [PAIR[2], PAIR[0], PAIR[3]])
    assert convert(source, out).samples == last.samples == 4
    assert read_members(out / "a.tar") == [PAIR[2], PAIR[3], PAIR[0]]


def test_names_that_lead_out_of_the_tar_do_not_get_into_the_new_one(tmp_path: Path) -> None:
    members = [("/abs/1.jpg", b"a"), ("../2.jpg", b"b"), ("3.jpg", b"c"), ("4.jpg", b"d"), ("3.txt", b"e")]
    write_tar(tmp_path / "in/a.tar", members)
    last = convert(tmp_path / "in", tmp_path / "out")
    assert [name for name, _ in read_members(tmp_path / "out/a.tar")] == ["abs/1.jpg", "3.jpg", "3.txt", "4.jpg"]
    assert "members dropped whose names cannot be keys: 1" in last.notes[0]


def test_folders_of_files_are_built_as_they_seem_to_be_meant(tmp_path: Path) -> None:
    for name, data in {"images/1.jpg": b"j", "captions/1.txt": b"t", "cats/1.jpg": b"c", "dogs/1.jpg": b"d"}.items():
        group = "parallel" if name.startswith(("im", "cap")) else "classes"
        (tmp_path / group / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / group / name).write_bytes(data)
    last = convert(tmp_path / "parallel", tmp_path / "out1")
    assert "parallel folders" in last.notes[0]
    assert read_members(tmp_path / "out1/set-000000.tar") == [("1.jpg", b"j"), ("1.txt", b"t")]
    last = convert(tmp_path / "classes", tmp_path / "out2")
    assert "folders of classes" in last.notes[0]
    assert sorted(read_members(tmp_path / "out2/set-000000.tar")) == [
        ("cats/1.jpg", b"c"),
        ("cats/1.txt", b"cats\n"),
        ("dogs/1.jpg", b"d"),
        ("dogs/1.txt", b"dogs\n"),
    ]


def test_a_large_member_is_copied_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    write_tar(tmp_path / "in/a.tar", [("1.wav", data), ("2.wav", b"w"), ("1.txt", b"t")])
    convert(tmp_path / "in", tmp_path / "out")
    assert dict(read_members(tmp_path / "out/a.tar"))["1.wav"] == data
