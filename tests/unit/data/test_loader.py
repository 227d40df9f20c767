"""The loader: one order of the committed sample, whatever the ranks and workers."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_MODALITIES, index_folder, write_data_set
from torch import Tensor

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import evaluation_requests, load_batches, training_requests
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.plan import DataPlan, PlannedSource
from mmfuse.data.source import Source
from mmfuse.errors import ShardError
from mmfuse.model.model import ModelConfig
from mmfuse.types import Batch

GLOBAL_BATCH = 24  # of 300 samples: the epoch ends in the middle of global batch 12


def open_sample(recipe: Path, *modalities: str, split: str = "train") -> tuple[Source, SampleDecoder]:
    config = ModelConfig.model_validate({"modalities": {m: TINY_MODALITIES[m] for m in modalities}})
    source = open_source(SourceConfig(recipe=str(recipe), split=split), modalities=modalities)
    processors = {name: c.build_processor() for name, c in config.modality_configs.items()}
    return source, SampleDecoder([source], processors, seed=4)


def read_global_batches(
    recipe: Path, *modalities: str, world_size: int, num_workers: int, start: int = 0, stop: int = 14
) -> list[list[Batch]]:
    """The batches of all ranks, one list a step; each rank has a plan and a decoder of its own."""
    ranks = []
    for rank in range(world_size):
        source, decoder = open_sample(recipe, *modalities)
        planned = PlannedSource(source.name, source.counts, 1.0, source.index_hash)
        plan = DataPlan([planned], seed=4, global_batch=GLOBAL_BATCH)

        def requests(plan: DataPlan = plan, rank: int = rank):
            return training_requests(plan, start=start, stop=stop, rank=rank, world_size=world_size)

        ranks.append(list(load_batches(decoder, requests, num_workers=num_workers, prefetch_batches=2)))
    return [list(step) for step in zip(*ranks, strict=True)]


def keys_of(batches: list[list[Batch]]) -> list[list[str]]:
    return [[key for batch in ranks for key in batch.keys] for ranks in batches]


def tensors_of(batches: list[list[Batch]]) -> dict[tuple[int, int, str, str], Tensor]:
    """Every tensor of every sample, without the padding of texts, by step, sample, modality and name."""
    found = {}
    for batch in (batch for ranks in batches for batch in ranks):
        for modality, part in batch.inputs.items():
            for i, row in enumerate(part.rows.tolist()):
                length = int(part.inputs["attention_mask"][i].sum()) if modality == "text" else None
                for name, tensor in part.inputs.items():
                    found[batch.step, int(batch.sample_id[row]), modality, name] = tensor[i].view(-1)[:length]
    return found


@pytest.fixture(scope="module")
def keys_alone(emoji_sample: Path) -> list[list[str]]:
    return keys_of(read_global_batches(emoji_sample, "text", world_size=1, num_workers=0))


def test_the_keys_are_of_one_whole_epoch_and_then_of_the_next(keys_alone: list[list[str]]) -> None:
    flat = [key for batch in keys_alone for key in batch]
    assert len(set(flat[:300])) == 300
    assert set(flat[300:]) < set(flat[:300])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batches_are_the_same_for_every_world_size_and_worker_count(
    emoji_sample: Path, keys_alone: list[list[str]], world_size: int, num_workers: int
) -> None:
    batches = read_global_batches(emoji_sample, "text", world_size=world_size, num_workers=num_workers)
    assert [len(ranks) for ranks in batches] == [world_size] * 14
    assert keys_of(batches) == keys_alone
    assert {(batch.step, batch.global_rows) for ranks in batches for batch in ranks} == {(s, 24) for s in range(14)}


def test_tensors_are_bit_equal_on_other_ranks_and_workers_and_after_a_resume(emoji_sample: Path) -> None:
    alone = tensors_of(
        read_global_batches(emoji_sample, "text", "image", "audio", world_size=1, num_workers=0, start=11)
    )
    many = tensors_of(
        read_global_batches(emoji_sample, "text", "image", "audio", world_size=3, num_workers=2, start=12)
    )
    assert {modality for _, _, modality, _ in many} == {"text", "image", "audio"}
    assert many.keys() == {key for key in alone if key[0] >= 12}
    for key, tensor in many.items():
        assert torch.equal(tensor, alone[key]), key


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 4)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_asks_for_every_sample_once_in_equally_many_steps(num_samples, batch_size, world_size) -> None:
    ranks = [
        list(evaluation_requests(num_samples, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(requests) for requests in ranks} == {-(-num_samples // batch_size)}
    steps = [np.concatenate([request.refs for request in step]) for step in zip(*ranks, strict=True)]
    assert {len(step) for step in steps} == {batch_size}
    indexes = np.concatenate(steps)[:, 1]
    assert indexes[:num_samples].tolist() == list(range(num_samples))
    assert set(indexes[num_samples:]) <= {-1}


def test_padding_rows_of_evaluation_are_absent(emoji_sample: Path) -> None:
    source, decoder = open_sample(emoji_sample, "text", "image", split="new_emoji")

    def requests():
        return evaluation_requests(len(source), batch_size=64, rank=0, world_size=1)

    first, last = load_batches(decoder, requests, num_workers=0)
    assert first.present.all()
    assert last.present.any(1).tolist() == [True] * 36 + [False] * 28
    assert len(last.inputs["text"].rows) == 36


def test_a_batch_without_a_modality_has_no_inputs_for_it(tmp_path: Path) -> None:
    lacking = {n: ("audio",) for n in range(8)} | {3: ("text", "audio")}
    recipe = write_data_set(tmp_path / "set", shard_sizes=(9,), lacking=lacking)
    source, decoder = open_sample(recipe, "text", "image", "audio")

    def requests():
        return evaluation_requests(len(source), batch_size=4, rank=0, world_size=1)

    batches = list(load_batches(decoder, requests, num_workers=0))
    assert [set(batch.inputs) for batch in batches] == [
        {"text", "image"},
        {"text", "image"},
        {"text", "image", "audio"},
    ]
    assert batches[0].present.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert batches[0].inputs["text"].rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_itself_when_its_batch_is_due(tmp_path: Path, num_workers: int) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"])
    source, decoder = open_sample(recipe, "text")
    os.truncate(tmp_path / "set/train-1.tar", 600)

    def requests():
        return evaluation_requests(len(source), batch_size=5, rank=0, world_size=1)

    batches = iter(load_batches(decoder, requests, num_workers=num_workers))
    assert next(batches).keys[0].endswith("train-0.tar/0000")
    with pytest.raises(ShardError, match=r"train-1.tar: has 600 bytes, but") as error:
        next(batches)
    assert "Traceback" not in str(error.value)


def test_bad_members_come_with_their_batch_across_processes(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", modalities=["text"], index=False)
    shard = tmp_path / "set/train-0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"thing 2\nanother name of 2\n", b" " * 26))
    index_folder(tmp_path / "set")
    source, decoder = open_sample(recipe, "text")

    def requests():
        return evaluation_requests(len(source), batch_size=8, rank=0, world_size=1)

    (batch,) = load_batches(decoder, requests, num_workers=1)
    assert [(fault.key, fault.reason, fault.lost) for fault in batch.faults] == [("0002", "the text is empty", True)]
    assert batch.present[:, 0].tolist() == [True, True, False, True, True, True, True, True]
