"""Settings: one frozen model beside what it builds; a run is a YAML file of them."""

import difflib
import importlib
import pkgutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mmfuse.errors import ConfigError
from mmfuse.files import write_text


class Settings(BaseModel):
    """Base of every settings class: frozen, documented by docstrings, refuses unknown keys and names the nearest."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_for_unknown(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # Around pydantic's own check, not before it: an unknown key must not hide what else is wrong.
        try:
            return handler(value)
        except ValidationError as error:
            raise ValidationError.from_exception_data(cls.__name__, _details(error, cls.model_fields)) from None


PRESETS = Path(__file__).parent / "runs" / "presets"

S = TypeVar("S", bound=Settings)


def _details(error: ValidationError, known: Iterable[str] = ()) -> list[InitErrorDetails]:
    """The problems of an error, to raise them again; an unknown key of this level comes with the nearest known one."""
    details = []
    for item in error.errors(include_url=False):
        place, message = item["loc"], item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and len(place) == 1:
            details.append(_problem(f"unknown setting {suggest(place[0], known)}"))
        else:
            details.append(_problem(message, kind=item["type"], place=place, value=item["input"]))
    return details


def _problem(
    message: str, *, kind: str = "value_error", place: tuple[int | str, ...] = (), value: Any = None
) -> InitErrorDetails:
    custom = PydanticCustomError(kind, message)  # type: ignore[arg-type]  # typed as literals
    return InitErrorDetails(type=custom, loc=place, input=value)


def suggest(name: object, known: Iterable[str]) -> str:
    """`'nmae'; did you mean 'name'?`, or the list of what is known where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"{name!r}; did you mean {near[0]!r}?" if near else f"{name!r}; known: {', '.join(known) or 'none'}"


def plugin_names(package: str) -> list[str]:
    """The plugins of a folder: every file but the contract, `base.py`."""
    folder = importlib.import_module(package)
    return [module.name for module in pkgutil.iter_modules(folder.__path__) if module.name != "base"]


def find_plugin(package: str, name: str) -> ModuleType:
    """The module `package.name`: a file in that folder is all it takes to add a modality or an objective.

    Raises:
        ConfigError: no such file; the message names the nearest.
    """
    known = plugin_names(package)
    if name not in known:
        raise ConfigError(f"there is no file for {suggest(name, known)}")
    return importlib.import_module(f"{package}.{name}")


PluginSettings = dict[str, SerializeAsAny[Settings]]
"""Settings of plugins by name; validate with `plugin_settings` before."""


def plugin_settings(package: str, value: Any) -> dict[str, Settings]:
    """Turns `{name: raw settings}` into `{name: that plugin's Config}`; a plugin set to null is left out."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected names with their settings, got {value!r}")
    problems: list[InitErrorDetails] = []
    fields: dict[str, Any] = {}
    for name in value:
        try:
            fields[name] = (find_plugin(package, name).Config | None, ...)
        except ConfigError as error:
            problems.append(_problem(str(error)))
    built = None
    try:
        # One throw-away model, so that pydantic reports the problems of all plugins at once, each with its place.
        plugins = create_model("Plugins", __base__=Settings, **fields)
        built = plugins.model_validate({name: value[name] for name in fields})
    except ValidationError as error:
        problems += _details(error)
    if problems:
        raise ValidationError.from_exception_data(package, problems)
    return {name: config for name in fields if (config := getattr(built, name)) is not None}


def _problems(error: ValidationError) -> list[str]:
    """One line for each problem: where, what, and the value that was given."""
    lines = []
    places = [item["loc"] for item in error.errors()]
    for item in error.errors():
        place, message = item["loc"], item["msg"].removeprefix("Value error, ")
        if item["type"] == "too_short" and any(place == other[: len(place)] != other for other in places):
            continue  # pydantic counts the items that are right; what is wrong with the others is said on its own
        where, given = ".".join(map(str, place)), ""
        if item["type"] not in ("value_error", "missing"):
            given = f" = {textwrap.shorten(repr(item['input']), 100)}"
        lines.append(f"{where}{given}: {message}" if where else message)
    return lines


def validate(config_class: type[S], raw: Mapping[str, Any], *, source: str) -> S:
    """The settings in `raw`, or one ConfigError that lists every problem."""
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join([f"{source}: wrong settings", *_problems(error)])) from error


def load_yaml(path: Path, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over what its `extends` names: a file relative to it, or a shipped preset.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or files that extend each other.
    """
    origin = f" (`extends` of {extended_by[-1]})" if extended_by else ""
    if path.resolve() in (child.resolve() for child in extended_by):
        raise ConfigError(f"{path}: extends itself{origin}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: not readable{origin}: {error.strerror}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected settings by name, got {type(raw).__name__}")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}: expected the path of one YAML file, or the name of a preset")
    below = path.parent / parent if parent.endswith((".yaml", ".yml")) else PRESETS / f"{parent}.yaml"
    if below.parent == PRESETS and not below.is_file():
        known = [preset.stem for preset in PRESETS.glob("*.yaml")]
        raise ConfigError(f"{path}: extends: no preset {suggest(parent, known)} (a path must end in .yaml)")
    return overlay(load_yaml(below, extended_by=(*extended_by, path)), raw)


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `over`; mappings are merged, `null` removes, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`raw` with each `a.b=value` laid over it; the value is read as YAML."""
    result = dict(raw)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {override!r}: expected NAME.NAME=VALUE")
        try:
            nested = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not readable as YAML") from error
        for name in reversed(path.split(".")):
            nested = {name: nested}
        result = overlay(result, nested)
    return result


def dump_yaml(settings: Settings, path: Path) -> None:
    """Writes settings so that reading them again gives the same value, and proves it."""
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    assert type(settings).model_validate(yaml.safe_load(text)) == settings, "settings do not survive their own YAML"
    write_text(path, text)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `{"a.b": value}`, for comparing and for trackers."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
