"""Sounds: resampling and log-mel spectra as torchaudio's, without what it works out anew for every sound.

No modality: a folder without `__init__.py` is none.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

FRAME_SHIFT_MS = 10
FRAME_LENGTH_MS = 25

_LARGEST_KEPT_KERNEL = 2**20
_LOWEST_HZ = 20.0
_FRAMES_IN_CACHE = 256


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """torchaudio.functional.resample, value for value; keeps the kernels, which take longer to make than to use."""
    divisor = math.gcd(rate, new_rate)
    rate, new_rate = rate // divisor, new_rate // divisor
    make = _resampler if rate * new_rate <= _LARGEST_KEPT_KERNEL else _resampler.__wrapped__
    return make(rate, new_rate)(waveform)


@functools.lru_cache(maxsize=64)
def _resampler(rate: int, new_rate: int) -> nn.Module:
    return torchaudio.transforms.Resample(rate, new_rate, dtype=torch.float32)


def log_mel(waveform: Tensor, *, sample_rate: int, num_mel_bins: int) -> Tensor:
    """`(values,)` -> `(frames, mel)`: torchaudio.compliance.kaldi.fbank with Hann windows, within 1e-5.

    Equal to the last bit on any number of threads, which a matrix product is not: hence the sums by `embedding_bag`.
    """
    bank = _filter_bank(sample_rate, num_mel_bins)
    frames = waveform.unfold(0, len(bank.window), sample_rate * FRAME_SHIFT_MS // 1000)
    mel = torch.cat([_mel_powers(piece, bank) for piece in frames.split(_FRAMES_IN_CACHE)], dim=1)
    return mel.T.clamp(min=torch.finfo(torch.float32).eps).log_()


class _FilterBank(NamedTuple):
    window: Tensor
    fft_size: int
    frequencies: Tensor
    """int64: the frequencies of the first mel filter, then those of the second, and so on."""
    weights: Tensor
    """Of each of these."""
    starts: Tensor
    """int64 `(mel,)`: where each filter's begin."""


def _mel_powers(frames: Tensor, bank: _FilterBank) -> Tensor:
    """`(frames, values)` -> `(mel, frames)`."""
    frames = frames - frames.mean(1, keepdim=True)
    emphasized = F.pad(frames[:, :-1], (1, 0)).mul_(-0.97).add_(frames).mul_(bank.window)
    spectrum = torch.fft.rfft(emphasized, n=bank.fft_size)
    power = (spectrum.real.square() + spectrum.imag.square()).T.contiguous()
    return F.embedding_bag(bank.frequencies, power, bank.starts, mode="sum", per_sample_weights=bank.weights)


@functools.lru_cache(maxsize=8)
def _filter_bank(sample_rate: int, num_mel_bins: int) -> _FilterBank:
    window = torch.hann_window(sample_rate * FRAME_LENGTH_MS // 1000, periodic=False)
    fft_size = 1 << (len(window) - 1).bit_length()
    no_warp = (100.0, -500.0, 1.0)
    filters, _ = torchaudio.compliance.kaldi.get_mel_banks(
        num_mel_bins, fft_size, float(sample_rate), _LOWEST_HZ, 0.0, *no_warp
    )
    rows, frequencies = filters.nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(num_mel_bins))
    return _FilterBank(window, fft_size, frequencies, filters[rows, frequencies], starts)
