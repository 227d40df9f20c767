"""A recipe: the YAML that describes one dataset, so that a run can name it."""

import glob
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mmfuse.config import Settings, load_yaml, suggest, validate
from mmfuse.errors import ConfigError, DataError

REPOSITORY_RECIPES = Path(__file__).parents[2] / "data_shards" / "recipes"


def _compilable(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


class MemberRule(Settings):
    """Which members of a sample hold one modality, and how they are read."""

    extensions: tuple[str, ...] = Field(min_length=1)
    """Without the leading dot, the preferred one first."""
    captions: Literal["whole", "lines"] = "whole"
    """Text only. `lines`: one caption a line; training draws one, evaluation takes the first."""


class Split(Settings):
    """A named part of the dataset."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Tar files or glob patterns, relative to the recipe's folder."""
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
    """The recipe of that name or path, and the folder that its shard patterns are relative to."""
    path = find_recipe(name)
    return validate(Recipe, load_yaml(path), source=str(path)), path.parent


def find_shards(patterns: tuple[str, ...], *, folder: Path = Path()) -> list[Path]:
    """Tar files that the patterns name, sorted; a folder stands for all tars in it.

    Raises:
        DataError: a pattern matches nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        place = folder / pattern
        if place.is_dir():
            matches = list(place.glob("*.tar"))
        else:
            matches = [place] if place.is_file() else [folder / m for m in glob.glob(pattern, root_dir=folder)]
        if not matches:
            what = "has no .tar files" if place.is_dir() else "matches no file"
            raise DataError(f"{place}: {what}; check the path, or build the data set first (data_shards/README.md)")
        found.update(matches)
    return sorted(found)
