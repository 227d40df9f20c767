"""Bytes to tensors: the features of the reference, seeded augmentation, and what is refused."""

import io

import numpy as np
import pytest
import soundfile
import torch
from batches import tiny_model
from helpers import picture_bytes, sound_bytes
from PIL import Image
from transformers import ASTFeatureExtractor

from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities import audio, image, text

MEMBERS = {"text": b"a red apple", "image": picture_bytes(1), "audio": sound_bytes(1)}


def wav_bytes(values: np.ndarray, *, rate: int = 16_000, subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, values, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def noise(seconds: float) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(int(seconds * 16_000)) * 0.1).astype(np.float32)


def test_features_equal_the_reference_extractor():
    waveform = noise(2.0)
    features = audio.Config(num_mel_bins=128, clip_seconds=2.56).build_processor()(wav_bytes(waveform), seed=None)
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
    processor = audio.Config(clip_seconds=0.5).build_processor()
    ramp = np.sin(np.cumsum(np.linspace(0.05, 1.5, 16_000 * 4))).astype(np.float32)
    start = processor(wav_bytes(ramp), seed=None)["fbank"]
    assert len(start) == 50
    assert torch.equal(start, processor(wav_bytes(ramp[:16_000]), seed=None)["fbank"])
    loudest = {int(processor(wav_bytes(ramp), seed=seed)["fbank"].mean(0).argmax()) for seed in range(8)}
    assert len(loudest) > 3  # the pitch tells the place


def test_what_is_not_what_it_says_is_refused():
    picture, sound, words = image.Config(max_pixels=50_000), audio.Config(max_seconds=3.0), text.Config()
    big = io.BytesIO()
    Image.new("RGB", (300, 200)).save(big, "PNG")
    bad = noise(1.0)
    bad[100] = np.nan
    for config, data, message in [
        (picture, b"just some words", "not a readable"),
        (picture, picture_bytes(1)[:-200], "not a readable"),
        (picture, big.getvalue(), "300 x 200 pixels exceeds max_pixels = 50000"),
        (sound, b"RIFFxxxx", "not a readable"),
        (sound, wav_bytes(noise(4.0)), "exceeds max_seconds = 3.0"),
        (sound, wav_bytes(bad), "not finite"),
        (sound, wav_bytes(noise(0.01)), "shorter than one frame"),
        (words, b"\xff\xfe", "not UTF-8"),
        (words, b"  \n", "empty"),
    ]:
        with pytest.raises(SampleError, match=message):
            config.build_processor()(data, seed=None)


def test_a_vocabulary_larger_than_the_embedding_is_refused():
    with pytest.raises(ConfigError, match="vocab_size is 100, but tokenizer 'tiny' has 6368"):
        text.Config(vocab_size=100).build_processor()
