"""Audio: WAV, FLAC, MP3, Ogg or Opus -> log-mel filter bank -> an Audio Spectrogram Transformer (Gong et al. 2021)."""

import io
import math

import soundfile
import torch
import torchaudio
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from transformers import ASTConfig, ASTModel

from mmfuse.config import Settings
from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities.base import Encoder, ModalityConfig, Processor, masked_mean
from mmfuse.types import EncoderOutput, Features

EXTENSIONS = ("wav", "flac", "mp3", "ogg", "opus")

_SPEED_STEPS = 20
_LARGEST_KERNEL = 2**24

FRAME_SHIFT_MS = 10
FRAME_LENGTH_MS = 25
# Mean and twice the standard deviation of AudioSet's filter banks: the normalisation of ASTFeatureExtractor.
AST_MEAN = -4.2677393
AST_TWICE_STD = 2 * 4.5689974


class AugmentConfig(Settings):
    """Training-time transform, seeded by sample."""

    speed: float = Field(default=0.1, ge=0, lt=0.5)
    """Largest relative change of speed (and with it of pitch), in steps of 0.05; 0 turns it off."""
    frequency_mask: float = Field(default=0.2, ge=0, lt=1)
    """SpecAugment (Park et al. 2019): widest masked band as a fraction of the mel bins."""
    time_mask: float = Field(default=0.1, ge=0, lt=1)
    """SpecAugment: longest masked stretch as a fraction of the clip's real frames."""


class Config(ModalityConfig):
    """AST of transformers; without `pretrained` of the sizes given here."""

    sample_rate: PositiveInt = 16_000
    """Every clip is resampled to this, in Hz."""
    clip_seconds: PositiveFloat = 2.56
    """Length of a clip; shorter ones are padded and masked, longer ones cropped (at a seeded offset in training)."""
    num_mel_bins: PositiveInt = 64
    pretrained: str | None = None
    """Local folder or hub id of an AST; the sizes below are then its own and must fit the clip."""
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
        if self.pretrained is None and self.patch_size > min(self.num_frames, self.num_mel_bins):
            raise ValueError(
                f"patch_size = {self.patch_size} does not fit {self.num_frames} frames (clip_seconds = "
                f"{self.clip_seconds}) of {self.num_mel_bins} mel bins"
            )
        return self

    @property
    def num_frames(self) -> int:
        """Frames of a full clip."""
        return round(self.clip_seconds * 1000) // FRAME_SHIFT_MS

    def build_processor(self) -> Processor:
        return AudioProcessor(self)

    def build_encoder(self) -> "AudioEncoder":
        return AudioEncoder(self)


