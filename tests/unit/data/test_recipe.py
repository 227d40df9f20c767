"""Recipes and the shards that their patterns find."""

from pathlib import Path

import pytest
from helpers import write_yaml

from mmfuse.data.recipe import find_recipe, load_recipe
from mmfuse.errors import ConfigError


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
