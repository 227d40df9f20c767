"""Masked image modelling with cross-modal context (`patches/masked_patches.py`)."""

from typing import ClassVar

from pydantic import Field

from mmfuse.objectives.patches.masked_patches import MaskedPatchesConfig


class Config(MaskedPatchesConfig):
    """Masked image modelling."""

    modality: ClassVar[str] = "image"
    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    """Share of the patches that are hidden and predicted."""
