"""What the prefetcher says of failures, and of a budget that does not suffice."""

import functools
from pathlib import Path

import pytest
from caches import join_cache

from mmfuse.data.order import ShardUse
from mmfuse.data.remote.prefetch import CacheConfig, Progress
from mmfuse.data.remote.prefetch_ahead import CachedShard
from mmfuse.data.remote.prefetch_loop import Feeder, PrefetchJob, explain_failure
from mmfuse.errors import ConfigError, DataError

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


def test_evaluation_needs_room_for_what_training_does_not_read_meanwhile(tmp_path: Path) -> None:
    shards = {(0, n): (CachedShard(f"s3://bucket/{n}.tar", 1000, "v"),) for n in range(3)}
    uses = functools.partial(iter, [ShardUse(0, 0, 0, n) for n in range(3)])
    Progress.create(tmp_path / "progress", num_ranks=1)
    config = CacheConfig(folder=tmp_path, budget_gib=3000 / 2**30)

    def start(beside: dict[str, int]) -> None:
        cache = join_cache(tmp_path, budget=config.budget_bytes)
        try:
            Feeder(PrefetchJob(config, shards, uses, tmp_path / "progress", "me", beside), cache)
        finally:
            cache.close()

    start({shards[0, 1][0].name: 1000})
    with pytest.raises(ConfigError, match=r"3 x .* GiB, and 9.\S+e-10 GiB that evaluation reads at a time are needed"):
        start({"another.tar": 1})
