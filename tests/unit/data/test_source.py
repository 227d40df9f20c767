"""A source: its checks when it opens, and what it reads."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers import index_folder, picture_bytes, write_data_set, write_tar, write_yaml

from mmfuse.data import shard_files
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.source import Source
from mmfuse.errors import ConfigError, DataError, ShardError

MEMBERS = {
    "train-0.tar": {"a_1.jpg": b"a1", "a_1.txt": b"one\ntwo", "b_1.txt": b"b1", "b_1.json": b"{}"},
    "train-1.tar": {"a_2.png": b"a2 png", "a_2.jpg": b"a2 jpg", "c_1.json": b"{}"},
}


def make_source(
    folder: Path, *, modalities: tuple[str, ...] = ("image", "text"), split: str = "train", **changes: Any
) -> Source:
    for name, members in MEMBERS.items():
        write_tar(folder / name, members)
    index_folder(folder)
    recipe = {
        "name": "made",
        "members": {"image": {"extensions": ["jpg", "png"]}, "text": {"extensions": ["txt"]}},
        "group_pattern": "^([a-z])_",
        "splits": {"train": {"shards": ["train-*.tar"]}},
    }
    config = SourceConfig(recipe=str(write_yaml(folder / "made.yaml", recipe | changes)), split=split)
    return open_source(config, modalities=modalities)


def test_samples_hold_the_preferred_member_of_each_modality_that_they_have(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    assert [source.read(number).members for number in range(len(source))] == [
        {"image": ("jpg", b"a1"), "text": ("txt", b"one\ntwo")},
        {"text": ("txt", b"b1")},
        {"image": ("jpg", b"a2 jpg")},
        {},
    ]
    assert source.read(2)[:2] == (f"{tmp_path}/train-1.tar", "a_2")
    assert source.count_by_modalities() == {("image", "text"): 1, ("text",): 1, ("image",): 1, (): 1}


def test_a_folder_as_img2dataset_leaves_it_needs_no_member_rules(tmp_path: Path) -> None:
    pair = {"jpg": picture_bytes(1), "json": b"{}", "txt": b"a caption"}
    write_tar(
        tmp_path / "00000.tar", {f"00000000{n}.{extension}": data for n in (1, 0) for extension, data in pair.items()}
    )
    write_tar(tmp_path / "00001.tar", {})  # every download failed
    for other in ("00000.parquet", "00000_stats.json"):
        (tmp_path / other).write_bytes(b"x")
    index_folder(tmp_path)
    recipe = write_yaml(tmp_path / "mine.yaml", {"name": "mine", "splits": {"train": {"shards": [str(tmp_path)]}}})
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("text", "image", "audio"))
    assert [source.read(n).key for n in range(len(source))] == ["000000001", "000000000"]
    assert source.read(0).members == {"image": ("jpg", pair["jpg"]), "text": ("txt", b"a caption")}


def test_samples_of_one_pattern_are_one_group_across_shards(tmp_path: Path) -> None:
    groups = [make_source(tmp_path).read(number).group for number in range(4)]
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3


def test_without_a_pattern_a_sample_names_no_group(tmp_path: Path) -> None:
    assert make_source(tmp_path, group_pattern=None).read(0).group is None


def test_a_key_without_the_group_pattern_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path, group_pattern="^([0-9]+)_")
    with pytest.raises(DataError, match=r"train-0.tar: group_pattern .* is not in key 'a_1'"):
        source.read(0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"split": "test"}, ConfigError, "no split 'test'; it has train"),
        ({"modalities": ("audio",)}, ConfigError, "'made' has none of the run's modalities audio"),
        (
            {"splits": {"train": {"shards": ["train-*.tar"], "samples": 5}}},
            DataError,
            "says 5 samples, its shards hold 4",
        ),
        (
            {"members": {"image": {"extensions": ["webp"]}}},
            DataError,
            r"no sample has a member that its recipe reads \(image: webp\); .*train-0.tar has .jpg .txt",
        ),
    ],
    ids=["split", "modality", "count", "extension"],
)
def test_a_recipe_that_does_not_fit_its_shards_is_refused(tmp_path: Path, changes, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make_source(tmp_path, **changes)


def test_a_shard_without_an_index_is_told_with_the_command(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"], index=False)
    with pytest.raises(DataError, match=r"train-0.tar and 1 more: not indexed; run: mmfuse shards index .*recipe.yaml"):
        open_source(SourceConfig(recipe=str(recipe)), modalities=("text",))


def test_a_shard_that_changed_since_it_was_indexed_is_refused_by_name(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"])
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("text",))
    source.check_shards()
    same_size = (tmp_path / "set/train-1.tar").read_bytes().replace(b"thing 6", b"thing X")
    (tmp_path / "set/train-1.tar").write_bytes(same_size)
    with pytest.raises(ShardError, match=r"train-1.tar: has been written to .* run: mmfuse shards index .*/set$"):
        source.check_shards()
    with pytest.raises(ShardError, match=r"train-1.tar: has been written to"):
        source.read(6)
    with open(tmp_path / "set/train-1.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match=r"train-1.tar: has 10752 bytes, but 10240 when it was indexed"):
        source.read(6)


def test_a_shard_that_shrinks_or_goes_while_it_is_read_stops_with_its_name(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    source.read(0)
    os.truncate(tmp_path / "train-0.tar", 600)
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(ShardError, match=r"train-0.tar: ends before byte"):
        source.read(0)
    with pytest.raises(DataError, match=r"train-1.tar: cannot be read any more: No such file"):
        source.read(2)


def test_more_shards_than_open_files_are_read_right(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shard_files, "_max_open", lambda: 2)
    recipe = write_data_set(tmp_path / "set", shard_sizes=(1,) * 5, modalities=["image"])
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("image",))
    for number in (0, 1, 2, 0, 3, 4, 1, 0):
        assert source.read(number).members["image"][1] == picture_bytes(number)
    places = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert len([place for place in places if place.startswith(str(tmp_path)) and place.endswith(".tar")]) == 2


def test_a_source_sent_to_another_process_opens_its_own_files(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    expected = source.read(0)
    sent = pickle.loads(pickle.dumps(source))  # noqa: S301  # our own bytes
    assert sent.read(0) == expected
    assert set(sent.files._files.values()).isdisjoint(source.files._files.values())


def test_the_index_hash_is_of_all_shards(tmp_path: Path) -> None:
    before = make_source(tmp_path).index_hash
    assert make_source(tmp_path).index_hash == before
    write_tar(tmp_path / "train-2.tar", {"d_1.jpg": b"x"})
    index_folder(tmp_path)
    assert make_source(tmp_path).index_hash != before


def test_weighted_extensions_are_drawn_among_those_that_a_sample_has(tmp_path: Path) -> None:
    members = {"1.txt": b"short", "1.long.txt": b"long", "1.other.txt": b"unread", "2.long.txt": b"only"}
    write_tar(tmp_path / "train-0.tar", members)
    index_folder(tmp_path)
    rule = {"text": {"extensions": {"missing.txt": 9, "txt": 1, "long.txt": 3}}}
    recipe = {"name": "made", "members": rule, "splits": {"train": {"shards": ["train-0.tar"]}}}
    source = open_source(SourceConfig(recipe=str(write_yaml(tmp_path / "r.yaml", recipe))), modalities=("text",))
    drawn = [source.read(0, seed=seed).members["text"] for seed in range(1000)]
    assert set(drawn) == {("txt", b"short"), ("long.txt", b"long")}
    assert drawn.count(("long.txt", b"long")) == pytest.approx(750, abs=50)
    assert source.read(0).members["text"] == ("txt", b"short")
    assert source.read(1, seed=5).members["text"] == ("long.txt", b"only")


def test_members_near_each_other_and_far_apart_have_their_own_bytes(tmp_path: Path) -> None:
    far = {"1.jpg": b"a" * 100, "1.json": bytes(100_000), "1.txt": b"b" * 7, "2.txt": b"", "2.jpg": b"c" * 9}
    write_tar(tmp_path / "train-0.tar", far)
    index_folder(tmp_path)
    recipe = {"name": "made", "splits": {"train": {"shards": ["train-0.tar"]}}}
    place = write_yaml(tmp_path / "r.yaml", recipe)
    source = open_source(SourceConfig(recipe=str(place)), modalities=("text", "image"))
    assert [source.read(n).members for n in (0, 1)] == [
        {"image": ("jpg", far["1.jpg"]), "text": ("txt", far["1.txt"])},
        {"image": ("jpg", far["2.jpg"]), "text": ("txt", b"")},
    ]