class AudioProcessor:
    """Encoded sound -> `fbank (frames, mel)`, normalised as ASTFeatureExtractor does."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        config = self.config
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        rate, waveform = self._decode(data, generator)
        if not len(waveform):
            raise SampleError("the sound is empty")
        waveform = torchaudio.functional.resample(waveform, rate, config.sample_rate)
        if generator is not None:
            # By the ratio: torchaudio's kernel grows with both rates, 500 MB for 22,050 and 23,152 Hz.
            faster = _random_speed(config.augment.speed, generator)
            waveform = torchaudio.functional.resample(waveform, _SPEED_STEPS + faster, _SPEED_STEPS)
        shortest = config.sample_rate * FRAME_LENGTH_MS // 1000
        if len(waveform) < shortest:
            raise SampleError(f"sound of {len(waveform)} values is shorter than one frame of {FRAME_LENGTH_MS} ms")
        fbank = torchaudio.compliance.kaldi.fbank(
            waveform[None],
            sample_frequency=config.sample_rate,
            num_mel_bins=config.num_mel_bins,
            frame_length=FRAME_LENGTH_MS,
            frame_shift=FRAME_SHIFT_MS,
            window_type="hanning",
            htk_compat=True,
            use_energy=False,
            dither=0.0,
        )
        fbank = (fbank[: config.num_frames] - AST_MEAN) / AST_TWICE_STD
        if not torch.isfinite(fbank).all():
            raise SampleError("the sound has values that are not finite, or too large")
        if generator is not None:
            fbank = _mask_bands(fbank, config.augment, generator)
        return {"fbank": fbank}

    def collate(self, features: list[Features]) -> Features:
        """`fbank (n, frames, mel)` padded with zeros to the full clip, `frames` int64 `(n,)` real ones."""
        frames = torch.tensor([len(item["fbank"]) for item in features])
        fbank = torch.zeros(len(features), self.config.num_frames, self.config.num_mel_bins)
        for row, item in zip(fbank, features, strict=True):
            row[: len(item["fbank"])] = item["fbank"]
        return {"fbank": fbank, "frames": frames}

    def _decode(self, data: bytes, generator: torch.Generator | None) -> tuple[int, Tensor]:
        """Sample rate and mono waveform `(values,)` of one clip; only the clip is decoded, not the recording."""
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as sound:
                seconds = sound.frames / sound.samplerate
                if seconds > self.config.max_seconds:
                    raise SampleError(f"recording of {seconds:.0f} s exceeds max_seconds = {self.config.max_seconds}")
                _check_rate(sound.samplerate, self.config.sample_rate)
                # 1.5 clips: enough for the fastest speed.
                wanted = int(1.5 * self.config.clip_seconds * sound.samplerate)
                surplus = sound.frames - wanted
                if generator is not None and surplus > 0:
                    sound.seek(int(torch.randint(surplus + 1, (), generator=generator)))
                values = sound.read(wanted, dtype="float32", always_2d=True)
                rate = sound.samplerate
        except soundfile.LibsndfileError as error:
            raise SampleError(f"not a readable WAV, FLAC, MP3, Ogg or Opus sound: {error}") from error
        return rate, torch.from_numpy(values).mean(1)


class AudioEncoder(Encoder):
    """`fbank (n, frames, mel)`, `frames (n,)` -> AST's patch tokens, averaged over frequency."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ast = _build_ast(config)
        ast = self.ast.config
        self.width = ast.hidden_size
        self.pooling = config.pooling
        self.num_frames, self.num_mel_bins = config.num_frames, config.num_mel_bins
        self.patch_size, self.time_stride = ast.patch_size, ast.time_stride
        self.frequency_patches, self.time_patches = self.ast.embeddings.get_shape(ast)

    def forward(self, inputs: Features) -> EncoderOutput:
        fbank, frames = inputs["fbank"], inputs["frames"]
        # A patch is real where its first frame is. AST masks patches, not frames; its two class tokens are always real.
        starts = torch.arange(self.time_patches, device=frames.device) * self.time_stride
        mask = starts < frames[:, None]
        attention_mask = torch.cat([mask.new_ones(len(mask), 2), mask.repeat(1, self.frequency_patches)], dim=1)
        fbank = fbank.to(next(self.ast.parameters()).dtype)
        output = self.ast(input_values=fbank, attention_mask=attention_mask.long())
        patches = output.last_hidden_state[:, 2:].unflatten(1, (self.frequency_patches, self.time_patches))
        tokens = patches.mean(1)
        pooled = output.pooler_output if self.pooling == "cls" else masked_mean(tokens, mask)
        return EncoderOutput(tokens, mask, pooled)

    def minimal_inputs(self, device: torch.device) -> Features:
        fbank = torch.zeros(1, self.num_frames, self.num_mel_bins, device=device)
        return {"fbank": fbank, "frames": torch.ones(1, dtype=torch.int64, device=device)}


def _build_ast(config: Config) -> ASTModel:
    if config.pretrained:
        ast = ASTModel.from_pretrained(config.pretrained)
        if (ast.config.max_length, ast.config.num_mel_bins) != (config.num_frames, config.num_mel_bins):
            seconds, bins = ast.config.max_length * FRAME_SHIFT_MS / 1000, ast.config.num_mel_bins
            raise ConfigError(f"audio: {config.pretrained} needs clip_seconds = {seconds} and num_mel_bins = {bins}")
        return ast
    ast = ASTModel(
        ASTConfig(
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
    )
    # transformers leaves these at 0, where the first norm makes gradients 10^6 times too large; the authors do this.
    embeddings = ast.embeddings
    for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        torch.nn.init.trunc_normal_(parameter, std=0.02)
    return ast


def _check_rate(rate: int, wanted: int) -> None:
    """Refuses rates that would take torchaudio's resampling minutes or all memory: 12 GB from 192,001 to 16,000 Hz."""
    kernel = math.lcm(rate, wanted) // math.gcd(rate, wanted)
    if kernel > _LARGEST_KERNEL:
        raise SampleError(f"sample rate of {rate} Hz has too little in common with {wanted} Hz; resample the file")


def _random_speed(largest: float, generator: torch.Generator) -> int:
    """A relative change in twentieths: few ratios, so that torchaudio's resampling kernels stay small."""
    steps = round(largest * _SPEED_STEPS)
    return int(torch.randint(2 * steps + 1, (), generator=generator)) - steps


def _mask_bands(fbank: Tensor, augment: AugmentConfig, generator: torch.Generator) -> Tensor:
    """`fbank (frames, mel)` with one band of bins and one stretch of frames set to the mean (0 after normalising)."""
    fbank = fbank.clone()
    for dim, fraction in ((0, augment.time_mask), (1, augment.frequency_mask)):
        length = fbank.shape[dim]
        width = int(torch.randint(int(fraction * length) + 1, (), generator=generator))
        start = int(torch.randint(length - width + 1, (), generator=generator))
        fbank.narrow(dim, start, width).zero_()
    return fbank
