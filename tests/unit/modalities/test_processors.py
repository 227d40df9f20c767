"""Bytes to tensors: the features of the reference, seeded augmentation, and what is refused."""

import io

import numpy as np
import pytest
import torch
from batches import tiny_model
from helpers import picture_bytes, sound_bytes
from PIL import Image
from transformers import ASTFeatureExtractor
from unit.modalities.members import noise, photograph, picture_file, sound_file

from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities import audio, image, text
from mmfuse.modalities.media.sentences import BETWEEN_SENTENCES

MEMBERS = {"text": b"a red apple", "image": picture_bytes(1), "audio": sound_bytes(1)}


def test_features_equal_the_reference_extractor():
    waveform = noise(2.0)
    features = audio.Config(num_mel_bins=128, clip_seconds=2.56).build_processor()(sound_file(waveform), seed=None)
    reference = ASTFeatureExtractor(max_length=256)(waveform, sampling_rate=16_000, return_tensors="pt").input_values[0]
    frames = len(features["fbank"])
    assert frames == 198
    torch.testing.assert_close(features["fbank"], reference[:frames], rtol=0, atol=1e-6)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_augmentation_is_a_function_of_the_seed_alone(modality):
    processor = tiny_model().modality_configs[modality].build_processor()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (processor(MEMBERS[modality], seed=seed) for seed in (1, 1, 2))
    (name,) = first
    assert torch.equal(first[name], again[name])
    assert first[name].shape != other[name].shape or not torch.equal(first[name], other[name])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*(processor(MEMBERS[modality], seed=None)[name] for _ in range(2)))


def test_a_long_recording_is_cropped_at_a_seeded_place_and_at_its_start_in_evaluation():
    processor = audio.Config(clip_seconds=0.8).build_processor()
    ramp = np.sin(np.cumsum(np.linspace(0.05, 1.5, 16_000 * 4))).astype(np.float32)
    start = processor(sound_file(ramp), seed=None)["fbank"]
    assert len(start) == 80
    assert torch.equal(start, processor(sound_file(ramp[:16_000]), seed=None)["fbank"])
    loudest = {int(processor(sound_file(ramp), seed=seed)["fbank"].mean(0).argmax()) for seed in range(8)}
    assert len(loudest) > 3  # the pitch tells the place


def test_a_sound_keeps_its_pitch_and_length_whatever_its_rate_and_channels():
    processor, features = audio.Config(clip_seconds=2.0).build_processor(), []
    for rate in (8_000, 16_000, 22_050, 44_100):
        tone = 0.3 * np.sin(2 * np.pi * 1_000 * np.arange(rate) / rate)
        features.append(processor(sound_file(np.stack([tone, tone], 1), rate=rate), seed=None)["fbank"])
    assert {len(fbank) for fbank in features} == {98}
    assert len({int(fbank.mean(0).argmax()) for fbank in features}) == 1


def test_without_augmentation_training_sees_what_evaluation_sees():
    plain = image.Config(augment=image.AugmentConfig(min_scale=1, flip=False, color_jitter=0)).build_processor()
    assert torch.equal(*(plain(picture_bytes(1), seed=seed)["pixels"] for seed in (None, 5)))
    plain = audio.Config(augment=audio.AugmentConfig(speed=0, frequency_mask=0, time_mask=0)).build_processor()
    assert torch.equal(*(plain(sound_bytes(1), seed=seed)["fbank"] for seed in (None, 5)))


def test_spectrogram_masks_stay_below_their_share_of_the_clip():
    augment = audio.AugmentConfig(speed=0, frequency_mask=0.25, time_mask=0.5)
    processor, widths = audio.Config(augment=augment).build_processor(), []
    for seed in range(40):
        masked = processor(sound_file(noise(0.5)), seed=seed)["fbank"] == 0
        widths.append((int(masked.all(1).sum()), int(masked.all(0).sum())))
    frames, bins = zip(*widths, strict=True)
    assert 18 < max(frames) <= 24 and 12 < max(bins) <= 16 and min(frames) < 6 and min(bins) < 4  # of 48 and 64


