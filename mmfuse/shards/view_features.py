"""What a model sees of a member, as HTML: the same processors as in training, with and without augmentation."""

import io
from collections.abc import Mapping
from html import escape

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from mmfuse.config import find_plugin
from mmfuse.data.captions import choose_caption
from mmfuse.data.recipe import MemberRule
from mmfuse.errors import SampleError
from mmfuse.hashing import hash_int
from mmfuse.modalities.base import ModalityConfig, Processor
from mmfuse.modalities.text import TextProcessor
from mmfuse.pages import data_uri
from mmfuse.shards.findings import describe_error

_MAX_SIDE = 224
_MAX_TOKENS = 64
_COLORS = (255 * colormaps["magma"](np.linspace(0, 1, 256))[:, :3]).astype(np.uint8)
_BLACK, _WHITE = -1.2, 1.0
"""Range of a normalised filter bank that the colors span; speech lies between -1.3 and 0.8."""


class FeatureViews:
    """Processors of the modalities, and how their features are shown."""

    def __init__(self, rules: Mapping[str, MemberRule], configs: Mapping[str, ModalityConfig]) -> None:
        """Modalities without a config have their defaults."""
        torch.set_num_threads(1)
        self.rules = rules
        self.processors: dict[str, Processor] = {
            modality: (configs.get(modality) or find_plugin("mmfuse.modalities", modality).Config()).build_processor()
            for modality in rules
        }

    def show(self, modality: str, data: bytes, *, key: str, augmentations: int) -> str:
        """Evaluation's transform of a member, then so many of training's, or why there is none.

        Args:
            key: with the number of the augmentation it makes the seed.
        """
        names: dict[str, list[str]] = {}
        for number in range(augmentations + 1):
            seed = hash_int("view", key, modality, number) if number else None
            try:
                caption = choose_caption(data, self.rules[modality], seed=seed)
                features = self.processors[modality](caption, seed=seed)
            except SampleError as error:
                return f'<p class="bad">{escape(describe_error(error))}</p>'
            shown = "".join(self._show(modality, name, tensor) for name, tensor in features.items() if tensor.ndim)
            names.setdefault(shown, []).append(str(number) if number else "evaluation")
        return "".join(
            f"<figure>{shown}<figcaption>{_name(numbers)}</figcaption></figure>" for shown, numbers in names.items()
        )

    def _show(self, modality: str, name: str, tensor: Tensor) -> str:
        if name == "pixels":
            return _show_picture(Image.fromarray(tensor.permute(1, 2, 0).numpy()), kind="pixels")
        if name == "fbank":
            return _show_picture(_paint(tensor.numpy()), kind="fbank")
        processor = self.processors[modality]
        if name == "input_ids" and isinstance(processor, TextProcessor):
            tokens = processor.tokenizer.convert_ids_to_tokens(tensor[:_MAX_TOKENS].tolist())
            return f'<div class="tokens">{"".join(f"<code>{escape(token)}</code>" for token in tokens)}</div>'
        return f"<code>{escape(name)} {tuple(tensor.shape)}</code>"


def _name(numbers: list[str]) -> str:
    """`evaluation` and the numbers of training's draws that look alike, in words."""
    draws = [number for number in numbers if number != "evaluation"]
    return " and ".join([*numbers[: len(numbers) - len(draws)], *(["training " + ", ".join(draws)] if draws else [])])


def _paint(fbank: np.ndarray) -> Image.Image:
    """Time to the right, frequency upwards, louder is brighter."""
    levels = np.clip((fbank.T[::-1] - _BLACK) / (_WHITE - _BLACK), 0, 1)
    picture = Image.fromarray(_COLORS[(255 * levels).astype(np.uint8)])
    return picture.resize((max(1, fbank.shape[0]), 2 * fbank.shape[1] if fbank.shape[1] < 100 else fbank.shape[1]))


def _show_picture(picture: Image.Image, *, kind: str) -> str:
    picture.thumbnail((2 * _MAX_SIDE, _MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return f'<img class="{kind}" src="{data_uri("image/jpeg", file.getvalue())}" alt="">'
