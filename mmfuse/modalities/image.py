"""Image: JPEG, PNG or WebP -> uint8 pixels -> a timm Vision Transformer."""

import io
import warnings
from typing import Any, Literal

import timm
import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

from mmfuse.config import Settings
from mmfuse.errors import SampleError
from mmfuse.modalities.base import Encoder, ModalityConfig, Processor
from mmfuse.randomness import seeded_torch
from mmfuse.types import EncoderOutput, Features

EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class AugmentConfig(Settings):
    """Training-time transform, seeded by sample."""

    min_scale: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the picture that a random resized crop keeps; 1 turns cropping off."""
    flip: bool = True
    """Mirror half of the pictures."""
    color_jitter: float = Field(default=0.2, ge=0, le=1)
    """Strength of random brightness, contrast and saturation; 0 turns it off."""


class Config(ModalityConfig):
    """Any timm model with token features; without `pretrained` a ViT of the sizes given here."""

    architecture: str = "vit_tiny_patch16_224"
    """timm's name of the model family; patch size and structure come from it."""
    pretrained: str | Literal[True] | None = None
    """True for timm's own weights of `architecture` (from the hub), or a local checkpoint file."""
    image_size: PositiveInt = 96
    """Pixels a side after the crop."""
    hidden_size: PositiveInt | None = None
    """Null: the architecture's own; so for the next two."""
    num_layers: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    max_pixels: PositiveInt = 64_000_000
    """Larger pictures are refused before they are decoded."""
    augment: AugmentConfig = AugmentConfig()

    def build_processor(self) -> Processor:
        return ImageProcessor(self)

    def build_encoder(self) -> "ImageEncoder":
        return ImageEncoder(self)


class ImageProcessor:
    """Encoded picture -> `pixels` uint8 `(3, H, W)`; normalisation is the encoder's, on the device."""

    def __init__(self, config: Config) -> None:
        self.image_size, self.max_pixels = config.image_size, config.max_pixels
        size, augment = config.image_size, config.augment
        steps: list[nn.Module] = [transforms.RandomResizedCrop(size, scale=(augment.min_scale, 1.0), antialias=True)]
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        if augment.color_jitter:
            steps.append(transforms.ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))
        self.train_transform = transforms.Compose(steps)
        self.eval_transform = transforms.Compose([transforms.Resize(size, antialias=True), transforms.CenterCrop(size)])

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        picture = self._decode(data)
        if seed is None:
            picture = self.eval_transform(picture)
        else:
            with seeded_torch(seed):  # torchvision draws from torch's global generator
                picture = self.train_transform(picture)
        return {"pixels": transforms.functional.pil_to_tensor(picture)}

    def collate(self, features: list[Features]) -> Features:
        """`pixels` uint8 `(n, 3, H, W)`."""
        return {"pixels": torch.stack([item["pixels"] for item in features])}

    def _decode(self, data: bytes) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
                picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
                if picture.width * picture.height > self.max_pixels:
                    size = f"{picture.width} x {picture.height}"
                    raise SampleError(f"picture of {size} pixels exceeds max_pixels = {self.max_pixels}")
                # What evaluation would make of it: 60,000 x 1 pixels become 5,760,000 x 96.
                if self.image_size**2 * max(picture.size) > self.max_pixels * min(picture.size):
                    raise SampleError(f"picture of {picture.width} x {picture.height} pixels is too thin")
                return picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SampleError(f"not a readable JPEG, PNG or WebP picture: {error}") from error


class ImageEncoder(Encoder):
    """`pixels` uint8 `(n, 3, H, W)` -> all tokens of a timm ViT, class token first."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "embed_dim": config.hidden_size,
            "depth": config.num_layers,
            "num_heads": config.num_heads,
        }
        local = {"file": config.pretrained} if isinstance(config.pretrained, str) else None
        vit: Any = timm.create_model(
            config.architecture,
            pretrained=config.pretrained is not None,
            pretrained_cfg_overlay=local,
            img_size=config.image_size,
            num_classes=0,
            global_pool="",  # every token instead of a pooled vector
            **{name: size for name, size in sizes.items() if size is not None},
        )
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
        pixels = (inputs["pixels"].float() - self.mean.float()) / self.std.float()
        tokens = self.vit(pixels.to(next(self.vit.parameters()).dtype))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, self.num_prefix_tokens :].mean(1)
        return EncoderOutput(tokens, mask, pooled)

    def minimal_inputs(self, device: torch.device) -> Features:
        return {"pixels": torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=device)}
