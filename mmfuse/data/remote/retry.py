"""Trying again: which errors pass by themselves, how long to wait, and when to give up."""

import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import responses
from typing import TypeVar

from mmfuse.errors import DataError

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0
_PASSING_STATUS = (408, 425, 429)
_jitter = random.SystemRandom()
"""Not the seeded generator: all ranks would come back to a struggling server at the same moment."""

T = TypeVar("T")


class RemoteError(Exception):
    """Why a request failed, in words without its URL, which may hold secrets."""

    def __init__(self, reason: str, *, passing: bool, status: int | None = None, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing
        """Whether the same request may succeed later."""
        self.status = status
        self.wait_seconds = wait_seconds
        """What the server asks to wait."""


class Deadline:
    """A moment in the future; it begins to run when it is made."""

    def __init__(self, seconds: float, *, setting: str = "deadline_seconds") -> None:
        """`setting` is what sets it, for messages."""
        self.seconds, self.setting = seconds, setting
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left, never negative."""
        return max(0.0, self._end - time.monotonic())


def status_error(status: int, *, code: str = "", retry_after: str = "") -> RemoteError:
    """The error that an HTTP status stands for.

    Args:
        code: the provider's own word for it, such as `SlowDown`.
        retry_after: the header, in seconds or as a date.
    """
    word = responses.get(status, "") if not code or code.isdecimal() else code
    reason = f"the server answers {status} {word}".rstrip()
    if status in (401, 403):
        reason += "; the credentials, or the signature in the URL, are missing, wrong or expired"
    passing = status >= 500 or status in _PASSING_STATUS
    return RemoteError(reason, passing=passing, status=status, wait_seconds=_seconds_until(retry_after))


def keep_trying(attempt: Callable[[], T], *, what: str, deadline: Deadline) -> T:
    """What `attempt` returns; after a passing error it is called again, after a random pause that grows.

    Args:
        what: begins every message, so without secrets.

    Raises:
        DataError: an error that does not pass, or one that would outlast the deadline.
    """
    attempts = 0
    while True:
        attempts += 1
        try:
            return attempt()
        except RemoteError as error:
            problem = error
        # Outside of `except`: an error raised in it would keep the library's own, with the URL, as its context.
        if not problem.passing:
            raise DataError(f"{what}: {problem.reason}")
        longest = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempts - 1, 16))
        pause = problem.wait_seconds + _jitter.uniform(0, longest)
        if pause >= deadline.left():
            asked = f" and asks to wait {problem.wait_seconds:.0f} s" if problem.wait_seconds else ""
            end = f"gave up at attempt {attempts} ({deadline.setting} = {deadline.seconds:g})"
            raise DataError(f"{what}: {problem.reason}{asked}; {end}")
        logger.warning("%s: %s; trying again in %.1f s", what, problem.reason, pause)
        time.sleep(pause)


def _seconds_until(retry_after: str) -> float:
    """The header `Retry-After`, which is a number of seconds or a date; 0 where it is neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())
