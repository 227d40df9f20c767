"""A good tar and its index, damaged at random in a thousand and in two hundred ways: refused, right or accounted for.

What no reader of tars can see, because a tar neither counts its members nor sums its payloads, is left to what can: the
number of samples that a recipe states, and the decoders.
"""

import logging
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import BLOCK, Place, change, deadline, find_members, rechecked, tar_bytes
from helpers import index_folder, write_yaml

from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.shard_index import ShardIndex, build_index
from mmfuse.data.tar_samples import split_name
from mmfuse.errors import DataError, ShardError

NUM_SAMPLES = 12
Samples = dict[str, dict[str, bytes]]


def make_members(prefix: str) -> dict[str, bytes]:
    rng = random.Random(0)
    sizes = {"jpg": (700, 2500), "txt": (5, 90), "json": (300, 700)}
    return {
        f"{prefix}{number:04d}.{extension}": rng.randbytes(rng.randint(*size))
        for number in range(NUM_SAMPLES)
        for extension, size in sizes.items()
    }


TARS = {
    "ustar": (make_members(""), tarfile.USTAR_FORMAT),
    "pax": (make_members("ä" * 60), tarfile.PAX_FORMAT),
    "gnu": (make_members("folder/" * 16), tarfile.GNU_FORMAT),
}


