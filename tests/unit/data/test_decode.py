"""Decoding: a function of what the sample is, and of nothing else."""

from pathlib import Path

import pytest
import torch
from helpers import TINY_MODALITIES, picture_bytes, sample_members, write_data_set, write_tar

from mmfuse.data.checks import index_shards
from mmfuse.data.decode import SampleDecoder, choose_caption
from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.recipe import MemberRule
from mmfuse.errors import SampleError
from mmfuse.model.model import ModelConfig
from mmfuse.types import Sample, SampleRef

LINES = MemberRule(extensions=("txt",), captions="lines")


def make_decoder(recipe: Path, *, seed: int | None) -> SampleDecoder:
    configs = ModelConfig.model_validate({"modalities": TINY_MODALITIES}).modality_configs
    source = open_source(SourceConfig(recipe=str(recipe)), modalities=tuple(configs))
    return SampleDecoder([source], {name: config.build_processor() for name, config in configs.items()}, seed=seed)


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
    first = make_decoder(recipe, seed=1)(SampleRef(0, 2, 0))
    torch.manual_seed(99)
    decoder = make_decoder(recipe, seed=1)
    decoder(SampleRef(0, 5, 3))
    assert differing(decoder(SampleRef(0, 2, 0)), first) == set()
    assert {"image", "audio"} <= differing(decoder(SampleRef(0, 2, 1)), first)
    assert {"image", "audio"} <= differing(make_decoder(recipe, seed=2)(SampleRef(0, 2, 0)), first)


def test_two_samples_of_the_same_bytes_are_augmented_differently(tmp_path: Path) -> None:
    recipe = write_data_set(tmp_path / "set", shard_sizes=(2,), modalities=["image"], index=False)
    write_tar(tmp_path / "set/train-0.tar", {"0.jpg": picture_bytes(1), "1.jpg": picture_bytes(1)})
    list(index_shards([tmp_path / "set/train-0.tar"]))
    decoder = make_decoder(recipe, seed=1)
    assert differing(decoder(SampleRef(0, 0, 0)), decoder(SampleRef(0, 1, 0))) == {"image"}
    decoder = make_decoder(recipe, seed=None)
    assert differing(decoder(SampleRef(0, 0, 0)), decoder(SampleRef(0, 1, 0))) == set()


def test_evaluation_tensors_are_the_same_in_every_epoch(recipe: Path) -> None:
    decoder = make_decoder(recipe, seed=None)
    assert differing(decoder(SampleRef(0, 2, 0)), decoder(SampleRef(0, 2, 7))) == set()


def test_decoding_does_not_touch_the_random_state_of_others(recipe: Path) -> None:
    before = torch.get_rng_state()
    make_decoder(recipe, seed=1)(SampleRef(0, 2, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_member_is_an_absent_modality(recipe: Path) -> None:
    assert make_decoder(recipe, seed=1)(SampleRef(0, 1, 0)).features.keys() == {"text"}


def test_padding_has_no_modality_and_no_identity(recipe: Path) -> None:
    padding = make_decoder(recipe, seed=None)(SampleRef(0, -1, 0))
    assert (padding.sample_id, padding.group_id, padding.features) == (-1, -1, {})


def test_sample_ids_differ_between_sources(recipe: Path) -> None:
    decoder = make_decoder(recipe, seed=None)
    twice = SampleDecoder(decoder.sources * 2, decoder.processors, seed=None)
    assert len({twice(SampleRef(source, index, 0)).sample_id for source in (0, 1) for index in (0, 1)}) == 4


def test_training_draws_captions_and_evaluation_takes_the_first() -> None:
    data = b"one\r\n\n  \ntwo\nthree"
    drawn = [choose_caption(data, LINES, seed=seed) for seed in range(60)]
    assert set(drawn) == {b"one", b"two", b"three"}
    assert [choose_caption(data, LINES, seed=seed) for seed in range(60)] == drawn
    assert choose_caption(data, LINES, seed=None) == b"one"
    assert choose_caption(data, MemberRule(extensions=("txt",)), seed=3) == data


def test_captions_vary_over_epochs(emoji_sample: Path) -> None:
    decoder = make_decoder(emoji_sample, seed=1)
    index = next(i for i in range(300) if decoder.sources[0].read(i).members.get("text", ("", b""))[1].count(b"\n") > 1)
    texts = {tuple(decoder(SampleRef(0, index, epoch)).features["text"]["input_ids"].tolist()) for epoch in range(12)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("0003.jpg", b"no picture", "not a readable JPEG"),
        ("0003.txt", b"\xff\xfe", "not UTF-8"),
        ("0003.ogg", b"no sound", "not a readable WAV"),
    ],
)
def test_a_bad_member_is_named_with_shard_and_key(tmp_path: Path, monkeypatch, name: str, data: bytes, message) -> None:
    monkeypatch.setattr("helpers.sample_members", lambda n, m: sample_members(n, m) | ({name: data} if n == 3 else {}))
    decoder = make_decoder(write_data_set(tmp_path / "set"), seed=1)
    with pytest.raises(SampleError, match=f"/set/train-0.tar/{name}: {message}.*mmfuse shards check"):
        decoder(SampleRef(0, 3, 0))


def test_a_member_without_any_caption_is_bad() -> None:
    with pytest.raises(SampleError, match="no caption in any line"):
        choose_caption(b" \n\n", LINES, seed=0)
