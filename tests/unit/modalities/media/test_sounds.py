"""Resampling and spectra equal torchaudio's."""

import pytest
import torch
import torchaudio

from mmfuse.modalities.media.sounds import log_mel, resample


def signals(num_values: int) -> list[torch.Tensor]:
    """Noise, a tone, a quiet tone on an offset, and silence."""
    time = torch.arange(num_values)
    noise = 0.1 * torch.randn(num_values, generator=torch.Generator().manual_seed(num_values))
    return [noise, 0.3 * torch.sin(0.4 * time), 0.5 + 1e-4 * torch.sin(0.05 * time), torch.zeros(num_values)]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("num_mel_bins", [16, 64, 128])
def test_spectra_equal_kaldi_s(rate, num_mel_bins):
    for num_values in (rate // 40, rate // 40 + 1, rate // 3, rate, 3 * rate + 777):
        for waveform in signals(num_values):
            expected = torchaudio.compliance.kaldi.fbank(
                waveform[None],
                sample_frequency=rate,
                num_mel_bins=num_mel_bins,
                window_type="hanning",
                htk_compat=True,
                use_energy=False,
                dither=0.0,
            )
            found = log_mel(waveform, sample_rate=rate, num_mel_bins=num_mel_bins)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_spectra_are_the_same_to_the_last_bit_on_any_number_of_threads():
    before, spectra = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 16):
            torch.set_num_threads(threads)
            spectra.append(
                [log_mel(signals(length)[0], sample_rate=48_000, num_mel_bins=128) for length in (1_200, 6_000, 48_000)]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in spectra[1:] for pair in zip(spectra[0], other, strict=True))


def test_resampling_equals_torchaudio_s_the_first_time_and_again():
    waveform = signals(5_000)[0]
    # The last kernel is too large to be kept.
    for rate, new_rate in ((44_100, 16_000), (8_000, 16_000), (21, 20), (18, 20), (16_000, 16_000), (22_255, 16_000)):
        expected = torchaudio.functional.resample(waveform, rate, new_rate)
        for _ in range(2):
            assert torch.equal(resample(waveform, rate, new_rate), expected)
