"""Augmentation: a function of the seed alone, as strong as it says, and off in evaluation."""

import math
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from helpers import picture_bytes, sound_bytes
from pydantic import ValidationError
from unit.modalities.members import noise, sound_file

from mmfuse.modalities import audio, image, text
from mmfuse.modalities.base import Processor

CAPTION = b"a small red apple and two green pears lie on a wooden table, photograph"
MEMBERS = {"text": CAPTION, "image": picture_bytes(1, size=200), "audio": sound_bytes(1, seconds=4.0, rate=22_050)}
EVERYTHING = {
    "text": text.Config(augment=text.AugmentConfig(drop_probability=0.3)),
    "image": image.Config(augment=image.AugmentConfig(trivial_augment=True, erase=0.3)),
    "audio": audio.Config(
        augment=audio.AugmentConfig(gain_db=6, noise_snr_db=(5, 20), num_time_masks=2, num_frequency_masks=3),
    ),
}
EVERYTHING["image, too"] = image.Config(augment=image.AugmentConfig(rand_augment_magnitude=15, erase=0.3))
NOTHING: dict[str, dict[str, Any]] = {
    "image": {"min_scale": 1, "flip": False, "color_jitter": 0},
    "audio": {"speed": 0, "time_mask": 0, "frequency_mask": 0},
}
OTHER_PROCESS = """
import pickle, sys
found = [p(data, seed=seed) for p, data in pickle.loads(sys.stdin.buffer.read()) for seed in range(6)]
sys.stdout.buffer.write(pickle.dumps([{name: tensor.tolist() for name, tensor in each.items()} for each in found]))
"""


def plain(features: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in features.items()}


def augmented(processors: dict[str, Processor], *, repeats: int = 1) -> list[dict[str, list]]:
    """What each processor makes of its member with a few seeds; eight at a time when they are repeated."""
    calls = [(name, seed) for name in processors for seed in range(6)] * repeats

    def augment(call: tuple[str, int]) -> dict[str, list]:
        name, seed = call
        return plain(processors[name](MEMBERS[name.split(",")[0]], seed=seed))

    with ThreadPoolExecutor(1 if repeats == 1 else 8) as pool:
        return list(pool.map(augment, calls))


def test_a_seed_gives_the_same_bits_in_any_thread_and_on_any_number_of_threads():
    processors = {name: config.build_processor() for name, config in EVERYTHING.items()}
    expected, threads = augmented(processors), torch.get_num_threads()
    assert augmented(processors, repeats=3) == expected * 3
    try:
        torch.set_num_threads(7)
        assert augmented(processors) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_seed_gives_the_same_bits_in_a_fresh_process():
    processors = {name: config.build_processor() for name, config in EVERYTHING.items()}
    sent = pickle.dumps([(processors[name], MEMBERS[name.split(",")[0]]) for name in processors])
    other = subprocess.run([sys.executable, "-c", OTHER_PROCESS], input=sent, capture_output=True, check=True)
    assert pickle.loads(other.stdout) == augmented(processors)  # noqa: S301  # our own bytes


@pytest.mark.parametrize("name", EVERYTHING)
def test_augmentation_leaves_everybody_s_random_numbers_alone(name):
    processor, data = EVERYTHING[name].build_processor(), MEMBERS[name.split(",")[0]]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    different = {str(plain(processor(data, seed=seed))) for seed in range(40)}
    assert len(different) > 30
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize(
    ("modality", "setting"),
    [
        ("image", {"min_scale": 0.5}),
        ("image", {"flip": True}),
        ("image", {"color_jitter": 0.2}),
        ("image", {"rand_augment_magnitude": 9}),
        ("image", {"trivial_augment": True}),
        ("image", {"erase": 0.2}),
        ("audio", {"speed": 0.1}),
        ("audio", {"gain_db": 6.0}),
        ("audio", {"noise_snr_db": (10, 20)}),
        ("audio", {"time_mask": 0.2}),
        ("audio", {"frequency_mask": 0.2}),
    ],
)
def test_each_augmentation_works_alone_and_without_any_training_is_evaluation(modality, setting):
    module = {"image": image, "audio": audio}[modality]
    data = {"image": MEMBERS["image"], "audio": sound_bytes(1, seconds=2.0)}[modality]  # too short for another crop
    nothing = NOTHING[modality]
    settled, one = (
        module.Config(augment=module.AugmentConfig(**settings)).build_processor()
        for settings in (nothing, nothing | setting)
    )
    evaluated = plain(settled(data, seed=None))
    assert all(plain(settled(data, seed=seed)) == evaluated for seed in range(3))
    assert plain(one(data, seed=None)) == evaluated
    assert sum(plain(one(data, seed=seed)) != evaluated for seed in range(20)) > 5


def decibels(fbank: torch.Tensor) -> torch.Tensor:
    return fbank * 2 * 4.5689974 * 10 / math.log(10)


def test_gain_changes_all_of_a_clip_by_at_most_its_decibels():
    augment = audio.AugmentConfig(gain_db=6, **NOTHING["audio"])
    processor, data, gains = audio.Config(augment=augment).build_processor(), sound_file(noise(1.0)), []
    quiet = decibels(processor(data, seed=None)["fbank"])
    for seed in range(40):
        change = decibels(processor(data, seed=seed)["fbank"]) - quiet
        assert change.std() < 0.01
        gains.append(float(change.mean()))
    assert -6.01 < min(gains) < -4 and 4 < max(gains) < 6.01


