"""Audio: WAV, FLAC, MP3, Ogg or Opus -> log-mel filter bank -> an Audio Spectrogram Transformer (Gong et al. 2021)."""

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import soundfile
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Generator, Tensor, nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities.base import ModalityConfig, PatchEncoder, Processor, find_layers, masked_mean
from mmfuse.modalities.media.given import sound_to_bytes
from mmfuse.modalities.media.sound_augment import (
    SPEED_STEPS,
    AugmentConfig,
    change_loudness,
    mask_bands,
    random_speed,
)
from mmfuse.modalities.media.sounds import FRAME_LENGTH_MS, FRAME_SHIFT_MS, log_mel, resample
from mmfuse.modalities.media.spectrograms import VariableLengthEmbeddings
from mmfuse.types import EncoderOutput, Features

EXTENSIONS = ("wav", "flac", "mp3", "ogg", "opus")

_LARGEST_KERNEL = 2**24
_SPARE_SECONDS = 0.1
"""Decoded after a clip: the rest of its last frame, and what resampling looks ahead."""


class Config(ModalityConfig):
    """AST of transformers; without `pretrained` of the sizes given here."""

    sample_rate: PositiveInt = 16_000
    """Every clip is resampled to this, in Hz."""
    clip_seconds: PositiveFloat = 2.56
    """Length of a clip; shorter ones are padded and masked, longer ones cropped (at a seeded offset in training)."""
    num_mel_bins: PositiveInt = 64
    pretrained: str | None = None
    """Local folder or hub id of an AST; normalisation and the sizes below are then its own and must fit the clip."""
    architecture: str | None = None
    """The same without its weights."""
    patch_size: PositiveInt = 64
    """Side of the square patches, in mel bins and frames."""
    frequency_stride: PositiveInt = 64
    time_stride: PositiveInt = 8
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    max_seconds: PositiveFloat = 3600.0
    """Longer recordings are refused before they are decoded."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _check_patches_fit(self) -> "Config":
        if self.named is None and self.patch_size > min(self.num_frames, self.num_mel_bins):
            raise ValueError(
                f"patch_size = {self.patch_size} does not fit {self.num_frames} frames (clip_seconds = "
                f"{self.clip_seconds}) of {self.num_mel_bins} mel bins"
            )
        return self

    @property
    def named(self) -> str | None:
        """Where the sizes come from, if not from here."""
        return self.pretrained or self.architecture

    @property
    def num_frames(self) -> int:
        """Frames of a full clip."""
        return round(self.clip_seconds * 1000) // FRAME_SHIFT_MS

    def build_processor(self) -> Processor:
        return AudioProcessor(self)

    def build_encoder(self) -> "AudioEncoder":
        return AudioEncoder(self)

    def save_files(self, folder: Path) -> None:
        if self.named:
            ASTConfig.from_pretrained(self.named).save_pretrained(folder)
            _feature_extractor(self.named).save_pretrained(folder)

    def with_files(self, folder: Path) -> Self:
        return self.model_copy(update={"pretrained": None, "architecture": str(folder) if self.named else None})

    def count_patch_values(self) -> int:
        stride = ASTConfig.from_pretrained(self.named).time_stride if self.named else self.time_stride
        return stride * self.num_mel_bins


class AudioProcessor:
    """Encoded sound -> `fbank (frames, mel)`, normalised as ASTFeatureExtractor does."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mean, self.twice_std = _normalisation(config)

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        config = self.config
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        waveform = self._decode(data, generator)
        window, shift = (config.sample_rate * ms // 1000 for ms in (FRAME_LENGTH_MS, FRAME_SHIFT_MS))
        if len(waveform) < window:
            raise SampleError(f"sound of {len(waveform)} values is shorter than one frame of {FRAME_LENGTH_MS} ms")
        waveform = waveform[: (config.num_frames - 1) * shift + window]
        if generator is not None:
            waveform = change_loudness(waveform, config.augment, generator)
        fbank = log_mel(waveform, sample_rate=config.sample_rate, num_mel_bins=config.num_mel_bins)
        if not math.isfinite(fbank.sum()):  # `torch.isfinite` takes 40 times as long
            raise SampleError("the sound has values that are not finite, or too large", kind="not_finite")
        fbank.sub_(self.mean).div_(self.twice_std)
        if generator is not None:
            mask_bands(fbank, config.augment, generator)
        return {"fbank": fbank}

    def to_bytes(self, value: Any) -> bytes:
        """Of a path, or `(waveform, sample rate)`, floats `(n,)`, NumPy `(n, channels)` or torch `(channels, n)`."""
        return sound_to_bytes(value)

    def collate(self, features: list[Features]) -> Features:
        """`fbank (n, frames, mel)` padded with zeros to the longest, `frames` int64 `(n,)` real ones."""
        fbanks = [item["fbank"] for item in features]
        frames = torch.tensor([len(fbank) for fbank in fbanks])
        return {"fbank": nn.utils.rnn.pad_sequence(fbanks, batch_first=True), "frames": frames}

    def _decode(self, data: bytes, generator: Generator | None) -> Tensor:
        """Mono waveform `(values,)` of one clip, and a little more, at the rate and speed that the encoder hears."""
        clip_seconds, new_rate, faster = self.config.clip_seconds, self.config.sample_rate, 0
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as sound:
                rate, seconds = sound.samplerate, sound.frames / sound.samplerate
                if seconds > self.config.max_seconds:
                    said = f"recording of {seconds:.0f} s exceeds max_seconds = {self.config.max_seconds}"
                    raise SampleError(said, kind="too_large")
                _check_rate(rate, new_rate)
                longest = int(1.5 * clip_seconds * rate)  # at the fastest speed
                if generator is not None:
                    surplus = sound.frames - longest
                    if surplus > 0:
                        sound.seek(int(torch.randint(surplus + 1, (), generator=generator)))
                    faster = random_speed(self.config.augment.speed, generator)
                needed = int((clip_seconds * (1 + faster / SPEED_STEPS) + _SPARE_SECONDS) * rate)
                values = sound.read(min(needed, longest), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SampleError(f"not a readable WAV, FLAC, MP3, Ogg or Opus sound: {error}") from error
        if not len(values):
            raise SampleError("the sound is empty", kind="empty")
        # Not `mean`, which takes 7 times as long over two channels.
        mono = functools.reduce(torch.add, torch.from_numpy(values).unbind(1)) / values.shape[1]
        # By the ratio: torchaudio's kernel grows with both rates, 500 MB for 22,050 and 23,152 Hz.
        return resample(resample(mono, rate, new_rate), SPEED_STEPS + faster, SPEED_STEPS)


class AudioEncoder(PatchEncoder):
    """`fbank (n, frames, mel)`, `frames (n,)` -> AST's patch tokens, averaged over frequency."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ast = _build_ast(config)
        if config.gradient_checkpointing:
            self.ast.gradient_checkpointing_enable({"use_reentrant": False})
        ast = self.ast.config
        self.width = ast.hidden_size
        self.pooling = config.pooling
        self.num_mel_bins = config.num_mel_bins
        patches = self.ast.embeddings.patch_embeddings.projection
        self.patch_size, self.time_stride = patches.kernel_size[1], patches.stride[1]
        self.frequency_patches, self.time_patches = self.ast.embeddings.get_shape(ast)
        self.ast.embeddings = VariableLengthEmbeddings(self.ast.embeddings)  # type: ignore[assignment]  # takes its place

    def forward(self, inputs: Features) -> EncoderOutput:
        fbank = inputs["fbank"]
        # AST masks patches, not frames; its two class tokens are always real.
        mask = self._real_patches(inputs)
        time_patches = mask.shape[1]
        attention_mask = torch.cat([mask.new_ones(len(mask), 2), mask.repeat(1, self.frequency_patches)], dim=1)
        missing = (time_patches - 1) * self.time_stride + self.patch_size - fbank.shape[1]
        fbank = F.pad(fbank, (0, 0, 0, missing)).to(next(self.ast.parameters()).dtype)
        output = self.ast(input_values=fbank, attention_mask=attention_mask.long())
        patches = output.last_hidden_state[:, 2:].unflatten(1, (self.frequency_patches, time_patches))
        tokens = patches.mean(1)
        pooled = output.pooler_output if self.pooling == "cls" else masked_mean(tokens, mask)
        return EncoderOutput(tokens, mask, pooled)

    def patches(self, inputs: Features) -> tuple[Tensor, Tensor]:
        """Strips of as many frames as lie between the beginnings of two tokens, in all mel bins; one for each token."""
        mask = self._real_patches(inputs)
        return self._strips(inputs["fbank"], mask.shape[1]).flatten(2).float(), mask

    def hide(self, inputs: Features, hidden: Tensor) -> Features:
        fbank = inputs["fbank"]
        strips = self._strips(fbank, hidden.shape[1]).masked_fill(hidden[:, :, None, None], 0.0)  # 0 is the mean
        rest = fbank[:, hidden.shape[1] * self.time_stride :]  # of the last patch, beyond the last token's own strip
        return {**inputs, "fbank": torch.cat([strips.flatten(1, 2)[:, : fbank.shape[1]], rest], dim=1)}

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        return tokens

    def _real_patches(self, inputs: Features) -> Tensor:
        """bool `(n, tokens in time)`: a token is real where its first frame is."""
        fbank, frames = inputs["fbank"], inputs["frames"]
        time_patches = min(math.ceil(fbank.shape[1] / self.time_stride), self.time_patches)
        starts = torch.arange(time_patches, device=frames.device) * self.time_stride
        return starts < frames[:, None]

    def _strips(self, fbank: Tensor, count: int) -> Tensor:
        """`(n, count, stride, mel)` of the first frames, padded with zeros."""
        length = count * self.time_stride
        return F.pad(fbank[:, :length], (0, 0, 0, max(0, length - fbank.shape[1]))).unflatten(1, (count, -1))

    def layers(self) -> Sequence[nn.Module]:
        return find_layers(self.ast, self.ast.config.num_hidden_layers)

    def minimal_inputs(self, device: torch.device) -> Features:
        fbank = torch.zeros(1, 1, self.num_mel_bins, device=device)
        return {"fbank": fbank, "frames": torch.ones(1, dtype=torch.int64, device=device)}


def _normalisation(config: Config) -> tuple[float, float]:
    """What is subtracted from the filter bank, and what it is divided by; AudioSet's for a model of our own.

    Raises:
        ConfigError: a pretrained model of another sample rate.
    """
    extractor = _feature_extractor(config.named) if config.named else ASTFeatureExtractor()
    if config.named and extractor.sampling_rate != config.sample_rate:
        raise ConfigError(f"audio: {config.named} needs sample_rate = {extractor.sampling_rate}")
    return (extractor.mean, 2 * extractor.std) if extractor.do_normalize else (0.0, 1.0)


def _feature_extractor(named: str) -> ASTFeatureExtractor:
    """The model's own preprocessing; AudioSet's where it says nothing."""
    try:
        return ASTFeatureExtractor.from_pretrained(named)
    except OSError:  # only weights and structure are there
        return ASTFeatureExtractor()


def _build_ast(config: Config) -> ASTModel:
    shape = ASTConfig.from_pretrained(config.named) if config.named else _own_shape(config)
    if (shape.max_length, shape.num_mel_bins) != (config.num_frames, config.num_mel_bins):
        seconds, bins = shape.max_length * FRAME_SHIFT_MS / 1000, shape.num_mel_bins
        raise ConfigError(f"audio: {config.named} needs clip_seconds = {seconds} and num_mel_bins = {bins}")
    if config.pretrained:
        return ASTModel.from_pretrained(config.pretrained)
    ast = ASTModel(shape)
    # transformers leaves these at 0, where the first norm makes gradients 10^6 times too large; the authors do this.
    embeddings = ast.embeddings
    for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        torch.nn.init.trunc_normal_(parameter, std=0.02)
    return ast


def _own_shape(config: Config) -> ASTConfig:
    return ASTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.hidden_size,
        patch_size=config.patch_size,
        frequency_stride=config.frequency_stride,
        time_stride=config.time_stride,
        max_length=config.num_frames,
        num_mel_bins=config.num_mel_bins,
    )


def _check_rate(rate: int, wanted: int) -> None:
    """Refuses rates that would take torchaudio's resampling minutes or all memory: 12 GB from 192,001 to 16,000 Hz."""
    kernel = math.lcm(rate, wanted) // math.gcd(rate, wanted)
    if kernel > _LARGEST_KERNEL:
        raise SampleError(f"sample rate of {rate} Hz has too little in common with {wanted} Hz; resample the file")