def test_random_damage_gives_features_or_a_sample_error():
    whole = {
        image: [picture_bytes(1), picture_file(photograph(40, 40)), picture_file(photograph(40, 40), "WEBP")],
        audio: [sound_bytes(1), sound_file(noise(0.2), subtype="PCM_16"), sound_file(noise(0.2))],
    }
    outcomes, random = {"decoded": 0, "refused": 0}, np.random.default_rng(0)
    for module, files in whole.items():
        processor = module.Config().build_processor()
        for seed in range(150):
            damaged = bytearray(files[seed % len(files)])
            for _ in range(random.integers(1, 6)):
                # Half of the damage hits the header, where sizes and rates are.
                damaged[random.integers(64 if random.random() < 0.5 else len(damaged))] = random.integers(256)
            try:
                (features,) = processor(bytes(damaged), seed=seed).values()
                assert torch.isfinite(features.float()).all()
                outcomes["decoded"] += 1
            except SampleError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_what_is_not_what_it_says_is_refused():
    picture, sound, words = image.Config(max_pixels=50_000), audio.Config(max_seconds=3.0), text.Config()
    big, thin, animation = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (300, 200)).save(big, "PNG")
    Image.new("RGB", (1, 20_000)).save(thin, "PNG")
    Image.new("RGB", (9, 9)).save(animation, "GIF")
    bad = noise(1.0)
    bad[100] = np.nan
    for config, data, message in [
        (picture, b"just some words", "not a readable"),
        (picture, picture_bytes(1)[:-200], "not a readable"),
        (picture, big.getvalue(), "300 x 200 pixels exceeds max_pixels = 50000"),
        (picture, thin.getvalue(), "1 x 20000 pixels is too thin"),
        (picture, animation.getvalue(), "not a readable"),
        (sound, b"RIFFxxxx", "not a readable"),
        (sound, sound_file(noise(4.0)), "exceeds max_seconds = 3.0"),
        (sound, sound_file(bad), "not finite"),
        (sound, sound_file(noise(0.01)), "shorter than one frame"),
        (sound, sound_file(noise(0)), "empty"),
        (sound, sound_file(np.full(9000, 1e38)), "too large"),
        (sound, sound_file(noise(0.1), rate=16_001), "resample the file"),
        (words, b"\xff\xfe", "not UTF-8"),
        (words, b"  \n", "empty"),
    ]:
        for seed in (None, 3):
            with pytest.raises(SampleError, match=message):
                config.build_processor()(data, seed=seed)


def test_long_captions_are_cut_and_keep_their_end_mark():
    processor = text.Config(max_tokens=6).build_processor()
    ids = processor(b"one two three four five six seven eight", seed=None)["input_ids"]
    assert len(ids) == 6 and ids[0] == processor.tokenizer.cls_token_id and ids[-1] == processor.tokenizer.sep_token_id
    assert torch.equal(ids, processor(b"one two three four five six seven eight", seed=9)["input_ids"])


def test_two_sentences_are_what_the_tokenizer_makes_of_a_pair():
    processor = text.Config(max_tokens=9).build_processor()
    for first, second in (("a red apple", "it is sweet"), ("a red apple in a tree", "it is sweet and round")):
        features = processor(first.encode() + BETWEEN_SENTENCES + second.encode(), seed=None)
        expected = processor.tokenizer(first, second, truncation=True, max_length=9)
        assert features["input_ids"].tolist() == expected["input_ids"]
        assert int(features["second"]) == expected["token_type_ids"].index(1)
    for data in (b"a red apple", b"a red\x1fapple", b"a red apple" + BETWEEN_SENTENCES + "\u200b".encode()):
        alone = processor(data, seed=None)
        assert int(alone["second"]) == len(alone["input_ids"])
    dropping = text.Config(augment={"drop_probability": 0.5}).build_processor()
    pair = b"apple apple apple" + BETWEEN_SENTENCES + b"sun sun sun"
    drawn = [dropping(pair, seed=seed) for seed in range(20)]
    apple, sun = (processor.tokenizer(word)["input_ids"][1] for word in ("apple", "sun"))
    assert len({int(features["second"]) for features in drawn}) > 1
    for features in drawn:
        first, second = features["input_ids"].tensor_split([int(features["second"])])
        assert set(first.tolist()) - {apple} and sun not in first and apple not in second


def test_a_tokenizer_from_a_local_folder_gives_the_same_ids(tmp_path):
    shipped = text.Config().build_processor()
    shipped.tokenizer.save_pretrained(tmp_path)
    local = text.Config(tokenizer=str(tmp_path)).build_processor()
    caption = "A red apple, ça va 🍎?".encode()
    assert torch.equal(shipped(caption, seed=None)["input_ids"], local(caption, seed=None)["input_ids"])


def test_a_vocabulary_larger_than_the_embedding_is_refused():
    with pytest.raises(ConfigError, match="vocab_size is 100, but tokenizer 'tiny' has 6368"):
        text.Config(vocab_size=100).build_processor()


def test_huge_texts_are_cut_before_they_are_tokenized():
    processor = text.Config(max_tokens=10, max_bytes_per_token=2).build_processor()
    for characters in ("a" * 19, "é" * 9 + "aé", "apple " * 4_000_000):  # cut at 20 bytes, once inside the last é
        data = characters.encode()
        whole = data[:20].decode(errors="ignore")
        expected = processor.tokenizer(whole, truncation=True, max_length=10)["input_ids"]
        assert processor(b" \n" * 20 + data, seed=None)["input_ids"].tolist() == expected
    with pytest.raises(SampleError, match="not UTF-8"):
        processor(b"a\xff" + b"a" * 50, seed=None)
    with pytest.raises(SampleError, match="not UTF-8"):
        processor(b"a\xc3", seed=None)  # its own end, not ours, is inside a character
