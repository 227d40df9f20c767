"""Image: JPEG, PNG or WebP -> uint8 pixels -> a timm Vision Transformer."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, PositiveInt, model_validator
from timm.models._hub import save_config_for_hf
from torch import Generator, Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from mmfuse.config import Settings
from mmfuse.errors import ConfigError
from mmfuse.modalities.base import ModalityConfig, PatchEncoder, Processor
from mmfuse.modalities.image_encoders.naflex import NaFlexEncoder
from mmfuse.modalities.media.class_tokens import has_class_token
from mmfuse.modalities.media.given import picture_to_bytes
from mmfuse.modalities.media.picture_shapes import Native, PictureShape, Square
from mmfuse.modalities.media.pictures import DrawsFrom, crop_at_random, jitter_colors, load_upright, open_picture
from mmfuse.types import EncoderOutput, Features

EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_GREY = 128
_BILINEAR = InterpolationMode.BILINEAR
_RAND_AUGMENT_OPERATIONS = 2


class AugmentConfig(Settings):
    """Training-time transform, seeded by sample; applied in this order."""

    min_scale: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the picture that a random resized crop keeps; 1 turns cropping off."""
    flip: bool = True
    """Mirror half of the pictures."""
    color_jitter: float = Field(default=0.2, ge=0, le=1)
    """Strength of random brightness, contrast and saturation; 0 turns it off."""
    rand_augment_magnitude: int = Field(default=0, ge=0, le=30)
    """RandAugment (Cubuk et al. 2020): strength, out of 30, of two random operations; 0 turns it off."""
    trivial_augment: bool = False
    """TrivialAugment (Mueller and Hutter 2021): one random operation of random strength. Not with RandAugment."""
    erase: float = Field(default=0.0, ge=0, lt=1)
    """Random erasing (Zhong et al. 2020): largest share of the picture that turns grey; 0 turns it off."""

    @model_validator(mode="after")
    def _check_one_policy(self) -> "AugmentConfig":
        if self.trivial_augment and self.rand_augment_magnitude:
            raise ValueError(
                f"trivial_augment = true and rand_augment_magnitude = {self.rand_augment_magnitude} exclude each other"
            )
        return self


class Config(ModalityConfig):
    """Any timm model with token features; without `pretrained` a ViT of the sizes given here."""

    architecture: str = "vit_tiny_patch16_224"
    """timm's name of the model family, or `local-dir:FOLDER`; patch size, structure and normalisation come from it."""
    pretrained: str | Literal[True] | None = None
    """True for timm's own weights of `architecture` (from the hub), or a local checkpoint file."""
    image_size: PositiveInt = 96
    """Pixels a side after the crop; not with `max_patches`."""
    max_patches: PositiveInt | None = None
    """Pictures keep their aspect and are scaled to at most so many patches; for `naflexvit_...` of timm, which needs
    it."""
    hidden_size: PositiveInt | None = None
    """Null: the architecture's own; so for the next two."""
    num_layers: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    max_pixels: PositiveInt = 64_000_000
    """Larger pictures are refused before they are decoded."""
    augment: AugmentConfig = AugmentConfig()

    def build_processor(self) -> Processor:
        return ImageProcessor(self)

    def build_encoder(self) -> "ImageEncoder | NaFlexEncoder":
        if self.max_patches is None:
            return ImageEncoder(self)
        vit = self.build_vit()
        vit.reset_classifier(0, "")  # afterwards: pretrained weights have a pooling
        return NaFlexEncoder(vit, pooling=self.pooling)

    def build_vit(self, **changes: Any) -> Any:
        """timm's model without a classifier.

        Raises:
            ConfigError: the class token is asked for, and it has none.
        """
        sizes: dict[str, Any] = {"embed_dim": self.hidden_size, "depth": self.num_layers, "num_heads": self.num_heads}
        local = {"file": self.pretrained} if isinstance(self.pretrained, str) else None
        vit: Any = timm.create_model(
            self.architecture,
            pretrained=self.pretrained is not None,
            pretrained_cfg_overlay=local,
            num_classes=0,
            **changes,
            **{name: size for name, size in sizes.items() if size is not None},
        )
        if self.pooling == "cls" and not has_class_token(vit):
            raise ConfigError(f"image.pooling = cls: {self.architecture} has no class token; set it to mean")
        return vit

    def build_shape(self) -> PictureShape:
        """In which pictures reach the encoder.

        Raises:
            ConfigError: `max_patches` for an architecture that takes squares alone, or none for one that does not.
        """
        embeds = getattr(_on_meta(self.architecture), "embeds", None)
        if embeds is None and self.max_patches is None:
            return Square(self.image_size)
        if embeds is not None and self.max_patches is not None:
            return Native(embeds.patch_size, self.max_patches)
        raise ConfigError(
            f"image.architecture = {self.architecture}: image.max_patches = {self.max_patches}; "
            "naflexvit_... needs a number of patches, other models take squares of image_size"
        )

    def save_files(self, folder: Path) -> None:
        save_config_for_hf(_on_meta(self.architecture), str(folder / "config.json"))

    def with_files(self, folder: Path) -> Self:
        return self.model_copy(update={"architecture": f"local-dir:{folder}", "pretrained": None})

    def count_patch_values(self) -> int | None:
        return _count_patch_values(self.architecture)


@functools.cache
def _on_meta(architecture: str) -> Any:
    """The structure alone; timm tells the size of a patch by building the model."""
    with torch.device("meta"):
        return timm.create_model(architecture)


