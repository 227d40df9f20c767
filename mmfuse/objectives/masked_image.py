"""Masked image modelling with cross-modal context (`patches/masked_patches.py`)."""

from pydantic import Field

from mmfuse.model.model import ModelConfig
from mmfuse.objectives.base import Need, ObjectiveConfig
from mmfuse.objectives.patches.masked_patches import MaskedPatches


class Config(ObjectiveConfig):
    """Masked image modelling."""

    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    """Share of the patches that are hidden and predicted."""

    def needs(self, name: str, modalities: tuple[str, ...]) -> list[Need]:
        return [Need(name, (frozenset({"image"}),))]

    def build(self, model: ModelConfig, *, seed: int) -> MaskedPatches:
        return MaskedPatches("masked_image", model, modality="image", mask_ratio=self.mask_ratio, seed=seed)
