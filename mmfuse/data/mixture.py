"""A mixture: the weighted sources of a run, and how their samples are read."""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mmfuse.config import Settings
from mmfuse.data.buckets import BucketConfig, LengthBuckets
from mmfuse.data.quarantine import QuarantineConfig
from mmfuse.data.recipe import load_recipe
from mmfuse.data.remote.prefetch_loop import CacheConfig
from mmfuse.data.shard_files import NodeCache
from mmfuse.data.source import Source


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
    buckets: BucketConfig | None = None
    """Samples of like length in one global batch; null: lengths are mixed."""
    quarantine: QuarantineConfig = QuarantineConfig()
    cache: CacheConfig = CacheConfig()
    """Of remote shards."""

    @model_validator(mode="after")
    def _weights_all_or_none(self) -> "DataConfig":
        if len({source.weight is None for source in self.train}) > 1:
            raise ValueError("give every source of data.train a weight, or none of them")
        names = [(source.recipe, source.split) for source in self.train]
        if len(set(names)) < len(names):
            raise ValueError("data.train names one source twice; add its weights up instead")
        return self


def open_source(
    config: SourceConfig,
    *,
    modalities: tuple[str, ...],
    cache: NodeCache | None = None,
    buckets: LengthBuckets | None = None,
    keep_lengths: bool = False,
) -> Source:
    """The source that a run names."""
    recipe, place = load_recipe(config.recipe)
    return Source(
        recipe,
        config.split,
        place=place,
        modalities=modalities,
        cache=cache,
        buckets=buckets,
        keep_lengths=keep_lengths,
    )
