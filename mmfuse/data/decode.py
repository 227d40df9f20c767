"""Members -> a sample, seeded by what the sample is, so that workers, retries and resumes give the same tensors."""

import random

from mmfuse.data.recipe import MemberRule
from mmfuse.data.source import Source
from mmfuse.errors import SampleError
from mmfuse.hashing import hash_int
from mmfuse.modalities.base import Processor
from mmfuse.types import Sample, SampleRef

SOURCE_BITS = 48
"""A sample id is `source << SOURCE_BITS | number`."""


class SampleDecoder:
    """Reads and decodes the samples of a mixture."""

    def __init__(self, sources: list[Source], processors: dict[str, Processor], *, seed: int | None) -> None:
        """With `seed` None the deterministic transforms of evaluation."""
        self.sources, self.processors, self.seed = sources, processors, seed

    def __call__(self, ref: SampleRef) -> Sample:
        """One decoded sample; padding (`number < 0`) has no modality.

        Raises:
            SampleError: a member is not what its extension says; names shard, key and member.
            ShardError: the shard has changed.
        """
        if ref.number < 0:
            return Sample(sample_id=-1, group_id=-1, key="", features={})
        source = self.sources[ref.source]
        raw = source.read(ref.number)
        features = {}
        for modality, (extension, data) in raw.members.items():
            seed = None if self.seed is None else hash_int(self.seed, source.name, ref.epoch, ref.number, modality)
            try:
                data = choose_caption(data, source.rules[modality], seed=seed)
                features[modality] = self.processors[modality](data, seed=seed)
            except SampleError as error:
                raise SampleError(
                    f"{raw.key}.{extension}: {error}. Run `mmfuse shards check` on its shard to find every bad member"
                ) from error
        return Sample(
            sample_id=ref.source << SOURCE_BITS | ref.number, group_id=raw.group_id, key=raw.key, features=features
        )


def choose_caption(data: bytes, rule: MemberRule, *, seed: int | None) -> bytes:
    """One line of several captions, drawn by `seed`, or the first without one; other members as they are."""
    if rule.captions != "lines":
        return data
    lines = [line for line in data.splitlines() if line.strip()]
    if not lines:
        raise SampleError("no caption in any line")
    return lines[0] if seed is None else random.Random(seed).choice(lines)
