"""Keyed random numbers: the right law, every key counts, and the same on every machine."""

import math

import torch

from mmfuse.randomness import hash_int, keyed_uniform, mix, seeded_torch

LARGEST_KEY = 3558559446808474027
"""The key that `mix` turns into 64 ones, and so the largest number that there is."""
SMALLEST_KEY = 7046029254386353131


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def test_numbers_are_uniform_along_every_key_and_in_pairs() -> None:
    count = torch.arange(100_000)
    for drawn in (keyed_uniform(count), keyed_uniform(7, 3, count), keyed_uniform(count, 0, 1)):
        # 99.99% of a chi-square with 63 degrees of freedom lie below 112.
        assert chi_square(torch.histc(drawn, bins=64, min=0, max=1).double()) < 112
        cells = (drawn[:-1] * 8).long() * 8 + (drawn[1:] * 8).long()
        assert chi_square(torch.bincount(cells, minlength=64).double()) < 112


def test_zero_and_one_never_come() -> None:
    assert int(mix(torch.tensor(LARGEST_KEY))) == -1
    assert int(mix(torch.tensor(SMALLEST_KEY))) == 0
    largest, smallest = keyed_uniform(LARGEST_KEY), keyed_uniform(SMALLEST_KEY)
    assert 0 < smallest < 1e-6 and 1 - 1e-6 < largest < 1
    assert math.isfinite(-torch.log(-torch.log(largest)))
    assert int(largest * 30_522) < 30_522  # as masked language modelling draws words


def test_every_key_counts_and_so_does_their_order() -> None:
    base = (11, 22, 33)
    values = {keyed_uniform(*base).item()}
    values |= {keyed_uniform(*base[:i], base[i] + 1, *base[i + 1 :]).item() for i in range(3)}
    values |= {keyed_uniform(22, 11, 33).item(), keyed_uniform(33, 22, 11).item()}
    assert len(values) == 6


def test_keys_broadcast_and_each_number_depends_on_its_own_keys_alone() -> None:
    row, column = torch.tensor([5, -1, 1 << 50]), torch.arange(4)
    drawn = keyed_uniform(9, row[:, None], column)
    assert drawn.shape == (3, 4) and drawn.dtype == torch.float32
    assert drawn[2, 3] == keyed_uniform(9, 1 << 50, 3)
    assert drawn[1, 0] == keyed_uniform(9, -1, 0)


def test_hashes_are_the_same_in_every_process_and_for_ever() -> None:
    assert hash_int(0, "matching") == 5204083471066138711
    assert hash_int("a", "b") != hash_int("ab") != hash_int("a b")
    assert all(0 <= hash_int(i) < 1 << 63 for i in range(1000))
    assert len({hash_int(i) for i in range(1000)}) == 1000


def test_seeded_torch_gives_the_generator_back_even_after_an_error() -> None:
    before = torch.get_rng_state()
    try:
        with seeded_torch(3):
            inside = torch.rand(2)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.get_rng_state(), before)
    with seeded_torch(3):
        assert torch.equal(torch.rand(2), inside)
