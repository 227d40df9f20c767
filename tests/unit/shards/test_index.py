"""`mmfuse shards index`: what is indexed, what is kept, what is named."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from helpers import index_folder, write_data_set, write_tar, write_yaml

from mmfuse.cli import main
from mmfuse.data.manifest import MANIFEST, ShardFacts, read_manifest
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.recipe import find_split, load_recipe, place_shards
from mmfuse.data.remote.urls import find_shards
from mmfuse.errors import DataError, ShardError
from mmfuse.shards.index import index_shards
from mmfuse.shards.quarantine import read_bad_keys, skip_samples


def make_shards(folder: Path, count: int = 3) -> list[Path]:
    return [write_tar(folder / f"{i}.tar", {f"{i}{n}.txt": b"x" * n for n in range(1, 4)}) for i in range(count)]


def outcomes(folder: Path, **options) -> dict[str, tuple[bool, type]]:
    """By shard, whether it was indexed now, and what came of it."""
    shards = place_shards(find_shards((str(folder),)), index_folder=None)
    return {r.shard.name: (r.is_new, type(r.outcome)) for r in index_shards(shards, **options)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_damaged_shard_does_not_keep_others_from_being_indexed(tmp_path: Path, jobs: int) -> None:
    make_shards(tmp_path)[1].write_bytes(b"garbage" * 200)
    found = outcomes(tmp_path, jobs=jobs)
    assert found == {"0.tar": (True, ShardFacts), "1.tar": (True, ShardError), "2.tar": (True, ShardFacts)}
    assert read_manifest(tmp_path).keys() == {"0.tar", "2.tar"}


def test_a_shard_that_gets_damaged_loses_its_index_and_its_place_in_the_manifest(tmp_path: Path) -> None:
    shard = make_shards(tmp_path)[1]
    outcomes(tmp_path)
    shard.write_bytes(b"garbage" * 200)
    assert outcomes(tmp_path)["1.tar"] == (True, ShardError)
    assert "1.tar" not in read_manifest(tmp_path) and not Path(f"{shard}.mmindex").exists()


def test_what_did_not_change_is_kept_and_what_did_is_indexed_again(tmp_path: Path) -> None:
    make_shards(tmp_path)
    assert all(is_new for is_new, _ in outcomes(tmp_path).values())
    assert not any(is_new for is_new, _ in outcomes(tmp_path).values())
    write_tar(tmp_path / "1.tar", {f"y{n}.txt": b"x" * n for n in range(1, 4)})  # of the same size
    assert {name for name, (is_new, _) in outcomes(tmp_path).items() if is_new} == {"1.tar"}
    (tmp_path / "2.tar.mmindex").unlink()
    assert {name for name, (is_new, _) in outcomes(tmp_path).items() if is_new} == {"2.tar"}
    assert all(is_new for is_new, _ in outcomes(tmp_path, force=True).values())


def test_what_other_tools_recorded_of_a_shard_is_compared_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path)
    starts = [1024 * n for n in range(4)]  # a header and a block each
    shards[0].with_suffix(".tar.idx").write_bytes(struct.pack("<4Q", *starts))
    shards[1].with_suffix(".tar.idx").write_bytes(struct.pack("<4Q", *(start + 512 for start in starts)))
    for shard, successes in zip(shards, (3, 3, 2), strict=True):
        (tmp_path / f"{shard.stem}_stats.json").write_text(json.dumps({"successes": successes}))
    assert main(["shards", "index", str(tmp_path), "--jobs", "1"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.partition("/")[2].rpartition("/")[2].partition(":")[0] for line in warnings] == ["1.tar", "2.tar"]
    assert "of Energon's list starts at byte 512" in warnings[0] and "2_stats.json says 2" in warnings[1]


def test_an_interrupted_command_keeps_what_was_done(tmp_path: Path) -> None:
    make_shards(tmp_path)
    results = index_shards(place_shards(find_shards((str(tmp_path),)), index_folder=None))
    next(results)
    results.close()
    assert len(read_manifest(tmp_path)) == 1
    assert sorted(is_new for is_new, _ in outcomes(tmp_path).values()) == [False, True, True]


def test_a_folder_that_cannot_be_written_to_is_told_where_else_indexes_may_go(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_shards(tmp_path / "data")
    (tmp_path / "data" / MANIFEST).mkdir()  # root may write anywhere, but not over a folder
    with pytest.raises(DataError):
        index_folder(tmp_path / "data")
    elsewhere = place_shards(find_shards((str(tmp_path / "data"),)), index_folder=tmp_path / "indexes")
    assert all(isinstance(result.outcome, ShardFacts) for result in index_shards(elsewhere))
    assert len(list((tmp_path / "indexes").glob("*.mmindex"))) == 3


def test_shards_of_one_name_in_two_folders_keep_their_own_samples(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "0.tar", {"1.txt": folder.encode()})
    recipe = {"name": "two", "index": "indexes", "splits": {"train": {"shards": ["a/0.tar", "b/0.tar"]}}}
    place = write_yaml(tmp_path / "two.yaml", recipe)
    list(index_shards(find_split(load_recipe(str(place))[0], "train", place=place)))
    source = open_source(SourceConfig(recipe=str(place)), modalities=("text",))
    assert [source.read(n).members["text"][1] for n in range(2)] == [b"a", b"b"]
    assert not list(tmp_path.glob("[ab]/*.mmindex*"))


def test_a_copied_data_set_has_the_same_index_hash(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "one", modalities=["text"])
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copy)  # with new times of change
    os.utime(tmp_path / "two/train-0.tar", (1, 1))
    hashes = []
    for folder in ("one", "two"):
        index_folder(tmp_path / folder)
        source = open_source(SourceConfig(recipe=str(tmp_path / folder / recipe.name)), modalities=("text",))
        hashes.append(source.index_hash)
    assert hashes[0] == hashes[1]


def test_tars_of_one_modality_each_are_joined_by_key(tmp_path: Path) -> None:
    for number in range(2):
        texts = {f"{number}{n}.txt": f"text {number}{n}".encode() for n in (1, 2, 3)}
        pictures = {f"{number}{n}.jpg": f"picture {number}{n}".encode() for n in (3, 1)}
        write_tar(tmp_path / f"txt/{number}.tar", texts)
        write_tar(tmp_path / f"img/{number}.tar", pictures)
    shards = {"text": ["txt/*.tar"], "image": ["img/{0..1}.tar"]}
    place = write_yaml(tmp_path / "r.yaml", {"name": "joined", "splits": {"train": {"shards": shards}}})
    list(index_shards(find_split(load_recipe(str(place))[0], "train", place=place)))
    source = open_source(SourceConfig(recipe=str(place)), modalities=("text", "image"))
    samples = {sample.key: sample.members for sample in map(source.read, range(len(source)))}
    assert samples.keys() == {"01", "02", "03", "11", "12", "13"}
    assert samples["13"] == {"text": ("txt", b"text 13"), "image": ("jpg", b"picture 13")}
    assert samples["02"] == {"text": ("txt", b"text 02")}
    (tmp_path / "img/1.tar").unlink()
    with pytest.raises(DataError, match=r"1.tar: matches no file"):
        open_source(SourceConfig(recipe=str(place)), modalities=("text",))


def test_quarantined_samples_are_not_dealt_any_more_and_come_back_when_forced(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"])
    config = SourceConfig(recipe=str(recipe))
    before = open_source(config, modalities=("text",))
    keys = [before.read(number).key for number in range(len(before))]
    lines = [
        {"step": 3, "shard": str(tmp_path / "set/train-1.tar"), "key": "0006", "lost": True},
        {"step": 4, "shard": str(tmp_path / "set/train-0.tar"), "key": "0001", "lost": False},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/quarantine.rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = find_split(load_recipe(str(recipe))[0], "train", place=recipe)
    (skipped,) = skip_samples(shards, read_bad_keys([tmp_path / "run"], any_member=False))
    assert (Path(skipped.shard.parts[0]).name, skipped.added, skipped.samples) == ("train-1.tar", 1, 2)
    after = open_source(config, modalities=("text",))
    assert [after.read(number).key for number in range(len(after))] == [key for key in keys if key != "0006"]
    assert after.index_hash != before.index_hash
    list(skip_samples(shards, read_bad_keys([tmp_path / "run"], any_member=True)))
    both = open_source(config, modalities=("text",))
    assert [both.read(number).key for number in range(len(both))] == [k for k in keys if k not in ("0001", "0006")]
    list(index_shards(shards, force=True))
    assert open_source(config, modalities=("text",)).index_hash == before.index_hash


def test_bad_samples_of_strangers_are_refused(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"])
    shards = find_split(load_recipe(str(recipe))[0], "train", place=recipe)
    with pytest.raises(DataError, match=r"elsewhere.tar: not among the shards"):
        list(skip_samples(shards, {"elsewhere.tar": {"1"}}))
    with pytest.raises(DataError, match="1 of the bad samples are not in it"):
        list(skip_samples(shards, {shards[0].shown: {"0001", "9"}}))
    with pytest.raises(DataError, match="this run met nothing bad"):
        read_bad_keys([tmp_path], any_member=False)
