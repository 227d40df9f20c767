"""Pictures are the right side up, on white, and changed at random as torchvision changes them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms
from unit.modalities.members import photograph, picture_file

from mmfuse.modalities import image
from mmfuse.randomness import seeded_torch

SETTLED = image.AugmentConfig(min_scale=1, flip=False, color_jitter=0)
# What a camera that was held so would have stored: the inverse of what sets it upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def pixels_of(data: bytes, *, seed: int | None = None, size: int = 32, **augment) -> torch.Tensor:
    return image.Config(image_size=size, augment=image.AugmentConfig(**augment)).build_processor()(data, seed=seed)[
        "pixels"
    ]


@pytest.mark.parametrize("orientation", STORED)
def test_a_photograph_is_upright_and_augmented_as_if_it_had_been_stored_so(orientation):
    upright, exif = photograph(60, 40), Image.Exif()
    exif[0x0112] = orientation
    method = STORED[orientation]
    stored = upright if method is None else upright.transpose(method)
    for kind, settings in (("PNG", {}), ("WEBP", {"lossless": True})):
        for seed in (None, 1, 2):
            turned = pixels_of(picture_file(stored, kind, exif=exif, **settings), seed=seed)
            assert torch.equal(turned, pixels_of(picture_file(upright), seed=seed))
    for seed in (None, 1, 2):
        jpeg = pixels_of(picture_file(stored, "JPEG", exif=exif, quality=95), seed=seed).int()
        assert (jpeg - pixels_of(picture_file(upright), seed=seed).int()).abs().float().mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_unreadable_exif_is_no_unreadable_picture(kind):
    plain, exif = picture_file(photograph(60, 40), kind), Image.Exif()
    exif[0x0112] = 6
    whole, header = picture_file(photograph(60, 40), kind, exif=exif), exif.tobytes()[6:10]
    broken = whole.replace(header, b"XX" + header[2:])
    assert not torch.equal(pixels_of(whole), pixels_of(plain)) and broken != whole
    for seed in (None, 1):
        assert torch.equal(pixels_of(broken, seed=seed), pixels_of(plain, seed=seed))


def flat(mode: str, color) -> Image.Image:
    return Image.new(mode, (50, 40), color)


def test_every_kind_of_picture_becomes_the_rgb_that_an_eye_sees():
    deep = Image.fromarray(np.full((40, 50), 0x80FF, dtype=np.uint16))
    palette = flat("P", 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    for data, expected in (
        (picture_file(deep), (0x80, 0x80, 0x80)),
        (picture_file(flat("1", 1)), (255, 255, 255)),
        (picture_file(flat("L", 90)), (90, 90, 90)),
        (picture_file(flat("LA", (90, 0))), (255, 255, 255)),
        (picture_file(flat("RGBA", (200, 100, 0, 255))), (200, 100, 0)),
        (picture_file(flat("RGBA", (200, 100, 0, 0))), (255, 255, 255)),
        (picture_file(flat("RGBA", (200, 100, 0, 51)), "WEBP", lossless=True), (244, 224, 204)),
        (picture_file(palette), (0, 0, 255)),
        (picture_file(palette, transparency=1), (255, 255, 255)),
        (picture_file(flat("RGB", (9, 9, 9)), transparency=(9, 9, 9)), (255, 255, 255)),
        (picture_file(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    ):
        for pixels in (pixels_of(data), pixels_of(data, seed=3, flip=True, color_jitter=0)):
            difference = pixels.int() - torch.tensor(expected).view(3, 1, 1)
            assert difference.abs().max() <= 2, expected


@pytest.mark.parametrize("size", [(200, 150), (90, 400), (700, 60)])
def test_crops_and_colors_are_torchvision_s_pixel_for_pixel(size):
    picture = photograph(*size)
    for scale, strength in ((0.5, 0.2), (0.08, 1.0)):
        reference = transforms.Compose(
            [
                transforms.RandomResizedCrop(48, scale=(scale, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(strength, strength, strength),
                transforms.PILToTensor(),
            ]
        )
        for seed in range(20):
            with seeded_torch(seed):
                expected = reference(picture)
            found = pixels_of(picture_file(picture), seed=seed, size=48, min_scale=scale, color_jitter=strength)
            assert torch.equal(found, expected)


def test_evaluation_decodes_large_jpegs_in_full_and_training_almost_equals_that():
    for picture in (photograph(640, 480, cells=60), photograph(480, 640, cells=60)):
        data = picture_file(picture, "JPEG", quality=90)
        in_full = Image.open(io.BytesIO(data))
        expected = transforms.CenterCrop(96)(transforms.Resize(96)(in_full))
        assert torch.equal(pixels_of(data, size=96), transforms.functional.pil_to_tensor(expected))
        for seed in range(10):
            scaled, full = (pixels_of(each, size=96, seed=seed).int() for each in (data, picture_file(in_full)))
            difference = (scaled - full).abs().float().mean()
            assert 0 < difference < 3, "0: nothing was saved; more: another crop"


def test_jpegs_are_not_decoded_smaller_than_their_crop_needs():
    picture = photograph(190, 190, cells=60)  # no crop of half of it is twice as large as 96
    data = picture_file(picture, "JPEG")
    in_full = picture_file(Image.open(io.BytesIO(data)))
    for seed in range(10):
        assert torch.equal(pixels_of(data, size=96, seed=seed), pixels_of(in_full, size=96, seed=seed))


def test_without_any_augmentation_training_sees_what_evaluation_sees():
    plain = image.Config(image_size=32, augment=SETTLED).build_processor()
    for size in ((60, 60), (200, 60), (60, 200), (300, 200)):
        data = picture_file(photograph(*size), "JPEG")
        assert torch.equal(*(plain(data, seed=seed)["pixels"] for seed in (None, 5)))
