"""Whisper's encoder (Radford et al. 2022, arXiv 2212.04356) from transformers, with the spectrum it was trained on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmfuse.modalities.base import Encoder, masked_mean
from mmfuse.types import EncoderOutput, Features

_FRAMES_A_TOKEN = 2


class WhisperSpectrum:
    """Waveform -> `fbank (frames, mel)` of a whole clip, silence at its end, and `frames`, how many are sound."""

    def __init__(self, extractor: WhisperFeatureExtractor, *, num_frames: int) -> None:
        self.extractor, self.num_frames = extractor, num_frames

    def __call__(self, waveform: Tensor) -> Features:
        hop = self.extractor.hop_length
        clip = {"max_length": self.num_frames * hop, "padding": "max_length", "truncation": True}
        heard = self.extractor(
            waveform.numpy(), sampling_rate=self.extractor.sampling_rate, return_tensors="pt", **clip
        )
        frames = min(math.ceil(len(waveform) / hop), self.num_frames)
        return {"fbank": heard["input_features"][0].T.contiguous(), "frames": torch.tensor(frames)}

    def collate(self, features: list[Features]) -> Features:
        """`fbank (n, frames, mel)`, `frames` int64 `(n,)`."""
        return {name: torch.stack([item[name] for item in features]) for name in ("fbank", "frames")}


def build_whisper(shape: WhisperConfig, *, pretrained: str | None) -> WhisperEncoder:
    """The encoder alone, with pretrained or fresh weights."""
    if pretrained:
        return WhisperModel.from_pretrained(pretrained, dtype=torch.float32).encoder
    return WhisperEncoder(shape).float()  # the settings of a model stored in fp16 ask for that


class WhisperAudioEncoder(Encoder):
    """`fbank (n, frames, mel)`, `frames (n,)` -> means over `token_stride` of Whisper's tokens, each of 20 ms.

    It always hears whole clips: its positions and its attention were trained on sound followed by silence.
    """

    def __init__(self, whisper: WhisperEncoder, *, token_stride: int) -> None:
        super().__init__()
        self.whisper, self.token_stride = whisper, token_stride
        self.width = whisper.config.d_model

    def forward(self, inputs: Features) -> EncoderOutput:
        fbank = inputs["fbank"].transpose(1, 2).to(self.whisper.conv1.weight.dtype)
        fine = self.whisper(fbank).last_hidden_state
        starts = torch.arange(fine.shape[1], device=fine.device) * _FRAMES_A_TOKEN
        real = starts < inputs["frames"][:, None]
        missing = -fine.shape[1] % self.token_stride
        windows = nn.functional.pad(fine, (0, 0, 0, missing)).unflatten(1, (-1, self.token_stride))
        heard = nn.functional.pad(real, (0, missing)).unflatten(1, (-1, self.token_stride))
        tokens = masked_mean(windows.flatten(0, 1), heard.flatten(0, 1)).unflatten(0, windows.shape[:2])
        return EncoderOutput(tokens, heard.any(2), masked_mean(fine, real))

    def minimal_inputs(self, device: torch.device) -> Features:
        shape = self.whisper.config
        frames = _FRAMES_A_TOKEN * shape.max_source_positions
        fbank = torch.zeros(1, frames, shape.num_mel_bins, device=device)
        return {"fbank": fbank, "frames": torch.ones(1, dtype=torch.int64, device=device)}

    def layers(self) -> Sequence[nn.Module]:
        return list(self.whisper.layers)
