"""Batches of random samples with any subset of the modalities, and tiny models for them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from helpers import TINY_MODALITIES

from mmfuse.config import find_plugin
from mmfuse.data.collate import collate_samples
from mmfuse.distributed import slice_of_rank
from mmfuse.model.model import ModelConfig
from mmfuse.objectives.base import ObjectiveConfig
from mmfuse.task import Task
from mmfuse.types import Batch, Features, Sample

LETTERS = {"t": "text", "i": "image", "a": "audio"}
ALL_OBJECTIVES = (
    "contrastive",
    "matching",
    "masked_language",
    "leave_one_out",
    "feature_prediction",
    "masked_image",
    "masked_audio",
    "next_sentence",
)
CLS, SEP, FIRST_WORD = 2, 3, 5
"""Ids of the tiny vocabulary."""


def tiny_model(letters: str = "tia", **changes: Any) -> ModelConfig:
    """Encoders of one narrow layer and, unless `changes` say otherwise, one layer of fusion."""
    modalities = {LETTERS[letter]: TINY_MODALITIES[LETTERS[letter]] for letter in letters}
    settings = {"width": 16, "embedding_dim": 8, "fusion": {"num_layers": 1, "num_heads": 2}}
    return ModelConfig.model_validate({"modalities": modalities, **settings, **changes})


def objective_configs(
    names: Sequence[str] = ALL_OBJECTIVES, **settings: Mapping[str, Any]
) -> dict[str, ObjectiveConfig]:
    """Objectives with their defaults, or with the settings given by name."""
    return {name: find_plugin("mmfuse.objectives", name).Config(**settings.get(name, {})) for name in names}


def tiny_task(
    objectives: Sequence[str] = ALL_OBJECTIVES, *, settings: Mapping[str, Any] | None = None, **changes: Any
) -> Task:
    """A task in fp64, always with the same weights; `settings` are those of each objective, `changes` the model's."""
    configs = objective_configs(objectives, **dict.fromkeys(objectives, settings or {}))
    return Task(tiny_model(**changes), configs, seed=5).double()


def make_samples(presence: str, *, groups: Sequence[int] | None = None) -> list[Sample]:
    """Samples 0, 1, ...: `"tia ti -"` is one with all three modalities, one without sound, one without anything.

    What a sample holds depends on its number alone. Without `groups` each is a group of its own.
    """
    patterns = presence.split()
    return [
        Sample(
            sample_id=number,
            group_id=100 + number if groups is None else groups[number],
            key=str(number),
            features={
                name: random_features(name, seed=number) for letter, name in LETTERS.items() if letter in pattern
            },
        )
        for number, pattern in enumerate(patterns)
    ]


def random_features(modality: str, *, seed: int) -> Features:
    """What the tiny processors could make of a member; lengths differ from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    if modality == "text":
        words = torch.randint(
            FIRST_WORD, 6368, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator
        )
        end = torch.tensor([SEP])
        others = words.flip(0)[: seed % 3]  # every third text is one sentence
        ids = torch.cat([torch.tensor([CLS]), words, end, others, end[: len(others)]])
        return {"input_ids": ids, "second": torch.tensor(len(words) + 2)}
    if modality == "image":
        return {"pixels": torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8)}
    frames = int(torch.randint(5, 33, (), generator=generator))
    return {"fbank": torch.randn(frames, 16, generator=generator)}


@functools.cache
def tiny_processors() -> dict[str, Any]:
    return {name: config.build_processor() for name, config in tiny_model().modality_configs.items()}


def make_batch(
    samples: str | Sequence[Sample], *, letters: str = "tia", step: int = 3, rank: int = 0, world_size: int = 1
) -> Batch:
    """A rank's part of the global batch of these samples, or of `make_samples` of a pattern."""
    everyone = make_samples(samples) if isinstance(samples, str) else list(samples)
    processors = {LETTERS[letter]: tiny_processors()[LETTERS[letter]] for letter in letters}
    own = everyone[slice_of_rank(len(everyone), rank=rank, world_size=world_size)]
    return collate_samples(own, processors, step=step, global_rows=len(everyone))
