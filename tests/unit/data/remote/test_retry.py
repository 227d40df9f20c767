"""Which answers pass, and how long the next attempt waits."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from mmfuse.data.remote import retry
from mmfuse.data.remote.retry import Deadline, RemoteError, keep_trying, status_error
from mmfuse.errors import DataError


def test_the_server_s_own_trouble_passes_and_a_refusal_does_not() -> None:
    statuses = (301, 400, 401, 403, 404, 408, 410, 416, 425, 429, 500, 502, 503, 504)
    assert [s for s in statuses if status_error(s).passing] == [408, 425, 429, 500, 502, 503, 504]


def test_the_wait_that_a_server_asks_for_is_a_number_or_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < status_error(503, retry_after=date).wait_seconds <= 100
    assert [status_error(503, retry_after=text).wait_seconds for text in ("7", "", "soon", "-3")] == [7, 0, 0, 0]
    assert status_error(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT").wait_seconds == 0


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for _ in range(200):
        problems = [RemoteError("busy", passing=True) for _ in range(9)]

        def attempt(left: list[RemoteError] = problems) -> str:
            if left:
                raise left.pop()
            return "done"

        assert keep_trying(attempt, what="x", deadline=Deadline(1000)) == "done"
    rounds = [slept[number::9] for number in range(9)]
    limits = [min(retry.MAX_PAUSE_SECONDS, retry.FIRST_PAUSE_SECONDS * 2**number) for number in range(9)]
    for pauses, limit in zip(rounds, limits, strict=True):
        assert 0.9 * limit < max(pauses) <= limit, "full jitter reaches up to its limit"
        assert min(pauses) < 0.1 * limit, "and down to nothing"


def test_a_pause_beyond_the_deadline_is_an_error_at_once() -> None:
    def attempt() -> None:
        raise RemoteError("busy", passing=True, wait_seconds=60)

    with pytest.raises(DataError, match=r"x: busy and asks to wait 60 s; gave up at attempt 1"):
        keep_trying(attempt, what="x", deadline=Deadline(50))
