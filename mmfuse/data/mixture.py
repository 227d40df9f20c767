"""A mixture: weighted sources, and the table that says whose turn it is."""

from collections.abc import Sequence

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mmfuse.config import Settings
from mmfuse.data.recipe import load_recipe
from mmfuse.data.source import Source
from mmfuse.errors import ConfigError

PERIOD = 65_536
"""Slots of the blend table; a weight is met to 1 part in this many."""


class SourceConfig(Settings):
    """A recipe's place in a mixture."""

    recipe: str
    """Name in `data_shards/recipes`, or a path to a YAML file."""
    split: str = "train"
    weight: PositiveFloat | None = None
    """Share of the samples drawn, relative to the other sources; null for all means: by their sizes."""


class DataConfig(Settings):
    """What is learned from and what is evaluated on."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: dict[str, SourceConfig] = Field(default={})
    """Evaluation sets by the name that the report gives them."""
    lanes: PositiveInt | None = None
    """Virtual ranks of the data plan, fixed for a run; null: the largest divisor of the global batch up to 64."""
    window_shards: PositiveInt = 8
    """Shards that a lane shuffles together; a source of no more shards than this is shuffled as a whole."""
    num_workers: NonNegativeInt = 2
    """Loader processes of each rank."""
    prefetch_batches: PositiveInt = 4
    """Batches that each worker keeps ready."""

    @model_validator(mode="after")
    def _weights_all_or_none(self) -> "DataConfig":
        if len({source.weight is None for source in self.train}) > 1:
            raise ValueError("give every source of data.train a weight, or none of them")
        names = [(source.recipe, source.split) for source in self.train]
        if len(set(names)) < len(names):
            raise ValueError("data.train names one source twice; add its weights up instead")
        return self


def open_source(config: SourceConfig, *, modalities: tuple[str, ...]) -> Source:
    """The source that a run names."""
    recipe, folder = load_recipe(config.recipe)
    return Source(recipe, config.split, folder=folder, modalities=modalities)


class Blend:
    """Which source each slot of a lane draws from, and how often it was drawn before: O(1) at any slot.

    The table holds integer counts that add up to PERIOD, each source's turns evenly spread. (Closed-form rounding of
    cumulative targets looks simpler and gives negative counts in every other blend.)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
        self.counts = np.floor(shares).astype(np.int64)
        largest_remainders = np.argsort(self.counts - shares, kind="stable")
        self.counts[largest_remainders[: PERIOD - self.counts.sum()]] += 1
        if (self.counts == 0).any():
            raise ConfigError(f"a weight is below 1/{PERIOD} of the sum: that source would never be drawn")
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        self.table = owners[np.argsort(turns, kind="stable")]
        before = np.zeros((PERIOD + 1, len(self.counts)), dtype=np.int64)
        before[1:] = np.cumsum(self.table[:, None] == np.arange(len(self.counts)), axis=0)
        self.before = before

    def sources(self, start: int, stop: int) -> np.ndarray:
        """The source of every slot in `[start, stop)`."""
        return self.table[np.arange(start, stop) % PERIOD]

    def drawn(self, slot: int) -> np.ndarray:
        """How often each source was drawn before `slot`."""
        periods, rest = divmod(slot, PERIOD)
        return periods * self.counts + self.before[rest]
