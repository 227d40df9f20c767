"""A source: its checks when it opens, and what it reads."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers import picture_bytes, write_data_set, write_tar, write_yaml

from mmfuse.data import source as source_module
from mmfuse.data.checks import index_shards
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.recipe import find_shards
from mmfuse.data.source import Source
from mmfuse.errors import ConfigError, DataError, ShardError

MEMBERS = {
    "train-0.tar": {"a_1.jpg": b"a1", "a_1.txt": b"one\ntwo", "b_1.txt": b"b1", "b_1.json": b"{}"},
    "train-1.tar": {"a_2.png": b"a2 png", "a_2.jpg": b"a2 jpg", "c_1.json": b"{}"},
}


def make_source(
    folder: Path, *, modalities: tuple[str, ...] = ("image", "text"), split: str = "train", **changes: Any
) -> Source:
    shards = [write_tar(folder / name, members) for name, members in MEMBERS.items()]
    list(index_shards(shards))
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
    assert source.read(2).key == f"{tmp_path}/train-1.tar/a_2"
    assert source.count_by_modalities() == {("image", "text"): 1, ("text",): 1, ("image",): 1, (): 1}


def test_a_folder_as_img2dataset_leaves_it_needs_no_member_rules(tmp_path: Path) -> None:
    pair = {"jpg": picture_bytes(1), "json": b"{}", "txt": b"a caption"}
    write_tar(
        tmp_path / "00000.tar", {f"00000000{n}.{extension}": data for n in (1, 0) for extension, data in pair.items()}
    )
    write_tar(tmp_path / "00001.tar", {})  # every download failed
    for other in ("00000.parquet", "00000_stats.json"):
        (tmp_path / other).write_bytes(b"x")
    list(index_shards(find_shards((str(tmp_path),))))
    recipe = write_yaml(tmp_path / "mine.yaml", {"name": "mine", "splits": {"train": {"shards": [str(tmp_path)]}}})
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("text", "image", "audio"))
    assert [source.read(n).key.rpartition("/")[2] for n in range(len(source))] == ["000000001", "000000000"]
    assert source.read(0).members == {"image": ("jpg", pair["jpg"]), "text": ("txt", b"a caption")}


def test_samples_of_one_pattern_are_one_group_across_shards(tmp_path: Path) -> None:
    groups = [make_source(tmp_path).read(number).group_id for number in range(4)]
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3


def test_without_a_pattern_every_sample_is_its_own_group(tmp_path: Path) -> None:
    source = make_source(tmp_path, group_pattern=None)
    assert len({source.read(number).group_id for number in range(4)}) == 4


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
            r"no sample has a member that recipe 'made' reads \(image: webp\); .*train-0.tar has .jpg .txt",
        ),
    ],
    ids=["split", "modality", "count", "extension"],
)
def test_a_recipe_that_does_not_fit_its_shards_is_refused(tmp_path: Path, changes, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make_source(tmp_path, **changes)


def test_a_shard_without_an_index_is_told_with_the_command(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"], index=False)
    with pytest.raises(DataError, match=r"train-0.tar has no index; run: mmfuse shards index"):
        open_source(SourceConfig(recipe=str(recipe)), modalities=("text",))


def test_a_shard_that_changed_size_since_it_was_indexed_is_refused(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"])
    with open(tmp_path / "set/train-1.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match=r"train-1.tar: has 10752 bytes, but 10240 .*shards index --force"):
        open_source(SourceConfig(recipe=str(recipe)), modalities=("text",))


def test_a_shard_that_shrinks_or_goes_while_it_is_read_stops_with_its_name(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    os.truncate(tmp_path / "train-0.tar", 600)
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(ShardError, match=r"train-0.tar: ends before byte"):
        source.read(0)
    with pytest.raises(DataError, match=r"train-1.tar: cannot be read any more: No such file"):
        source.read(2)


def test_more_shards_than_open_files_are_read_right(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(source_module, "_MAX_OPEN_SHARDS", 2)
    recipe = write_data_set(tmp_path / "set", shard_sizes=(1,) * 5, modalities=["image"])
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=("image",))
    before = len(os.listdir("/dev/fd"))
    for number in (0, 1, 2, 0, 3, 4, 1, 0):
        assert source.read(number).members["image"][1] == picture_bytes(number)
    assert len(os.listdir("/dev/fd")) <= before + 2


def test_a_source_sent_to_another_process_opens_its_own_files(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    expected = source.read(0)
    sent = pickle.loads(pickle.dumps(source))  # noqa: S301  # our own bytes
    assert sent.read(0) == expected
    assert set(sent._files.values()).isdisjoint(source._files.values())


def test_the_index_hash_is_of_all_shards(tmp_path: Path) -> None:
    before = make_source(tmp_path).index_hash
    assert make_source(tmp_path).index_hash == before
    write_tar(tmp_path / "train-2.tar", {"d_1.jpg": b"x"})
    list(index_shards([tmp_path / "train-2.tar"]))
    assert make_source(tmp_path).index_hash != before
