"""Models that settings name: local folders, or ids of a hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import model_validator
from transformers import AutoConfig

from mmfuse.errors import ConfigError
from mmfuse.modalities.base import ModalityConfig

E = TypeVar("E")


class NamedModelConfig(ModalityConfig):
    """Settings of a modality whose encoder may be a model of transformers that has a name."""

    modality: ClassVar[str]
    pretrained: str | None = None
    """Local folder or hub id of an encoder; its preprocessing is taken too, and the sizes below are then its own."""
    architecture: str | None = None
    """The same without its weights."""

    @model_validator(mode="after")
    def _check_named_once(self) -> Self:
        if self.pretrained and self.architecture:
            raise ValueError("pretrained has its own architecture: set one of the two")
        return self

    @property
    def named(self) -> str | None:
        """Where the sizes come from, if not from the settings."""
        return self.pretrained or self.architecture

    @property
    def naming_setting(self) -> str:
        """The setting that `named` is the value of, for messages."""
        return f"{self.modality}.{'pretrained' if self.pretrained else 'architecture'}"


@contextmanager
def named_in(setting: str, value: object) -> Iterator[None]:
    """Inside, what a library says of a model that it does not find or know becomes an error of that setting.

    Raises:
        ConfigError: with the setting and its value.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{setting} = {value}: {said}") from error


def read_structure(setting: str, named: str, *, family: str | None = None) -> Any:
    """A transformers config.

    Raises:
        ConfigError: there is none, or it is of another family than `family`.
    """
    with named_in(setting, named):
        structure = AutoConfig.from_pretrained(named)
    if family is not None and structure.model_type != family:
        raise ConfigError(f"{setting} = {named}: is of the family {structure.model_type}, not {family}")
    return structure


def read_preprocessing(setting: str, named: str, load: Callable[[str], E], default: Callable[[], E]) -> E:
    """What `load` finds; the default only for a local folder that holds weights and structure alone.

    Raises:
        ConfigError: the hub cannot be asked, or has none.
    """
    if Path(named).is_dir() and not (Path(named) / "preprocessor_config.json").is_file():
        return default()
    with named_in(setting, named):
        return load(named)
