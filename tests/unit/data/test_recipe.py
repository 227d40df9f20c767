"""Recipes and the shards that their patterns find."""

from pathlib import Path

import pytest
from helpers import write_tar, write_yaml

from mmfuse.data.recipe import find_recipe, find_shards, load_recipe
from mmfuse.errors import ConfigError, DataError


def touch_shards(folder: Path, *names: str) -> list[Path]:
    return [write_tar(folder / name, {"1.txt": b"x"}) for name in names]


def test_patterns_files_and_folders_name_each_shard_once_and_sorted(tmp_path: Path) -> None:
    b, a = touch_shards(tmp_path, "b.tar", "a.tar")
    (tmp_path / "notes.txt").write_text("no shard")
    for patterns in [("*.tar",), ("b.tar", "a.tar"), (".",), ("[ab].tar", "b.tar"), (str(tmp_path),)]:
        assert find_shards(patterns, folder=tmp_path) == [a, b]


def test_folders_whose_names_look_like_patterns_are_found(tmp_path: Path) -> None:
    (shard,) = touch_shards(tmp_path / "set[1]", "x.tar")
    assert find_shards(("*.tar",), folder=tmp_path / "set[1]") == [shard]
    assert find_shards((str(shard),)) == [shard]


@pytest.mark.parametrize(
    ("pattern", "message"), [("c*.tar", "matches no file"), ("no/folder", "matches no file"), ("empty", "no .tar")]
)
def test_a_pattern_that_finds_nothing_is_named(tmp_path: Path, pattern: str, message: str) -> None:
    touch_shards(tmp_path, "a.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as error:
        find_shards(("a.tar", pattern), folder=tmp_path)
    assert str(tmp_path / pattern) in str(error.value)


def test_a_recipe_of_the_working_directory_comes_before_the_repository_s(tmp_path: Path, monkeypatch) -> None:
    assert find_recipe("emoji_sample").is_file()
    write_yaml(tmp_path / "data_shards/recipes/emoji_sample.yaml", {})
    monkeypatch.chdir(tmp_path)
    assert find_recipe("emoji_sample").resolve().is_relative_to(tmp_path)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'emoji_sampel'; did you mean 'emoji_sample'\?"):
        load_recipe("emoji_sampel")


def test_what_is_wrong_in_a_recipe_is_told_at_once_with_its_file(tmp_path: Path) -> None:
    recipe = {"name": "a b", "members": {"text": {"extension": ["txt"]}}, "group_pattern": "(", "splits": {}}
    with pytest.raises(ConfigError) as error:
        load_recipe(str(write_yaml(tmp_path / "r.yaml", recipe)))
    for words in (
        str(tmp_path / "r.yaml"),
        "name = 'a b'",
        "members.text: unknown setting 'extension'; did you mean 'extensions'?",
        "group_pattern: not a regular expression",
        "splits = {}",
    ):
        assert words in str(error.value)
