"""The errors that a user can cause and mend. Each says what, where, and what to do."""

from collections.abc import Callable
from typing import TypeVar


class MmfuseError(Exception):
    """Base of all errors that end a command with a message instead of a traceback."""

    exit_code = 1
    on_all_ranks = False
    """Whether every rank has the same error, so that one may speak for all."""


E = TypeVar("E", bound=MmfuseError)


def on_all_ranks(error_class: type[E]) -> Callable[[str], E]:
    """Makes an error that every rank raises with the same words."""

    def make(message: str) -> E:
        error = error_class(message)
        error.on_all_ranks = True
        return error

    return make


class ConfigError(MmfuseError):
    """A setting is unknown, out of range, or contradicts another one."""

    exit_code = 2


class DataError(MmfuseError):
    """The data that a run names is missing or does not fit the run."""

    exit_code = 3


class ShardError(DataError):
    """A tar shard is damaged, has changed, or holds what must not be read."""


class SampleError(DataError):
    """One member of one sample cannot be decoded. Masks its modality; many of them stop the run."""

    def __init__(self, message: str, *, kind: str = "not_decodable") -> None:
        """`kind` is what it is counted under; `mmfuse.shards.findings.KINDS` lists them."""
        super().__init__(message)
        self.kind = kind


class CheckpointError(MmfuseError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""

    exit_code = 4


class LaunchError(MmfuseError):
    """The processes that started are not those that were asked for."""

    exit_code = 5


class Stopped(MmfuseError):
    """Training was asked to stop, hung, or rolled back; started again, it goes on. EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class TrainingError(MmfuseError):
    """Training cannot go on: the loss is not finite, or ranks have drifted apart."""

    exit_code = 6