def _count_patch_values(architecture: str) -> int | None:
    vit = _on_meta(architecture)
    if embeds := getattr(vit, "embeds", None):
        return 3 * embeds.patch_size[0] * embeds.patch_size[1]
    embed = getattr(vit, "patch_embed", None)
    size, image, grid = (getattr(embed, name, None) for name in ("patch_size", "img_size", "grid_size"))
    if not (isinstance(size, tuple) and isinstance(image, tuple) and isinstance(grid, tuple)):
        return None
    fits = all(pixels // patch == count for pixels, patch, count in zip(image, size, grid, strict=True))
    return 3 * size[0] * size[1] if fits else None  # patches of a hybrid are of its convolutions' features


class ImageProcessor:
    """Encoded picture -> uint8 pixels, or patches of them; normalisation is the encoder's, on the device."""

    def __init__(self, config: Config) -> None:
        self.shape, self.max_pixels = config.build_shape(), config.max_pixels
        self.augment, self.policies = config.augment, _policies(config.augment)

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        picture = open_picture(data, max_pixels=self.max_pixels, image_size=self.shape.target(1, 1)[0])
        if seed is not None:
            return self.shape.features(self._augmented(picture, torch.Generator().manual_seed(seed)))
        return self.shape.features(transforms.functional.pil_to_tensor(self.shape.show(load_upright(picture))))

    def to_bytes(self, value: Any) -> bytes:
        """Of a path, a PIL picture, or uint8 of NumPy `(H, W, 3)` or `(H, W)`, of torch `(3, H, W)` or `(1, H, W)`."""
        return picture_to_bytes(value)

    def collate(self, features: list[Features]) -> Features:
        """Encoder inputs of n rows."""
        return self.shape.collate(features)

    def _augmented(self, picture: Image.Image, generator: Generator) -> Tensor:
        augment = self.augment
        if augment.min_scale < 1:
            picture = crop_at_random(picture, self.shape, min_scale=augment.min_scale, generator=generator)
        else:
            picture = self.shape.show(load_upright(picture))
        if augment.flip and torch.rand(1, generator=generator) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augment.color_jitter:
            picture = jitter_colors(picture, strength=augment.color_jitter, generator=generator)
        if self.policies is None:
            return transforms.functional.pil_to_tensor(picture)
        with DrawsFrom(generator):
            return self.policies(picture)


def _policies(augment: AugmentConfig) -> transforms.Compose | None:
    """Picture to pixels through the augmentations that torchvision does for us; None where all are off."""
    steps: list[nn.Module] = []
    if augment.rand_augment_magnitude:
        steps.append(
            transforms.RandAugment(
                _RAND_AUGMENT_OPERATIONS, augment.rand_augment_magnitude, interpolation=_BILINEAR, fill=_GREY
            )
        )
    if augment.trivial_augment:
        steps.append(transforms.TrivialAugmentWide(interpolation=_BILINEAR, fill=_GREY))
    steps.append(transforms.PILToTensor())
    if augment.erase:
        steps.append(transforms.RandomErasing(p=1, scale=(0, augment.erase), value=_GREY))
    return transforms.Compose(steps) if len(steps) > 1 else None


class ImageEncoder(PatchEncoder):
    """`pixels` uint8 `(n, 3, H, W)` -> all tokens of a timm ViT, class token first."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        vit = config.build_vit(img_size=config.image_size, global_pool="")  # every token instead of a pooled vector
        self.vit: nn.Module = vit
        self.width = int(vit.num_features)
        self.image_size = config.image_size
        self.pooling = config.pooling
        self.num_prefix_tokens = int(vit.num_prefix_tokens)
        # The model's own statistics: augreg ViTs expect 0.5, not ImageNet's.
        for name in ("mean", "std"):
            statistics = torch.tensor(vit.pretrained_cfg[name]).view(1, 3, 1, 1) * 255
            self.register_buffer(name, statistics, persistent=False)

    def forward(self, inputs: Features) -> EncoderOutput:
        pixels = self._normalise(inputs["pixels"])
        tokens = self.vit(pixels.to(next(self.vit.parameters()).dtype))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, self.num_prefix_tokens :].mean(1)
        return EncoderOutput(tokens, mask, pooled)

    def patches(self, inputs: Features) -> tuple[Tensor, Tensor]:
        """Row by row of the picture; the values of a patch are its pixels, channel after channel."""
        height, width = self._patch_size
        patches = F.unfold(self._normalise(inputs["pixels"]), (height, width), stride=(height, width)).transpose(1, 2)
        return patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)

    def hide(self, inputs: Features, hidden: Tensor) -> Features:
        pixels, (height, width) = inputs["pixels"].float(), self._patch_size
        grid = hidden.unflatten(1, (pixels.shape[2] // height, pixels.shape[3] // width))
        over = grid.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]
        # What is left of the last row and column is in no patch.
        over = F.pad(over, (0, pixels.shape[3] - over.shape[3], 0, pixels.shape[2] - over.shape[2]))
        return {**inputs, "pixels": torch.where(over, self.mean.float(), pixels)}

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.num_prefix_tokens :]

    @property
    def _patch_size(self) -> tuple[int, int]:
        embed: Any = self.vit.patch_embed
        return embed.patch_size

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean.float()) / self.std.float()

    def layers(self) -> Sequence[nn.Module]:
        return list(getattr(self.vit, "blocks", ()))  # so in all ViTs of timm

    def minimal_inputs(self, device: torch.device) -> Features:
        return {"pixels": torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=device)}
