"""Changes to sounds in training: speed, loudness, noise, and SpecAugment's masks; each seeded by the caller."""

import math

import numpy as np
import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Generator, Tensor

from mmfuse.config import Settings

SPEED_STEPS = 20


class AugmentConfig(Settings):
    """Training-time transform, seeded by sample; applied in this order."""

    speed: float = Field(default=0.1, ge=0, lt=0.5)
    """Largest relative change of speed (and with it of pitch), in steps of 0.05; 0 turns it off."""
    gain_db: float = Field(default=0.0, ge=0, le=60)
    """Largest change of loudness, up or down, in dB; 0 turns it off."""
    noise_snr_db: tuple[float, float] | None = None
    """White noise at a signal-to-noise ratio between these two, in dB; null turns it off."""
    time_mask: float = Field(default=0.1, ge=0, lt=1)
    """SpecAugment (Park et al. 2019): longest masked stretch as a fraction of the real frames; 0 turns it off."""
    num_time_masks: PositiveInt = 1
    frequency_mask: float = Field(default=0.2, ge=0, lt=1)
    """SpecAugment: widest masked band as a fraction of the mel bins; 0 turns it off."""
    num_frequency_masks: PositiveInt = 1

    @field_validator("speed")
    @classmethod
    def _check_step(cls, value: float) -> float:
        if 0 < value < 1 / SPEED_STEPS:
            raise ValueError("expected 0, or at least one step of 0.05")
        return value

    @field_validator("noise_snr_db")
    @classmethod
    def _check_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and not -40 <= value[0] <= value[1] <= 100:
            raise ValueError("expected [lowest, highest] in dB, both between -40 and 100")
        return value


def random_speed(largest: float, generator: Generator) -> int:
    """A relative change in twentieths: few ratios, so that torchaudio's resampling kernels stay small."""
    steps = math.floor(largest * SPEED_STEPS + 1e-6)
    return int(torch.randint(2 * steps + 1, (), generator=generator)) - steps


def change_loudness(waveform: Tensor, augment: AugmentConfig, generator: Generator) -> Tensor:
    """`waveform (values,)` louder or quieter, and with noise."""
    if augment.gain_db:
        gain_db = torch.empty(()).uniform_(-augment.gain_db, augment.gain_db, generator=generator)
        waveform = waveform * 10 ** (float(gain_db) / 20)
    if augment.noise_snr_db:
        snr_db = float(torch.empty(()).uniform_(*augment.noise_snr_db, generator=generator))
        # Of NumPy, on one thread: torch's sums depend on their number. In fp64, where squares do not overflow.
        power = np.square(waveform.numpy(), dtype=np.float64).mean()
        noise = torch.randn(len(waveform), generator=generator)
        waveform = waveform + noise * math.sqrt(power / 10 ** (snr_db / 10))
    return waveform


def mask_bands(fbank: Tensor, augment: AugmentConfig, generator: Generator) -> None:
    """Sets stretches of frames and bands of bins of `fbank (frames, mel)`, sound without silence behind it, to 0.

    That is the mean of AudioSet after AST's normalisation, and within Whisper's range.
    """
    bands = ((0, augment.num_time_masks, augment.time_mask), (1, augment.num_frequency_masks, augment.frequency_mask))
    for dim, count, fraction in bands:
        length = fbank.shape[dim]
        for _ in range(count):
            width = int(torch.randint(int(fraction * length) + 1, (), generator=generator))
            start = int(torch.randint(length - width + 1, (), generator=generator))
            fbank.narrow(dim, start, width).zero_()
