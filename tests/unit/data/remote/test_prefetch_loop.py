"""What the prefetcher says of failures."""

from pathlib import Path

import pytest

from mmfuse.data.remote.prefetch import CacheConfig
from mmfuse.data.remote.prefetch_loop import explain_failure
from mmfuse.errors import DataError

URL = "https://user:s3cr3t@host/a.tar?X-Signature=s3cr3t"


def write_to_a_full_disk() -> None:
    try:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        raise DataError(f"a.part: cannot be written: {error.strerror}") from error


def fail_with_a_url() -> None:
    raise ValueError(f"cannot read {URL}")


def fail_with_a_file() -> None:
    open("/dev/null/a").close()


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (
            write_to_a_full_disk,
            "no space left on the disk of /x: something else fills it, and data.cache.budget_gib = 50",
        ),
        (fail_with_a_url, "cannot be copied to /x: ValueError"),
        (fail_with_a_file, "cannot be copied to /x: Not a directory"),
    ],
)
def test_a_failure_is_said_in_plain_words_without_secrets(fail, told: str) -> None:
    with pytest.raises((OSError, ValueError, DataError)) as error:
        fail()
    message = explain_failure(error.value, url=URL, config=CacheConfig(folder=Path("/x")))
    assert message.startswith(f"https://host/a.tar: {told}") and "s3cr3t" not in message
