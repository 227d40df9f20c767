"""Settings: one frozen model beside what it builds; a run is a YAML file of them."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, create_model, model_validator

from mmfuse.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings class: frozen, unknown keys refused with the nearest known one, documented by docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _suggest_for_unknown(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(f"unknown setting {suggest(key, cls.model_fields)}" for key in unknown))
        return value


S = TypeVar("S", bound=Settings)


def suggest(name: object, known: Iterable[str]) -> str:
    """`'nmae'; did you mean 'name'?`, or the list of what is known where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"{name!r}; did you mean {near[0]!r}?" if near else f"{name!r}; known: {', '.join(known) or 'none'}"


def find_plugin(package: str, name: str) -> ModuleType:
    """The module `package.name`: a file in that folder is all it takes to add a modality or an objective.

    Raises:
        ConfigError: no such file; the message names the nearest.
    """
    folder = importlib.import_module(package)
    known = [module.name for module in pkgutil.iter_modules(folder.__path__) if module.name != "base"]
    if name not in known:
        kind = package.rsplit(".", 1)[-1]
        raise ConfigError(f"there is no {name!r} in {kind}: {suggest(name, known)}")
    return importlib.import_module(f"{package}.{name}")


PluginSettings = dict[str, SerializeAsAny[Settings]]
"""Settings of plugins by name; validate with `plugin_settings` before."""


def plugin_settings(package: str, value: Any) -> dict[str, Settings]:
    """Turns `{name: raw settings}` into `{name: that plugin's Config}`; a plugin set to null is left out."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected names with their settings, got {value!r}")
    wanted = {name: raw for name, raw in value.items() if raw is not None}
    try:
        fields: dict[str, Any] = {name: (find_plugin(package, name).Config, ...) for name in wanted}
    except ConfigError as error:
        raise ValueError(str(error)) from error
    # One throw-away model, so that pydantic reports the problems of all plugins at once, each with its place.
    built = create_model("Plugins", __base__=Settings, **fields).model_validate(wanted)
    return {name: getattr(built, name) for name in wanted}


def _problems(error: ValidationError) -> list[str]:
    """One line for each problem: where, what, and the value that was given."""
    lines = []
    for item in error.errors():
        where, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error":
            lines.append(f"{where}: {message}" if where else message)
        else:
            lines.append(f"{where} = {item['input']!r}: {message}")
    return lines


def validate(config_class: type[S], raw: Mapping[str, Any], *, source: str) -> S:
    """The settings in `raw`, or one ConfigError that lists every problem."""
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join([f"{source}: wrong settings", *_problems(error)])) from error


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the file that its `extends` names (relative to it)."""
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected settings by name, got {type(raw).__name__}")
    parent = raw.pop("extends", None)
    return overlay(load_yaml(path.parent / parent), raw) if parent else raw


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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `{"a.b": value}`, for comparing and for trackers."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
