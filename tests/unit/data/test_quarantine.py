"""What a rank puts up with, source by source."""

from typing import Any

import pytest
import torch

from mmfuse.data.decode import SOURCE_BITS
from mmfuse.data.quarantine import Quarantine, QuarantineConfig
from mmfuse.errors import DataError
from mmfuse.types import Batch, Fault

NAMES = ["a/train", "b/train"]


def batch_of(*rows: tuple[int, str | None]) -> Batch:
    """Rows of a source; what is wrong with each is None, `masked` or `lost`."""
    numbers = range(len(rows))
    faults = [
        Fault(NAMES[source], "x.tar", f"k{n}", "jpg", "not_decodable", "no picture", wrong == "lost")
        for n, (source, wrong) in zip(numbers, rows, strict=True)
        if wrong
    ]
    return Batch(
        modalities=("image",),
        present=torch.tensor([[wrong is None] for _, wrong in rows]),
        group_id=torch.arange(len(rows)),
        sample_id=torch.tensor([source << SOURCE_BITS | n for n, (source, _) in zip(numbers, rows, strict=True)]),
        keys=tuple(f"x.tar/k{n}" for n in numbers),
        inputs={},
        step=0,
        global_rows=len(rows),
        faults=tuple(faults),
    )


def quarantine(**settings: Any) -> Quarantine:
    return Quarantine(NAMES, QuarantineConfig(**settings))


def test_counts_are_kept_by_source_and_kind() -> None:
    kept = quarantine()
    kept.add(batch_of((0, None), (0, "masked"), (1, "lost"), (1, None), (1, None)))
    kept.add(batch_of((0, "lost")))
    assert kept.counts() == {"a/train": (3, 1, 1), "b/train": (3, 0, 1)}
    assert kept.kinds == {("a/train", "not_decodable"): 2, ("b/train", "not_decodable"): 1}


def test_a_source_that_is_entirely_bad_stops_the_run_though_others_are_good() -> None:
    kept = quarantine(max_consecutive=5)
    kept.add(batch_of(*[(0, None), (1, "lost")] * 4))
    with pytest.raises(
        DataError, match=r"b/train: the last 5 samples .* are all bad .*max_consecutive = 5.*x.tar/k1.jpg: no pic"
    ):
        kept.add(batch_of((0, None), (1, "lost")))


def test_a_good_sample_ends_a_row_of_bad_ones() -> None:
    kept = quarantine(max_consecutive=3)
    kept.add(batch_of(*[(0, "masked"), (0, "lost"), (0, None)] * 20))


def test_the_share_is_judged_once_there_are_enough_samples() -> None:
    kept = quarantine(max_share=0.1, judge_after=40)
    kept.add(batch_of(*[(0, "masked"), *[(0, None)] * 8] * 4))  # 4 of 36: above the share, too few to judge
    with pytest.raises(DataError, match=r"a/train: 5 of 40 samples .*max_share = 0.1"):
        kept.add(batch_of((0, None), (0, None), (0, None), (0, "masked")))


def test_buckets_of_one_source_are_counted_together() -> None:
    kept = quarantine()
    kept.add(batch_of((0, None), (2, None), (3, None), (5, None)))  # source 2 is the first one's second bucket
    assert [counts.samples for counts in kept.counts().values()] == [2, 2]
