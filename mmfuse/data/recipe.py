"""A recipe: the YAML that describes one dataset, so that a run can name it."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, PositiveFloat, field_validator, model_validator

from mmfuse.config import Settings, load_yaml, suggest, validate
from mmfuse.data.manifest import index_name
from mmfuse.data.remote.urls import find_shards, is_remote, show_url
from mmfuse.errors import ConfigError, DataError

REPOSITORY_RECIPES = Path(__file__).parents[2] / "data_shards" / "recipes"


def _compilable(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


class JsonCaptions(Settings):
    """Captions inside a JSON member."""

    keys: dict[str, PositiveFloat] = Field(min_length=1)
    """Fields by their weights, `a.b` for a field within a field; each holds a caption or a list of them. Training draws
    among the fields that a sample has, then from the list; evaluation takes the first of both."""

    @model_validator(mode="before")
    @classmethod
    def _equal_weights(cls, value: Any) -> Any:
        """A plain list of fields has equal weights."""
        if isinstance(value, dict) and isinstance(value.get("keys"), list):
            return {**value, "keys": dict.fromkeys(value["keys"], 1.0)}
        return value


class MemberRule(Settings):
    """Which members of a sample hold one modality, and how they are read."""

    extensions: tuple[str, ...] | dict[str, PositiveFloat] = Field(min_length=1)
    """Without the leading dot. A list: the first that a sample has. With weights: training draws among those that it
    has, evaluation takes the first."""
    captions: Literal["whole", "lines", "sentences"] | JsonCaptions = "whole"
    """Text only. `lines`: one caption a line; training draws one, evaluation takes the first. `sentences`: one sentence
    a line, and the text is two that follow each other, or the only one; drawn likewise."""


class Split(Settings):
    """A named part of the dataset."""

    shards: tuple[str, ...] | dict[str, tuple[str, ...]] = Field(min_length=1)
    """Tar files, folders, glob and brace patterns, relative to the recipe's folder, or URLs. By modality where each has
    tars of its own: the n-th tars of all belong together, and their samples are joined by key."""

    @field_validator("shards", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        """A single pattern needs no list. (Nor must it come back in an error: URLs may hold secrets.)"""
        if isinstance(value, dict):
            return {name: cls._one_pattern(patterns) for name, patterns in value.items()}
        return (value,) if isinstance(value, str) else value

    samples: int | None = Field(default=None, ge=1)
    """How many samples the index must find; a difference stops the run."""


class Recipe(Settings):
    """One dataset."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    description: str = ""
    licence: str = ""
    attribution: str | None = None
    """File with the credits that the licence asks for, relative to the recipe."""
    members: dict[str, MemberRule] | None = None
    """By modality; null: by the extensions that each modality's file names, as img2dataset and CLAP-style tars have."""
    group_pattern: Annotated[str, AfterValidator(_compilable)] | None = None
    """What this finds in the key names the sample's group; samples of one group are never each other's negatives."""
    index: str | None = None
    """Folder of the indexes, relative to the recipe; null: beside local tars, `RECIPE.index` for remote ones."""
    splits: dict[str, Split] = Field(min_length=1)


def find_recipe(name: str) -> Path:
    """The recipe file: a path as it is, or a name looked up in `data_shards/recipes` here or in the repository."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    folders = [Path("data_shards/recipes"), REPOSITORY_RECIPES]
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(f"no recipe {suggest(name, known)} (a path must end in .yaml)")


def load_recipe(name: str) -> tuple[Recipe, Path]:
    """The recipe of that name or path, and its file, which its patterns are relative to."""
    path = find_recipe(name)
    return validate(Recipe, load_yaml(path), source=str(path)), path


class Shard(NamedTuple):
    """One shard: a tar, or several whose samples are joined by key, and the folder of its index."""

    parts: tuple[str, ...]
    """Paths or URLs."""
    index_folder: Path
    name: str
    """In the manifest of that folder."""

    @property
    def shown(self) -> str:
        """For people: without secrets."""
        return " + ".join(map(show_url, self.parts))

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched before it is read."""
        return any(map(is_remote, self.parts))


def find_split(recipe: Recipe, split: str, *, place: Path) -> list[Shard]:
    """The shards of a split, in the order that numbers its samples.

    Args:
        place: the recipe's file.
    Raises:
        ConfigError: the recipe has no such split, or a pattern is refused.
        DataError: a pattern matches nothing, or modalities have different numbers of tars.
    """
    if split not in recipe.splits:
        raise ConfigError(f"recipe {recipe.name!r} has no split {split!r}; it has {', '.join(recipe.splits)}")
    shards = recipe.splits[split].shards
    if not isinstance(shards, dict):
        joined = [(url,) for url in find_shards(shards, folder=place.parent)]
    else:
        columns = {name: find_shards(patterns, folder=place.parent) for name, patterns in shards.items()}
        lengths = {name: len(urls) for name, urls in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} {n}" for name, n in lengths.items())
            raise DataError(
                f"{place}: split {split!r} has different numbers of tars: {counts}; they are joined in order"
            )
        joined = list(zip(*columns.values(), strict=True))
    elsewhere = place.parent / recipe.index if recipe.index else None
    return [_place_shard(parts, elsewhere, default=place.with_suffix(".index")) for parts in joined]


def place_shards(urls: Iterable[str], *, index_folder: Path | None) -> list[Shard]:
    """Plain shards that no recipe names; without a folder their indexes lie beside them.

    Raises:
        ConfigError: a remote shard without a folder for its index.
    """
    urls = list(urls)
    _check_index_folder(urls, index_folder)
    return [_place_shard((url,), index_folder, default=Path()) for url in urls]


class ChosenSplit(NamedTuple):
    """What a command works on."""

    recipe: Recipe
    split: str
    place: Path
    """The recipe's file, or the first of the paths where there is none."""


def choose_split(paths: Sequence[str], *, split: str | None, index_folder: Path | None) -> ChosenSplit:
    """The split that a user names.

    Args:
        paths: one recipe; or tars, folders, patterns and URLs, which then are the split `all` of a recipe made here.
    Raises:
        ConfigError: recipes among other paths, a split that is not there or not named, or no place for an index.
    """
    if recipes := [path for path in paths if path.endswith((".yaml", ".yml"))]:
        if len(paths) > 1 or index_folder:
            raise ConfigError(f"{recipes[0]}: a recipe goes alone, and names the folder of its indexes itself")
        recipe, place = load_recipe(recipes[0])
    else:
        _check_index_folder(paths, index_folder)
        shards = tuple(path if is_remote(path) else os.path.abspath(path) for path in paths)
        index = os.path.abspath(index_folder) if index_folder else None
        recipe, place = Recipe(name="shards", index=index, splits={"all": Split(shards=shards)}), Path(paths[0])
    if split is None and len(recipe.splits) > 1:
        raise ConfigError(f"{place}: has several splits; name one with --split: {', '.join(recipe.splits)}")
    return ChosenSplit(recipe, split or next(iter(recipe.splits)), place)


def _check_index_folder(urls: Sequence[str], index_folder: Path | None) -> None:
    if index_folder is None and (remote := [url for url in urls if is_remote(url)]):
        raise ConfigError(
            f"{show_url(remote[0])}: is remote; name a folder for its index with --index-dir, or give a recipe"
        )


def _place_shard(parts: tuple[str, ...], folder: Path | None, *, default: Path) -> Shard:
    if folder is None and not any(map(is_remote, parts)):
        return Shard(parts, Path(parts[0]).parent, index_name(parts, beside=True))
    return Shard(parts, folder or default, index_name(parts, beside=False))
