"""Masked audio modelling with cross-modal context (`patches/masked_patches.py`)."""

from typing import ClassVar

from pydantic import Field

from mmfuse.objectives.patches.masked_patches import MaskedPatchesConfig


class Config(MaskedPatchesConfig):
    """Masked audio modelling."""

    modality: ClassVar[str] = "audio"
    mask_ratio: float = Field(default=0.5, gt=0, lt=1)
    """Share of the time steps that are hidden, in all mel bins, and predicted."""
