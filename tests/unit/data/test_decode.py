"""Decoding: a function of what the sample is, and of nothing else."""

from pathlib import Path

import pytest
import torch
from helpers import TINY_MODALITIES, index_folder, picture_bytes, sample_members, write_data_set, write_tar

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.model.model import ModelConfig
from mmfuse.types import Sample, SampleRef


def make_decoder(recipe: Path, *, seed: int | None) -> SampleDecoder:
    configs = ModelConfig.model_validate({"modalities": TINY_MODALITIES}).modality_configs
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=tuple(configs))
    return SampleDecoder([source], {name: config.build_processor() for name, config in configs.items()}, seed=seed)


def decode(decoder: SampleDecoder, source: int, number: int, epoch: int) -> Sample:
    (sample,) = decoder([SampleRef(source, number, epoch)])
    return sample


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data"), lacking={1: ("image", "audio")})


def differing(one: Sample, other: Sample) -> set[str]:
    """Modalities whose tensors are not bit for bit the same."""
    assert one.features.keys() == other.features.keys()
    return {
        name
        for name, tensors in one.features.items()
        if not all(torch.equal(tensor, other.features[name][key]) for key, tensor in tensors.items())
    }


def test_training_tensors_depend_on_seed_epoch_and_sample_alone(recipe: Path) -> None:
    first = decode(make_decoder(recipe, seed=1), 0, 2, 0)
    torch.manual_seed(99)
    decoder = make_decoder(recipe, seed=1)
    decode(decoder, 0, 5, 3)
    assert differing(decode(decoder, 0, 2, 0), first) == set()
    assert {"image", "audio"} <= differing(decode(decoder, 0, 2, 1), first)
    assert {"image", "audio"} <= differing(decode(make_decoder(recipe, seed=2), 0, 2, 0), first)


def test_two_samples_of_the_same_bytes_are_augmented_differently(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", shard_sizes=(2,), modalities=["image"], index=False)
    write_tar(tmp_path / "set/train-0.tar", {"0.jpg": picture_bytes(1), "1.jpg": picture_bytes(1)})
    index_folder(tmp_path / "set")
    decoder = make_decoder(recipe, seed=1)
    assert differing(decode(decoder, 0, 0, 0), decode(decoder, 0, 1, 0)) == {"image"}
    decoder = make_decoder(recipe, seed=None)
    assert differing(decode(decoder, 0, 0, 0), decode(decoder, 0, 1, 0)) == set()


def test_evaluation_tensors_are_the_same_in_every_epoch(recipe: Path) -> None:
    decoder = make_decoder(recipe, seed=None)
    assert differing(decode(decoder, 0, 2, 0), decode(decoder, 0, 2, 7)) == set()


def test_decoding_does_not_touch_the_random_state_of_others(recipe: Path) -> None:
    before = torch.get_rng_state()
    decode(make_decoder(recipe, seed=1), 0, 2, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_member_is_an_absent_modality(recipe: Path) -> None:
    assert decode(make_decoder(recipe, seed=1), 0, 1, 0).features.keys() == {"text"}


def test_padding_has_no_modality_and_no_identity(recipe: Path) -> None:
    padding = decode(make_decoder(recipe, seed=None), 0, -1, 0)
    assert (padding.sample_id, padding.group_id, padding.features) == (-1, -1, {})


def test_sample_ids_differ_between_sources(recipe: Path) -> None:
    decoder = make_decoder(recipe, seed=None)
    twice = SampleDecoder(decoder.sources * 2, decoder.processors, seed=None)
    assert len({decode(twice, source, index, 0).sample_id for source in (0, 1) for index in (0, 1)}) == 4


def test_captions_vary_over_epochs(emoji_sample: Path) -> None:
    decoder = make_decoder(emoji_sample, seed=1)
    index = next(i for i in range(300) if decoder.sources[0].read(i).members.get("text", ("", b""))[1].count(b"\n") > 1)
    texts = {tuple(decode(decoder, 0, index, epoch).features["text"]["input_ids"].tolist()) for epoch in range(12)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("0003.jpg", b"no picture", "not a readable JPEG"),
        ("0003.txt", b"\xff\xfe", "not UTF-8"),
        ("0003.ogg", b"no sound", "not a readable WAV"),
    ],
)
def test_a_bad_member_masks_its_modality_and_is_named(
    tmp_path: Path, monkeypatch, name: str, data: bytes, message
) -> None:
    monkeypatch.setattr("helpers.sample_members", lambda n, m: sample_members(n, m) | ({name: data} if n == 3 else {}))
    sample = decode(make_decoder(write_data_set(tmp_path / "set"), seed=1), 0, 3, 0)
    (fault,) = sample.faults
    assert (fault.source, fault.shard, fault.key) == ("set/train", str(tmp_path / "set/train-0.tar"), "0003")
    assert f"{fault.key}.{fault.extension}" == name
    assert fault.reason.startswith(message) and not fault.lost
    assert len(sample.features) == 2, "only the bad member's modality is absent"


def test_a_sample_of_which_nothing_is_left_stays_as_a_row_without_modalities(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", shard_sizes=(2,), modalities=["image"], index=False)
    write_tar(tmp_path / "set/train-0.tar", {"0.jpg": b"no picture", "1.jpg": picture_bytes(1)})
    index_folder(tmp_path / "set")
    sample = decode(make_decoder(recipe, seed=1), 0, 0, 0)
    assert (sample.features, sample.sample_id, [fault.lost for fault in sample.faults]) == ({}, 0, [True])


def test_a_decoder_that_breaks_in_its_own_way_costs_the_member_and_not_the_run(recipe: Path) -> None:
    def broken(data: bytes, *, seed: int | None):
        raise ZeroDivisionError("of a third party")

    decoder = make_decoder(recipe, seed=1)
    decoder.processors["image"] = broken  # type: ignore[assignment]
    (fault,) = decode(decoder, 0, 2, 0).faults
    assert (fault.kind, fault.reason) == ("unexpected", "ZeroDivisionError: of a third party")
