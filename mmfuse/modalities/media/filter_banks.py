"""Kaldi's log-mel filter bank as the Audio Spectrogram Transformer hears it."""

import torch
from torch import Tensor, nn
from transformers import ASTFeatureExtractor

from mmfuse.errors import SampleError
from mmfuse.modalities.media.sounds import FRAME_LENGTH_MS, FRAME_SHIFT_MS, log_mel
from mmfuse.types import Features


class FilterBank:
    """Waveform -> `fbank (frames, mel)`, normalised as ASTFeatureExtractor does; no frame for what is not sound."""

    def __init__(self, extractor: ASTFeatureExtractor, *, num_frames: int) -> None:
        self.sample_rate, self.num_mel_bins, self.num_frames = (
            extractor.sampling_rate,
            extractor.num_mel_bins,
            num_frames,
        )
        self.mean, self.twice_std = (extractor.mean, 2 * extractor.std) if extractor.do_normalize else (0.0, 1.0)

    def __call__(self, waveform: Tensor) -> Features:
        window, shift = (self.sample_rate * ms // 1000 for ms in (FRAME_LENGTH_MS, FRAME_SHIFT_MS))
        if len(waveform) < window:
            raise SampleError(f"sound of {len(waveform)} values is shorter than one frame of {FRAME_LENGTH_MS} ms")
        waveform = waveform[: (self.num_frames - 1) * shift + window]
        fbank = log_mel(waveform, sample_rate=self.sample_rate, num_mel_bins=self.num_mel_bins)
        return {"fbank": fbank.sub_(self.mean).div_(self.twice_std)}

    def collate(self, features: list[Features]) -> Features:
        """`fbank (n, frames, mel)` padded with zeros to the longest, `frames` int64 `(n,)` real ones."""
        fbanks = [item["fbank"] for item in features]
        frames = torch.tensor([len(fbank) for fbank in fbanks])
        return {"fbank": nn.utils.rnn.pad_sequence(fbanks, batch_first=True), "frames": frames}
