"""The recipe that a tool writes, so that its shards can be trained on at once."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from mmfuse.data.recipe import MemberRule, Recipe, Split, load_recipe
from mmfuse.errors import ConfigError, DataError
from mmfuse.files import write_text
from mmfuse.shards.modality_rules import default_rules
from mmfuse.shards.tables import Extensions


def known_extensions() -> Extensions:
    """By modality, the extensions that its file reads."""
    return {modality: tuple(rule.extensions) for modality, rule in default_rules().items()}


def member_rules(found: Iterable[str], *, known: Extensions, caption_lines: bool) -> dict[str, MemberRule]:
    """The rules of the modalities that have members with these extensions."""
    present = set(found)
    rules = {}
    for modality, extensions in known.items():
        if chosen := tuple(extension for extension in extensions if extension in present):
            captions = "lines" if caption_lines and modality == "text" else "whole"
            rules[modality] = MemberRule(extensions=chosen, captions=captions)
    return rules


def make_split(shards: Iterable[str | Path], *, samples: int, recipe: Path) -> Split:
    """A split of these shards or patterns, relative to the recipe where they lie below it.

    Raises:
        DataError: it has no samples.
    """
    if not samples:
        raise DataError(f"{recipe}: there would be no sample in it")
    folder = os.path.abspath(recipe.parent)
    places = [os.path.abspath(shard) for shard in shards]
    inside = [os.path.relpath(place, folder) if f"{place}/".startswith(f"{folder}/") else place for place in places]
    return Split(shards=tuple(inside), samples=samples)


def write_recipe(recipe: Recipe, path: Path, *, replace: bool) -> None:
    """Writes the recipe with what differs from the defaults; one with the same splits stays, for it may be edited.

    Raises:
        ConfigError: a recipe is there that has other splits, and `replace` is false.
    """
    if path.exists():
        if load_recipe(str(path))[0].splits == recipe.splits:
            return
        if not replace:
            raise ConfigError(f"{path}: is there and names other shards or counts; choose another name, or remove it")
    values: Mapping[str, object] = recipe.model_dump(mode="json", exclude_defaults=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))
    assert load_recipe(str(path))[0] == recipe
