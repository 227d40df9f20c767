"""In which shape a picture reaches its encoder: a square, or patches of its own aspect.

Shape legend: H, W pixels, N patches of a picture, v values of a patch, n pictures, L patches of the longest.
"""

from typing import Protocol

import torch
from PIL import Image
from timm.data.naflex_transforms import get_image_size_for_seq, patchify_image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import v2 as transforms

from mmfuse.types import Features


class PictureShape(Protocol):
    """Sizes, and pixels as features."""

    keeps_aspect: bool
    """Whether random crops are around the picture's own aspect, not around a square."""

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture or crop of this size is scaled to."""
        ...

    def show(self, picture: Image.Image) -> Image.Image:
        """What evaluation sees of a picture."""
        ...

    def features(self, pixels: Tensor) -> Features:
        """Of uint8 `(3, H, W)` in the target's size."""
        ...

    def collate(self, features: list[Features]) -> Features: ...


class Square:
    """A square of so many pixels a side."""

    keeps_aspect = False

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.show = transforms.Compose(
            [transforms.Resize(image_size, antialias=True), transforms.CenterCrop(image_size)]
        )

    def target(self, width: int, height: int) -> tuple[int, int]:
        return self.image_size, self.image_size

    def features(self, pixels: Tensor) -> Features:
        """`pixels` as they are."""
        return {"pixels": pixels}

    def collate(self, features: list[Features]) -> Features:
        """`pixels` uint8 `(n, 3, H, W)`."""
        return {"pixels": torch.stack([item["pixels"] for item in features])}


class Native:
    """As many whole patches as fit a budget, in the picture's own aspect (NaViT, Dehghani et al. 2023, arXiv
    2307.06304)."""

    keeps_aspect = True

    def __init__(self, patch_size: tuple[int, int], max_patches: int) -> None:
        self.patch_size, self.max_patches = patch_size, max_patches

    def target(self, width: int, height: int) -> tuple[int, int]:
        _, (rows, columns) = get_image_size_for_seq((height, width), self.patch_size, self.max_patches)
        return columns, rows

    def show(self, picture: Image.Image) -> Image.Image:
        """All of it."""
        width, height = self.target(*picture.size)
        return transforms.Resize([height, width], antialias=True)(picture)

    def features(self, pixels: Tensor) -> Features:
        """`patches` uint8 `(N, v)`, row by row, a pixel's channels together; `place (N, 2)`: row and column of each."""
        patches, place, _ = patchify_image(pixels, self.patch_size)
        return {"patches": patches, "place": place}

    def collate(self, features: list[Features]) -> Features:
        """Padded to the most: `patches` uint8 `(n, L, v)`, `place (n, L, 2)`, `real` bool `(n, L)`."""
        counts = torch.tensor([len(item["patches"]) for item in features])
        padded = {name: pad_sequence([item[name] for item in features], batch_first=True) for name in features[0]}
        return {**padded, "real": torch.arange(int(counts.max())) < counts[:, None]}
