"""Settings: what is refused and how it is told, `extends`, overlays, and YAML that gives the same value back."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from helpers import write_yaml
from pydantic import BeforeValidator, PositiveInt

from mmfuse.config import (
    PluginSettings,
    Settings,
    apply_overrides,
    dump_yaml,
    flatten,
    load_yaml,
    overlay,
    plugin_settings,
    validate,
)
from mmfuse.errors import ConfigError


class Inner(Settings):
    """Something nested."""

    num_layers: PositiveInt = 2
    width: PositiveInt = 8


class Outer(Settings):
    """Something with something nested."""

    name: str
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


def problems_of(raw: dict[str, Any], config_class: type[Settings] = Outer) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(config_class, raw, source="here.yaml")
    first, *lines = str(error.value).splitlines()
    assert first == "here.yaml: wrong settings"
    return [line.strip() for line in lines]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer(name="x").name = "y"  # type: ignore[misc]


def test_all_problems_are_told_at_once_each_with_place_value_and_what_is_allowed() -> None:
    raw = {"nmae": "x", "inner": {"num_layer": 3, "width": -1}, "many": [{"width": "wide"}, {"depth": 3}]}
    problems = problems_of(raw)
    assert [p.split(":")[0] for p in problems].count("inner") == 1
    assert set(problems) == {
        "unknown setting 'nmae'; did you mean 'name'?",
        "name: Field required",
        "inner: unknown setting 'num_layer'; did you mean 'num_layers'?",
        "inner.width = -1: Input should be greater than 0",
        "many.0.width = 'wide': Input should be a valid integer, unable to parse string as an integer",
        "many.1: unknown setting 'depth'; did you mean 'width'?",
    }


def test_an_unknown_setting_near_to_none_is_answered_with_all() -> None:
    assert problems_of({"name": "x", "zzz": 1}) == ["unknown setting 'zzz'; known: inner, many, name"]


def test_long_values_are_cut_in_messages() -> None:
    (problem,) = problems_of({"name": "x", "inner": [list(range(1000))]})
    assert problem.startswith("inner = ")
    assert len(problem) < 250


@pytest.mark.parametrize("value", ["text", float("nan"), float("inf"), None, [1]])
def test_a_number_must_be_one(value: object) -> None:
    class Number(Settings):
        """A number."""

        x: float

    assert problems_of({"x": value}, Number)[0].startswith(f"x = {value!r}: Input should be a ")


class Run(Settings):
    """Plugins alone."""

    objectives: Annotated[PluginSettings, BeforeValidator(lambda value: plugin_settings("mmfuse.objectives", value))]


def test_problems_of_all_plugins_are_told_at_once() -> None:
    raw = {"contrasive": {}, "matching": {"weigth": 2, "weight": -1}, "blah": None, "masked_language": 3}
    problems = problems_of({"objectives": raw}, Run)
    assert problems[0] == "objectives: there is no file for 'contrasive'; did you mean 'contrastive'?"
    assert problems[1].startswith("objectives: there is no file for 'blah'; known: contrastive, ")
    assert "objectives.matching: unknown setting 'weigth'; did you mean 'weight'?" in problems
    assert "objectives.matching.weight = -1: Input should be greater than or equal to 0" in problems
    assert any(problem.startswith("objectives.masked_language = 3: ") for problem in problems)
    assert problems_of({"objectives": ["contrastive"]}, Run)[0].startswith("objectives: expected names")


def test_null_drops_a_plugin_and_the_others_keep_their_own_settings() -> None:
    run = validate(Run, {"objectives": {"contrastive": None, "matching": {"temperature": 0.5}}}, source="x")
    assert run.model_dump()["objectives"].keys() == {"matching"}
    assert run.model_dump()["objectives"]["matching"]["temperature"] == 0.5


def test_extends_lays_a_file_over_another_relative_to_itself(tmp_path: Path) -> None:
    write_yaml(tmp_path / "presets/base.yaml", {"inner": {"width": 1, "num_layers": 3}, "many": [{"width": 1}]})
    write_yaml(tmp_path / "presets/middle.yaml", {"extends": "base.yaml", "inner": {"width": 2}})
    top = write_yaml(tmp_path / "top.yaml", {"extends": "presets/middle.yaml", "name": "x", "many": [{"width": 9}]})
    assert load_yaml(top) == {"name": "x", "inner": {"width": 2, "num_layers": 3}, "many": [{"width": 9}]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: other.yaml", ["other.yaml: not readable (`extends` of ", "run.yaml): No such file"]),
        ("extends: run.yaml", ["run.yaml: extends itself"]),
        ("extends: [a.yaml, b.yaml]", ["extends = ['a.yaml', 'b.yaml']: expected the path of one YAML file"]),
        ("- a\n- b", ["run.yaml: expected settings by name, got list"]),
        ("", ["run.yaml: expected settings by name, got NoneType"]),
        ("a: [1,", ["run.yaml: not readable as YAML", "line 1"]),
        ("a: !!python/object/apply:os.getcwd []", ["run.yaml: not readable as YAML"]),
    ],
)
def test_a_file_that_is_no_settings_is_told_with_its_path(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_yaml(tmp_path / "run.yaml")
    assert all(word in str(error.value) for word in words), error.value


def test_files_that_extend_each_other_are_told(tmp_path: Path) -> None:
    write_yaml(tmp_path / "b.yaml", {"extends": "c.yaml"})
    write_yaml(tmp_path / "c.yaml", {"extends": "a.yaml"})
    with pytest.raises(ConfigError, match=r"a.yaml: extends itself \(`extends` of .*c.yaml\)"):
        load_yaml(write_yaml(tmp_path / "a.yaml", {"extends": "b.yaml"}))


def test_overlay_merges_mappings_and_replaces_everything_else() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1, "e": {"f": 1}}
    over = {"a": {"c": [3], "new": 2}, "d": {"x": 1}, "e": None}
    assert overlay(base, over) == {"a": {"b": 1, "c": [3], "new": 2}, "d": {"x": 1}, "e": None}
    assert base["a"] == {"b": 1, "c": [1, 2]}


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    overrides = ["inner.width=3", "inner.width=4", "many=[{width: 1}]", "name=a=b", "new.deep=null"]
    assert apply_overrides({"inner": {"width": 1, "num_layers": 5}}, overrides) == {
        "inner": {"width": 4, "num_layers": 5},
        "many": [{"width": 1}],
        "name": "a=b",
        "new": {"deep": None},
    }


@pytest.mark.parametrize("override", ["inner.width", "=3", "a=[1"])
def test_an_override_that_is_none_is_shown(override: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {override!r}:".replace("[", r"\[")):
        apply_overrides({}, [override])


def test_dumped_settings_load_again_and_leave_no_other_file(tmp_path: Path) -> None:
    settings = Outer(name="x: #y", inner=Inner(width=3), many=(Inner(), Inner(num_layers=7)))
    dump_yaml(settings, tmp_path / "run.yaml")
    assert validate(Outer, load_yaml(tmp_path / "run.yaml"), source="x") == settings
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_flatten_names_every_value_by_its_path() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [1, {"e": 2}],
        "f": None,
    }


def test_extends_takes_the_name_of_a_shipped_preset(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "run.yaml", {"extends": "tiny", "model": {"width": 64}})
    assert load_yaml(path)["model"]["width"] == 64
    assert load_yaml(path)["model"]["modalities"]["text"]["tokenizer"] == "tiny"
    with pytest.raises(ConfigError, match=r"no preset 'tinny'; did you mean 'tiny'\?"):
        load_yaml(write_yaml(tmp_path / "run.yaml", {"extends": "tinny"}))
