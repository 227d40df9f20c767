"""Audio: WAV, FLAC, MP3, Ogg or Opus -> log-mel spectrum -> an Audio Spectrogram Transformer, a ViT, or Whisper's
encoder."""

import functools
import io
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import soundfile
import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from timm.models import VisionTransformer
from timm.models._hub import save_config_for_hf
from torch import Generator, Tensor
from transformers import ASTConfig, ASTFeatureExtractor, WhisperConfig, WhisperFeatureExtractor

from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities.adaptation.named import NamedModelConfig, read_preprocessing, read_structure
from mmfuse.modalities.audio_encoders.ast import AstEncoder, build_ast
from mmfuse.modalities.audio_encoders.vit import DEFAULT_VIT, VitAudioEncoder, build_vit
from mmfuse.modalities.audio_encoders.whisper import WhisperAudioEncoder, WhisperSpectrum, build_whisper
from mmfuse.modalities.base import Encoder, Processor
from mmfuse.modalities.media.filter_banks import FilterBank
from mmfuse.modalities.media.given import sound_to_bytes
from mmfuse.modalities.media.sound_augment import (
    SPEED_STEPS,
    AugmentConfig,
    change_loudness,
    mask_bands,
    random_speed,
)
from mmfuse.modalities.media.sounds import FRAME_SHIFT_MS, resample
from mmfuse.types import Features

EXTENSIONS = ("wav", "flac", "mp3", "ogg", "opus")

_LARGEST_KERNEL = 2**24
_SPARE_SECONDS = 0.1
"""Decoded after a clip: the rest of its last frame, and what resampling looks ahead."""


