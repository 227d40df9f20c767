"""Random numbers by what they are for."""

import pytest
import torch

from mmfuse.hashing import hash_int
from mmfuse.randomness import keyed_uniform, mix, seeded_torch


def splitmix64(x: int) -> int:
    """The reference (Steele et al. 2014), on Python's integers."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_mix_is_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator seeded with 0
    values = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    mixed = mix(torch.tensor(values))
    assert [int(value) % (1 << 64) for value in mixed] == [splitmix64(value % (1 << 64)) for value in values]


def test_uniform_numbers_are_keyed_by_values_and_not_by_places() -> None:
    ids = torch.tensor([7, 3, 9, 3])
    alone = torch.cat([keyed_uniform(5, ids[i : i + 1]) for i in range(4)])
    assert torch.equal(keyed_uniform(5, ids), alone)
    assert alone[1] == alone[3]
    assert len(set(alone.tolist())) == 3
    assert not torch.equal(keyed_uniform(6, ids), alone)
    assert keyed_uniform(5, ids[:, None], torch.arange(3)).shape == (4, 3)
    assert keyed_uniform(1, torch.tensor([2])) != keyed_uniform(2, torch.tensor([1]))


def test_uniform_numbers_are_uniform_and_never_0_or_1() -> None:
    x = keyed_uniform(1, torch.arange(200_000))
    assert x.min() > 0
    assert x.max() < 1
    counts = torch.histc(x, bins=20, min=0, max=1)
    assert (counts - 10_000).abs().max() < 500  # five standard deviations
    assert abs(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1]) < 0.02
    assert float(torch.log(x).min()) > -30


def test_the_largest_number_that_there_is_stays_below_1() -> None:
    key = 3558559446808474027  # mixed, 64 ones
    assert int(mix(torch.tensor(key))) == -1
    largest = keyed_uniform(key)
    assert 1 - 1e-6 < largest < 1
    assert torch.isfinite(-torch.log(-torch.log(largest)))  # as matching draws its noise
    assert int(largest * 30_522) < 30_522  # as masked language modelling draws words


def test_hashes_are_of_63_bits_and_the_same_in_every_process() -> None:
    # Python's own hash of a string changes from process to process.
    assert hash_int("a", 1) == 7_462_354_448_250_234_120
    assert len({hash_int("a", 1), hash_int("a", 2), hash_int("a1"), hash_int()}) == 4
    assert all(0 <= hash_int(i) < 1 << 63 for i in range(1000))


def test_seeding_inside_leaves_no_trace_outside() -> None:
    before = torch.get_rng_state()
    with seeded_torch(3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError), seeded_torch(3):
        assert torch.equal(torch.rand(2), first)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