def cut_off(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    return tar[: rng.randrange(len(tar))]


def flip_bits(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    """One to four, more often in headers than their share of the bytes."""
    for _ in range(rng.randint(1, 4)):
        place = rng.choice(places)
        position = rng.randrange(place.start, place.payload if rng.random() < 0.5 else place.end)
        tar = change(tar, position, bytes([tar[position] ^ 1 << rng.randrange(8)]))
    return tar


def zero_range(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    start = rng.randrange(len(tar))
    start -= start % BLOCK if rng.random() < 0.5 else 0
    return change(tar, start, bytes(min(rng.choice([1, 12, BLOCK, 5 * BLOCK, 40 * BLOCK]), len(tar) - start)))


def overwrite_range(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    start = rng.randrange(len(tar))
    return change(tar, start, rng.randbytes(min(rng.choice([1, 8, BLOCK]), len(tar) - start)))


def remove_blocks(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    start, end = choose_blocks(tar, places, rng)
    return tar[:start] + tar[end:]


def repeat_blocks(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    start, end = choose_blocks(tar, places, rng)
    return tar[:end] + tar[start:]


def move_blocks(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    start, end = choose_blocks(tar, places, rng)
    rest, target = tar[:start] + tar[end:], rng.choice(places).start
    return rest[:target] + tar[start:end] + rest[target:]


def choose_blocks(tar: bytes, places: list[Place], rng: random.Random) -> tuple[int, int]:
    """Any few blocks, or, which a reader notices last, those of whole members."""
    if rng.random() < 0.5:
        start = rng.randrange(len(tar) // BLOCK) * BLOCK
        return start, start + rng.randint(1, 8) * BLOCK
    first = rng.randrange(len(places))
    last = min(first + rng.randint(0, 4), len(places) - 1)
    return places[first].start, -(-places[last].end // BLOCK) * BLOCK


def overwrite_number(tar: bytes, places: list[Place], rng: random.Random) -> bytes:
    """A size, with a checksum that is right nevertheless: what a program with a bug would write."""
    place = rng.choice(places)
    size = place.end - place.payload
    numbers = (0, size - 1, size + 1, size + BLOCK, size ^ 1 << rng.randrange(30), rng.randrange(1 << 33))
    number = max(0, rng.choice(numbers))
    header = tar[place.header : place.payload]
    return change(tar, place.header, rechecked(change(header, 124, b"%011o\0" % number)))


MUTATIONS: tuple[Callable[[bytes, list[Place], random.Random], bytes], ...] = (
    cut_off,
    flip_bits,
    zero_range,
    overwrite_range,
    remove_blocks,
    repeat_blocks,
    move_blocks,
    overwrite_number,
)


def group(members: dict[str, bytes]) -> Samples:
    samples: Samples = {}
    for name, data in members.items():
        key, extension = split_name(name)
        samples.setdefault(key, {})[extension] = data
    return samples


def read_samples(index: ShardIndex, tar: bytes) -> Samples:
    found: Samples = {}
    for number in range(len(index)):
        key, members, _ = index.sample(number)
        assert key not in found
        found[key] = {extension: tar[offset : offset + size] for extension, (offset, size) in members.items()}
    return found


def intact_keys(tar: bytes, mutated: bytes, places: dict[str, Place]) -> set[str]:
    """Keys of the samples whose headers and payloads are all still somewhere in the mutated tar, byte for byte."""
    touched = {split_name(name)[0] for name, place in places.items() if tar[place.start : place.end] not in mutated}
    return {split_name(name)[0] for name in places} - touched


@pytest.mark.parametrize(("tar_format", "seeds"), [("ustar", 500), ("pax", 250), ("gnu", 250)])
def test_of_1000_mutations_none_crashes_or_hangs_and_every_lost_sample_is_accounted_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tar_format: str, seeds: int
) -> None:
    caplog.set_level(logging.ERROR)
    members, number = TARS[tar_format]
    tar, original = tar_bytes(members, tar_format=number), group(members)
    places, outcomes = find_members(tar), Counter[str]()
    shard, sidecar = tmp_path / "x.tar", tmp_path / "x.tar.mmindex"
    for seed in range(seeds):
        rng = random.Random(f"{tar_format} {seed}")
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        mutated = mutate(tar, list(places.values()), rng)
        shard.write_bytes(mutated)
        try:
            with deadline(10):
                found = read_samples(build_index(shard, sidecar), mutated)
        except ShardError as error:
            assert str(shard) in str(error) and not sidecar.exists()
            outcomes["refused"] += 1
            continue
        intact = intact_keys(tar, mutated, places)
        where = f"{mutate.__name__}, seed {seed}"
        assert intact <= found.keys(), where
        for key in intact:
            assert original[key].items() <= found[key].items(), where
        if found.keys() != original.keys():
            assert len(found) != NUM_SAMPLES, where
            check_count_is_refused(tmp_path)
            outcomes["refused by the recipe's count"] += 1
        else:
            outcomes["whole" if found == original else "changed"] += 1
    assert outcomes.total() == seeds
    assert len(outcomes) == 4 and min(outcomes.values()) >= seeds // 50, outcomes


def check_count_is_refused(folder: Path) -> None:
    index_folder(folder)
    split = {"shards": ["x.tar"], "samples": NUM_SAMPLES}
    members = {"image": {"extensions": ["jpg"]}}  # said, so that no modality's libraries are imported
    recipe = write_yaml(folder / "recipe.yaml", {"name": "made", "members": members, "splits": {"train": split}})
    with pytest.raises(DataError, match=f"says {NUM_SAMPLES} samples, its shards hold"):
        open_source(SourceConfig(recipe=str(recipe)), modalities=("image",))


def flip_a_bit(data: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(data))
    return change(data, position, bytes([data[position] ^ 1 << rng.randrange(8)]))


def zero_some(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return change(data, start, bytes(min(rng.choice([1, 8, 64, 512]), len(data) - start)))


def overwrite_a_number(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) // 8) * 8
    return change(data, start, rng.choice([rng.randrange(1 << 16), rng.randrange(1 << 64)]).to_bytes(8, "little"))


def cut_or_lengthen(data: bytes, rng: random.Random) -> bytes:
    return (data + rng.randbytes(64))[: rng.randrange(len(data) + 64)]


def swap_parts(data: bytes, rng: random.Random) -> bytes:
    first, second = sorted(rng.sample(range(len(data) // 64), 2))
    parts = [data[start * 64 : (start + 1) * 64] for start in (first, second)]
    return change(change(data, first * 64, parts[1]), second * 64, parts[0])


FUZZERS = (flip_a_bit, zero_some, overwrite_a_number, cut_or_lengthen, swap_parts)


def test_of_200_mutations_of_an_index_none_gives_anything_but_a_refusal_or_the_right_places(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(TARS["ustar"][0]))
    good = build_index(tmp_path / "x.tar", tmp_path / "x.idx")
    samples, data = [good.sample(number) for number in range(NUM_SAMPLES)], (tmp_path / "x.idx").read_bytes()
    refused = 0
    for seed in range(200):
        mutated = FUZZERS[seed % len(FUZZERS)](data, random.Random(seed))
        (tmp_path / "x.idx").write_bytes(mutated)
        try:
            with deadline(10):
                index = ShardIndex(tmp_path / "x.idx")
                assert [index.sample(number) for number in range(len(index))] == samples
                assert index.header == good.header
        except ShardError as error:
            assert mutated != data and str(tmp_path / "x.idx") in str(error)
            refused += 1
    assert 150 < refused < 200
