"""Shuffles without a table: permutations, and fair ones."""

import math

import numpy as np
import pytest

from mmfuse.data.permutation import mix, permute


def keys(count: int) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64))


def shuffles(size: int, count: int) -> np.ndarray:
    """`(count, size)`: where each position goes under each of many keys."""
    return np.stack([permute(np.full(count, p), np.full(count, size), keys(count)) for p in range(size)], axis=1)


def chi_square(counts: np.ndarray) -> float:
    """Per degree of freedom; 1 is what fair draws give."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum() / (counts.size - 1))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 64, 65, 1000, 100_003])
def test_every_element_goes_to_a_place_of_its_own(size: int) -> None:
    for key in keys(3):
        places = permute(np.arange(size), np.full(size, size), np.full(size, key))
        assert np.array_equal(np.sort(places), np.arange(size))


def test_sizes_and_keys_may_differ_from_element_to_element() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 5000, 300)
    positions = draw.integers(0, sizes)
    together = permute(positions, sizes, keys(300))
    alone = [permute(*(x[i : i + 1] for x in (positions, sizes, keys(300))))[0] for i in range(300)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_few_comes_equally_often(size: int) -> None:
    codes = shuffles(size, 60_000) @ size ** np.arange(size)
    orders, counts = np.unique(codes, return_counts=True)
    assert len(orders) == math.factorial(size)
    assert chi_square(counts) < 1.6


@pytest.mark.parametrize("size", [10, 33, 100])
def test_places_and_distances_of_neighbours_are_uniform(size: int) -> None:
    places = shuffles(size, 20_000)
    spread = [chi_square(np.bincount(column, minlength=size)) for column in places.T]
    assert 0.8 < np.mean(spread) < 1.2
    distances = (places[:, 1:] - places[:, :-1]) % size
    assert chi_square(np.bincount(distances.ravel(), minlength=size)[1:]) < 1.7
