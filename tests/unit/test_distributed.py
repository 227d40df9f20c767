"""The exchanges between ranks: values, and gradients back to every owner."""

import pytest
import torch
from unit.objectives.ranks import (
    WORLD_SIZES,
    global_rows,
    rank_weights,
    result_alone,
    results_on_ranks,
    typed_rows,
    wanted_rows,
)

from mmfuse.distributed import slice_of_rank

# Two rows over three ranks leave the first without any; eleven are uneven; six are even.
COUNTS = (2, 6, 11)


def each_world(recipe: str) -> list[list[dict[str, torch.Tensor]]]:
    """What the ranks gave, one list a world, a world of one first."""
    worlds = [[result_alone(recipe)]]
    return worlds + [[result[recipe] for result in results_on_ranks("exchanges")[size]] for size in WORLD_SIZES]


def test_slices_follow_each_other_cover_everything_and_differ_by_one_row_at_most() -> None:
    for total in (0, 1, 7, 64):
        for world_size in (1, 2, 3, 5, 64):
            parts = [slice_of_rank(total, rank=r, world_size=world_size) for r in range(world_size)]
            assert [row for part in parts for row in range(total)[part]] == list(range(total))
            assert {part.stop - part.start for part in parts} <= {total // world_size, -(-total // world_size)}


@pytest.mark.parametrize("count", COUNTS)
def test_gather_gives_all_rows_to_all_ranks_and_all_gradients_to_the_owner(count: int) -> None:
    for ranks in each_world(f"gather {count}"):
        assert all(torch.equal(result["rows"], global_rows(count)) for result in ranks)
        gradient = torch.cat([result["gradient"] for result in ranks])
        expected = sum(rank_weights(count, number) for number in range(len(ranks)))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", COUNTS)
def test_fetch_gives_each_rank_what_it_wants_and_adds_up_gradients_at_the_owner(count: int) -> None:
    for ranks in each_world(f"fetch {count}"):
        expected = torch.zeros_like(global_rows(count))
        for number, result in enumerate(ranks):
            wanted = wanted_rows(count, number)
            assert torch.equal(result["rows"], global_rows(count)[wanted])
            expected.index_add_(0, wanted, rank_weights(len(wanted), number))
        gradient = torch.cat([result["gradient"] for result in ranks])
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


def test_integers_truth_values_and_bf16_travel_unchanged() -> None:
    for ranks in each_world("exchange_types"):
        for number, result in enumerate(ranks):
            for dtype in (torch.int64, torch.uint8, torch.bool, torch.bfloat16):
                rows = typed_rows(11, dtype)
                assert torch.equal(result[f"gather {dtype}"], rows)
                assert torch.equal(result[f"fetch {dtype}"], rows[wanted_rows(11, number)])
                assert result[f"gather {dtype}"].dtype == result[f"fetch {dtype}"].dtype == dtype


def test_a_tensor_that_ranks_hold_differently_is_found_on_all_of_them() -> None:
    assert [[set(result) for result in ranks] for ranks in each_world("differences")] == [
        [set()],
        [{"spoilt"}] * 2,
        [{"spoilt"}] * 3,
    ]