def test_noise_is_as_loud_as_its_ratio_says_and_silence_stays_silent():
    data = sound_file((0.3 * np.sin(np.arange(16_000) * 0.4)).astype(np.float32))
    floors = []
    for ratio in (10, 30):
        augment = audio.AugmentConfig(noise_snr_db=(ratio, ratio), **NOTHING["audio"])
        processor = audio.Config(augment=augment).build_processor()
        fbank = decibels(processor(data, seed=1)["fbank"])
        floors.append(float(fbank[:, 50:].mean()))  # far above the tone
        silent = sound_file(np.zeros(16_000, dtype=np.float32))
        assert torch.equal(processor(silent, seed=1)["fbank"], processor(silent, seed=None)["fbank"])
    assert abs(floors[0] - floors[1] - 20) < 0.5
    # White noise as loud as the tone itself, so that the ratio is not only relative.
    loud = audio.Config().build_processor()(sound_file(noise(1.0) * 0.3 / math.sqrt(2) / 0.1), seed=None)["fbank"]
    assert abs(float(decibels(loud)[:, 50:].mean()) - floors[0] - 10) < 0.5


def test_several_masks_cover_more_than_one_may_and_no_more_than_all_may():
    settings = NOTHING["audio"] | {"time_mask": 0.1, "frequency_mask": 0.1}
    augment = audio.AugmentConfig(**settings, num_time_masks=3, num_frequency_masks=4)
    processor, covered = audio.Config(augment=augment).build_processor(), []
    for seed in range(40):
        masked = processor(sound_file(noise(1.0)), seed=seed)["fbank"] == 0
        covered.append((int(masked.all(1).sum()), int(masked.all(0).sum())))
    frames, bins = zip(*covered, strict=True)
    assert 9 < max(frames) <= 27 and 6 < max(bins) <= 24  # of 98 and 64


def test_erasing_turns_one_rectangle_of_at_most_its_share_grey():
    augment = image.AugmentConfig(erase=0.25, **NOTHING["image"])
    processor, shares = image.Config(image_size=64, augment=augment).build_processor(), []
    before = processor(MEMBERS["image"], seed=None)["pixels"]
    for seed in range(40):
        after = processor(MEMBERS["image"], seed=seed)["pixels"]
        changed = (after != before).any(0)
        assert (after[:, changed] == 128).all()
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        if len(rows):
            box = after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == 128).all()
        shares.append(float(changed.float().mean()))
    assert 0.15 < max(shares) <= 0.26 and min(shares) < 0.05


def test_dropped_tokens_are_ordinary_ones_in_their_share_and_never_all():
    kept = []
    for probability in (0.3, 0.95):
        augment = text.AugmentConfig(drop_probability=probability)
        processor = text.Config(augment=augment).build_processor()
        whole = processor(CAPTION, seed=None)["input_ids"].tolist()
        assert whole == text.Config().build_processor()(CAPTION, seed=4)["input_ids"].tolist()
        for seed in range(200):
            ids = processor(CAPTION, seed=seed)["input_ids"].tolist()
            assert (ids[0], ids[-1]) == (whole[0], whole[-1]) and len(ids) >= 3
            rest = iter(whole)
            assert all(token in rest for token in ids), "the order has changed"
            kept.append((len(ids) - 2) / (len(whole) - 2))
        assert abs(sum(kept[:200]) / 200 - 0.7) < 0.03
        assert len(processor(b"apple", seed=1)["input_ids"]) == 3
    assert min(kept[200:]) < 0.1


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (image, {"erase": 1.0}, "less than 1"),
        (image, {"rand_augment_magnitude": 31}, "less than or equal to 30"),
        (image, {"rand_augment_magnitude": 5, "trivial_augment": True}, "exclude each other"),
        (audio, {"noise_snr_db": (20, 10)}, r"expected \[lowest, highest\] in dB"),
        (audio, {"noise_snr_db": (-100, 10)}, "between -40 and 100"),
        (audio, {"gain_db": -3}, "greater than or equal to 0"),
        (audio, {"speed": 0.02}, "at least one step of 0.05"),
        (audio, {"num_time_masks": 0}, "greater than 0"),
        (text, {"drop_probability": 1.0}, "less than 1"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_allowed(config, wrong, message):
    with pytest.raises(ValidationError, match=message):
        config.Config.model_validate({"augment": wrong})


def test_only_the_clip_is_decoded():
    whole = np.concatenate([noise(2.0)] * 10)
    for kind in ("FLAC", "OGG"):
        data = sound_file(whole, kind=kind, subtype=None)
        damaged = data[: len(data) // 2] + bytes(len(data) // 2)
        processor = audio.Config(clip_seconds=2.56).build_processor()
        assert torch.equal(*(processor(each, seed=None)["fbank"] for each in (data, damaged)))


def test_spec_augment_masks_sound_and_not_the_silence_behind_it():
    augment = {"speed": 0, "time_mask": 0.2, "frequency_mask": 0}
    config = {"encoder": "whisper", "clip_seconds": 4.0, "num_mel_bins": 80}
    processor = audio.Config(**config, augment=augment).build_processor()
    data, shares = sound_file(noise(1.0)), []
    plain = processor(data, seed=None)["fbank"]
    for seed in range(40):
        changed = (processor(data, seed=seed)["fbank"] != plain).any(1)
        assert not changed[100:].any()
        shares.append(changed.double().mean() * 4)
    assert max(shares) <= 0.2 and sum(share > 0.05 for share in shares) > 20
