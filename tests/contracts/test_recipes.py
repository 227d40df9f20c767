"""Every recipe of the repository is whole, and the committed sample is what its recipe says."""

import re
from pathlib import Path

import pytest
from helpers import ALL

from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.recipe import REPOSITORY_RECIPES, load_recipe

RECIPES = sorted(REPOSITORY_RECIPES.glob("*.yaml"))
SPLITS = ("train", "new_drawings", "new_emoji")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_says_what_it_is(path: Path) -> None:
    recipe, folder = load_recipe(str(path))
    assert recipe.name == path.stem
    assert recipe.description and recipe.licence
    assert set(recipe.members) <= set(ALL)
    assert recipe.attribution is None or (folder.parent / recipe.attribution).is_file()
    for split in recipe.splits.values():
        assert split.samples, "counts keep a half-built data set from being trained on"
        assert not any(Path(pattern).is_absolute() for pattern in split.shards)


@pytest.mark.parametrize("split", SPLITS)
def test_the_committed_sample_holds_what_its_recipe_says(emoji_sample: Path, split: str) -> None:
    source = open_source(SourceConfig(recipe=str(emoji_sample), split=split), modalities=ALL)  # checks the count
    complete = source.count_by_modalities()[ALL]
    assert complete == (len(source) if split != "train" else 164)


def test_train_has_all_seven_subsets_as_often_as_its_comment_says(emoji_sample: Path) -> None:
    source = open_source(SourceConfig(recipe=str(emoji_sample)), modalities=ALL)
    comment = emoji_sample.read_text()
    for present, count in source.count_by_modalities().items():
        words = {1: f"{present[0]} only", 3: "are complete"}.get(len(present))
        both = [" \\+ ".join(pair) for pair in (present, present[::-1])]
        assert re.search(rf"\b{count} +({words or '|'.join(both)})\b", comment), (present, count)
    assert len(source.count_by_modalities()) == 7


def test_new_emoji_have_no_concept_of_train_and_new_drawings_have_no_other(emoji_sample: Path) -> None:
    groups = {}
    for split in SPLITS:
        source = open_source(SourceConfig(recipe=str(emoji_sample), split=split), modalities=ALL)
        groups[split] = {source.read(number).group for number in range(len(source))}
    assert groups["new_drawings"] == groups["train"]
    assert not groups["new_emoji"] & groups["train"]