class Config(NamedModelConfig):
    """AST or Whisper's encoder of transformers, or a ViT of timm; without `pretrained` of the sizes given here."""

    modality: ClassVar[str] = "audio"
    encoder: Literal["ast", "vit", "whisper"] = "ast"
    """Whisper's hears whole clips, 30 s where it is pretrained, and takes as long for short ones. `vit` reads the
    spectrum as a picture: `pretrained` and `architecture` are then names of timm, or `local-dir:FOLDER`."""
    sample_rate: PositiveInt = 16_000
    """Every clip is resampled to this, in Hz."""
    clip_seconds: PositiveFloat = 2.56
    """Length of a clip; shorter ones are padded and masked, longer ones cropped (at a seeded offset in training)."""
    num_mel_bins: PositiveInt = 64
    patch_size: PositiveInt = 64
    """AST: side of the square patches, in mel bins and frames."""
    frequency_stride: PositiveInt = 64
    """AST: mel bins from a patch to the next; ViT: height of its patches."""
    time_stride: PositiveInt = 8
    """AST: frames, of 10 ms, from a patch to the next; ViT: width of its patches."""
    token_stride: PositiveInt = 8
    """Whisper: how many of its tokens, of 20 ms, become one by their mean."""
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    max_seconds: PositiveFloat = 3600.0
    """Longer recordings are refused before they are decoded."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _check_patches_fit(self) -> "Config":
        if self.encoder == "ast" and self.named is None and self.patch_size > min(self.num_frames, self.num_mel_bins):
            raise ValueError(
                f"patch_size = {self.patch_size} does not fit {self.num_frames} frames (clip_seconds = "
                f"{self.clip_seconds}) of {self.num_mel_bins} mel bins"
            )
        return self

    @model_validator(mode="after")
    def _check_encoder(self) -> "Config":
        if self.encoder == "whisper" and self.pooling == "cls":
            raise ValueError("encoder = whisper has no class token: pooling must be mean")
        if self.encoder == "whisper" and self.named is None and self.num_frames % 2:
            raise ValueError(f"clip_seconds = {self.clip_seconds}: whisper takes clips of a multiple of 0.02 s")
        return self

    @property
    def num_frames(self) -> int:
        """Frames of a full clip."""
        return round(self.clip_seconds * 1000) // FRAME_SHIFT_MS

    def build_processor(self) -> Processor:
        return AudioProcessor(self)

    def build_encoder(self) -> Encoder:
        if self.encoder == "vit":
            return VitAudioEncoder(self._build_vit(), num_mel_bins=self.num_mel_bins, pooling=self.pooling)
        shape = self._read_shape()
        if isinstance(shape, WhisperConfig):
            whisper = build_whisper(shape, pretrained=self.pretrained)
            return WhisperAudioEncoder(whisper, token_stride=self.token_stride)
        return AstEncoder(build_ast(shape, pretrained=self.pretrained), pooling=self.pooling)

    def build_spectrum(self) -> FilterBank | WhisperSpectrum:
        """Waveforms -> what the encoder reads.

        Raises:
            ConfigError: a pretrained model of another sample rate or number of bins.
        """
        extractor = self._read_extractor()
        bins = extractor.feature_size if isinstance(extractor, WhisperFeatureExtractor) else extractor.num_mel_bins
        if bins != self.num_mel_bins:
            raise ConfigError(f"audio: {self.named} needs num_mel_bins = {bins}")
        if extractor.sampling_rate != self.sample_rate:
            raise ConfigError(f"audio: {self.named or self.encoder} needs sample_rate = {extractor.sampling_rate}")
        spectrum = WhisperSpectrum if isinstance(extractor, WhisperFeatureExtractor) else FilterBank
        return spectrum(extractor, num_frames=self.num_frames)  # type: ignore[arg-type]  # of its own kind

    def save_files(self, folder: Path) -> None:
        if self.named and self.encoder == "vit":
            save_config_for_hf(self._build_vit(on_meta=True), str(folder / "config.json"))
        elif self.named:
            self._read_shape().save_pretrained(folder)
            self._read_extractor().save_pretrained(folder)

    def with_files(self, folder: Path) -> Self:
        place = f"local-dir:{folder}" if self.encoder == "vit" else str(folder)
        return self.model_copy(update={"pretrained": None, "architecture": place if self.named else None})

    def count_patch_values(self) -> int | None:
        if self.encoder == "vit":
            embed: Any = self._build_vit(on_meta=True).patch_embed
            return embed.patch_size[1] * self.num_mel_bins
        shape = self._read_shape()
        return shape.time_stride * self.num_mel_bins if isinstance(shape, ASTConfig) else None

    def _build_vit(self, *, on_meta: bool = False) -> VisionTransformer:
        """With `on_meta` its structure alone."""
        sizes: dict[str, Any] = {}
        if self.named is None:
            sizes = {"embed_dim": self.hidden_size, "depth": self.num_layers, "num_heads": self.num_heads}
            sizes["patch_size"] = (self.frequency_stride, self.time_stride)
        with torch.device("meta") if on_meta else nullcontext():
            return build_vit(
                self.named or DEFAULT_VIT,
                pretrained=self.pretrained is not None and not on_meta,
                num_mel_bins=self.num_mel_bins,
                num_frames=self.num_frames,
                sizes=sizes,
            )

    def _read_shape(self) -> ASTConfig | WhisperConfig:
        """Of the model that is named, or of the sizes given here.

        Raises:
            ConfigError: the named one is of another family, or takes other clips.
        """
        if self.named is None:
            return self._own_shape()
        family = "whisper" if self.encoder == "whisper" else "audio-spectrogram-transformer"
        shape = read_structure(self.naming_setting, self.named, family=family)
        num_frames = 2 * shape.max_source_positions if self.encoder == "whisper" else shape.max_length
        if (num_frames, shape.num_mel_bins) != (self.num_frames, self.num_mel_bins):
            seconds, bins = num_frames * FRAME_SHIFT_MS / 1000, shape.num_mel_bins
            raise ConfigError(f"audio: {self.named} needs clip_seconds = {seconds} and num_mel_bins = {bins}")
        return shape

    def _own_shape(self) -> ASTConfig | WhisperConfig:
        if self.encoder == "whisper":
            return WhisperConfig(
                d_model=self.hidden_size,
                encoder_layers=self.num_layers,
                encoder_attention_heads=self.num_heads,
                encoder_ffn_dim=4 * self.hidden_size,
                max_source_positions=self.num_frames // 2,
                num_mel_bins=self.num_mel_bins,
            )
        return ASTConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=4 * self.hidden_size,
            patch_size=self.patch_size,
            frequency_stride=self.frequency_stride,
            time_stride=self.time_stride,
            max_length=self.num_frames,
            num_mel_bins=self.num_mel_bins,
        )

    def _read_extractor(self) -> ASTFeatureExtractor | WhisperFeatureExtractor:
        """The preprocessing of the model that is named, or its family's own where that says nothing."""
        family = WhisperFeatureExtractor if self.encoder == "whisper" else ASTFeatureExtractor
        if self.named is None or self.encoder == "vit":
            return self._own_extractor()
        return read_preprocessing(self.naming_setting, self.named, family.from_pretrained, self._own_extractor)

    def _own_extractor(self) -> ASTFeatureExtractor | WhisperFeatureExtractor:
        if self.encoder == "whisper":
            return WhisperFeatureExtractor(feature_size=self.num_mel_bins)
        return ASTFeatureExtractor(num_mel_bins=self.num_mel_bins, sampling_rate=self.sample_rate)


class AudioProcessor:
    """Encoded sound -> `fbank (frames, mel)`, and what else the spectrum gives."""

    def __init__(self, config: Config) -> None:
        self.config, self.spectrum = config, config.build_spectrum()

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        config = self.config
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        waveform = self._decode(data, generator)
        if generator is not None:
            waveform = change_loudness(waveform, config.augment, generator)
        features = self.spectrum(waveform)
        if not math.isfinite(features["fbank"].sum()):  # `torch.isfinite` takes 40 times as long
            raise SampleError("the sound has values that are not finite, or too large", kind="not_finite")
        if generator is not None:
            mask_bands(features["fbank"][: features.get("frames")], config.augment, generator)
        return features

    def to_bytes(self, value: Any) -> bytes:
        """Of a path, or `(waveform, sample rate)`, floats `(n,)`, NumPy `(n, channels)` or torch `(channels, n)`."""
        return sound_to_bytes(value)

    def collate(self, features: list[Features]) -> Features:
        """Encoder inputs of n rows."""
        return self.spectrum.collate(features)

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


def _check_rate(rate: int, wanted: int) -> None:
    """Refuses rates that would take torchaudio's resampling minutes or all memory: 12 GB from 192,001 to 16,000 Hz."""
    kernel = math.lcm(rate, wanted) // math.gcd(rate, wanted)
    if kernel > _LARGEST_KERNEL:
        raise SampleError(f"sample rate of {rate} Hz has too little in common with {wanted} Hz; resample the file")
