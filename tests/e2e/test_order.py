"""The order of samples: whatever the number of ranks and workers, and whenever the process is killed."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from blended import BAD, GLOBAL_BATCH, SOURCES, WEIGHTS, load_rank, write_sources

from mmfuse.data.decode import SOURCE_BITS
from mmfuse.types import Batch

STEPS = 40  # 960 samples: the first source comes twice around, the second 20 times, the third 40 times
TOPOLOGIES = [(world_size, workers) for world_size in (1, 2, 3, 4, 7, 8) for workers in (0, 1, 3)]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("blended"))


def global_batches(
    recipes: dict[str, Path], world_size: int, num_workers: int, *, start: int = 0, stop: int = STEPS
) -> list[dict]:
    """What each global batch holds, the ranks simulated one after the other."""
    ranks = [
        list(
            load_rank(
                recipes.values(), rank=rank, world_size=world_size, num_workers=num_workers, start=start, stop=stop
            )
        )
        for rank in range(world_size)
    ]
    return [
        {
            "keys": [key for batch in step for key in batch.keys],
            "ids": [number for batch in step for number in batch.sample_id.tolist()],
            "present": [row for batch in step for row in batch.present.tolist()],
            "faults": [fault for batch in step for fault in batch.faults],
            "seeds": sorted(seed for batch in step for seed in seeds_of(batch)),
        }
        for step in zip(*ranks, strict=True)
    ]


def seeds_of(batch: Batch) -> list[int]:
    """What augmentation would be keyed by, of every member."""
    return [seed for part in batch.inputs.values() for seed in part.inputs["seed"].tolist()]


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Path]) -> list[dict]:
    return global_batches(recipes, 1, 0)


@pytest.mark.parametrize(("world_size", "num_workers"), TOPOLOGIES)
def test_global_batches_do_not_know_how_many_read_them(recipes, alone, world_size: int, num_workers: int) -> None:
    assert global_batches(recipes, world_size, num_workers) == alone


def test_every_sample_comes_once_an_epoch_and_bad_ones_are_accounted_for(alone: list[dict]) -> None:
    keys = [key for step in alone for key in step["keys"]]
    ids = [number for step in alone for number in step["ids"]]
    present = [tuple(row) for step in alone for row in step["present"]]
    names, sizes = list(SOURCES), [sum(shards) for _, shards in SOURCES.values()]
    for source, (name, size) in enumerate(zip(names, sizes, strict=True)):
        mine = [number & ((1 << SOURCE_BITS) - 1) for number in ids if number >> SOURCE_BITS == source]
        assert len(mine) == pytest.approx(STEPS * GLOBAL_BATCH * WEIGHTS[source] / sum(WEIGHTS), abs=GLOBAL_BATCH)
        times = Counter(mine)
        assert len(times) == size and max(times.values()) - min(times.values()) <= 1, f"{name}: uneven epochs"
    assert {key.rpartition("/")[2] for key, row in zip(keys, present, strict=True) if not any(row)} == {"0100"}
    found = {(f.source.partition("/")[0], int(f.key), f.extension, f.lost) for step in alone for f in step["faults"]}
    assert found == {(*place, e, place == ("pairs", 100)) for place, extensions in BAD.items() for e in extensions}


@pytest.mark.slow
def test_nothing_is_lost_or_repeated_in_50_random_kills(recipes, alone: list[dict], tmp_path: Path) -> None:
    draw, record, kills = random.Random(0), tmp_path / "record.jsonl", 0
    record.touch()
    while kills < 50:
        world_size, num_workers = draw.choice(TOPOLOGIES)
        start = len(whole_lines(record))
        stop = start + 40
        child = os.fork()  # without exec: 50 imports of torch would take minutes
        if child == 0:
            os.setsid()
            load_and_record(recipes, record, world_size, num_workers, start=start, stop=stop)
            os._exit(0)
        # Wait for the first batches of this process, so that kills hit at all its ages.
        wait_for_lines(record, start + 1, child)
        time.sleep(draw.random() * 0.05)
        os.killpg(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    lines = whole_lines(record)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert len(lines) >= 50
    uninterrupted = global_batches(recipes, 1, 0, stop=len(lines))
    assert [line["keys"] for line in lines] == [step["keys"] for step in uninterrupted]
    assert [line["faults"] for line in lines] == [[fault.key for fault in step["faults"]] for step in uninterrupted]


def load_and_record(recipes, record: Path, world_size: int, num_workers: int, *, start: int, stop: int) -> None:
    """A loading process: reads all ranks step by step, and writes each global batch down once it has it."""
    os.truncate(record, sum(len(json.dumps(line)) + 1 for line in whole_lines(record)))
    ranks = [
        load_rank(recipes.values(), rank=r, world_size=world_size, num_workers=num_workers, start=start, stop=stop)
        for r in range(world_size)
    ]
    with open(record, "a", buffering=1) as file:
        for step, batches in enumerate(zip(*ranks, strict=True), start=start):
            keys = [key for batch in batches for key in batch.keys]
            faults = [fault.key for batch in batches for fault in batch.faults]
            file.write(json.dumps({"step": step, "keys": keys, "faults": faults}) + "\n")


def whole_lines(record: Path) -> list[dict]:
    return [json.loads(line) for line in record.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for_lines(record: Path, number: int, child: int) -> None:
    deadline = time.monotonic() + 60
    while len(whole_lines(record)) < number:
        assert time.monotonic() < deadline
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the loading process ended by itself"
        time.sleep(0.01)
