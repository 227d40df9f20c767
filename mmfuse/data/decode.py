"""Members -> a sample, seeded by what the sample is, so that workers, retries and resumes give the same tensors."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from mmfuse.data.captions import choose_caption
from mmfuse.data.source import RawSample, Source
from mmfuse.errors import SampleError
from mmfuse.hashing import hash_int
from mmfuse.modalities.base import Processor
from mmfuse.types import Fault, Sample, SampleRef

SOURCE_BITS = 48
"""A sample id is `source << SOURCE_BITS | number`."""
_READ_AT_ONCE = 16
"""Samples that are read before the first of them is decoded: right after decoding, reading costs three times as much,
since the processor's caches no longer hold its code."""
_PADDING = Sample(sample_id=-1, group_id=-1, key="", features={})


def source_of(sample_id: Tensor, *, num_sources: int) -> Tensor:
    """Which source of a mixture each sample is from, whatever its length bucket: int64 `(n,)` both."""
    return torch.div(sample_id, 1 << SOURCE_BITS, rounding_mode="floor") % num_sources


class SampleDecoder:
    """Reads and decodes the samples of a mixture.

    A member that cannot be decoded masks its modality, and a sample of which nothing is left stays as a row without
    modalities: no other takes its place, so the plan never depends on what was found. Whatever keeps bytes from being
    read stops the run instead.
    """

    def __init__(self, sources: list[Source], processors: dict[str, Processor], *, seed: int | None) -> None:
        """With `seed` None the deterministic transforms of evaluation."""
        self.sources, self.processors, self.seed = sources, processors, seed
        self._source_seeds = [hash_int(seed, source.name) for source in sources]
        self._modality_seeds = {modality: hash_int(modality) for modality in processors}

    def __call__(self, refs: Iterable[SampleRef]) -> list[Sample]:
        """Decoded samples in order; padding (`number < 0`) has no modality.

        Raises:
            ShardError: a shard has changed.
            DataError: one cannot be read.
        """
        rest, samples = iter(refs), []
        while read := [self._read(ref) for ref in itertools.islice(rest, _READ_AT_ONCE)]:
            samples += [_PADDING if raw is None else self._decode(ref, raw, seed) for ref, raw, seed in read]
        return samples

    def _read(self, ref: SampleRef) -> tuple[SampleRef, RawSample | None, int | None]:
        """With the seed that all of the sample's randomness is drawn from."""
        source, index, epoch = ref
        if index < 0:
            return ref, None, None
        bucket, number = divmod(source, len(self.sources))
        seed = None if self.seed is None else hash_int(self._source_seeds[number], bucket, epoch, index)
        return ref, self.sources[number].read(index, bucket=bucket, seed=seed), seed

    def _decode(self, ref: SampleRef, raw: RawSample, seed: int | None) -> Sample:
        source = self.sources[ref.source % len(self.sources)]
        features, problems = {}, {}
        for modality, (extension, data) in raw.members.items():
            member_seed = None if seed is None else seed ^ self._modality_seeds[modality]
            try:
                if source.rules[modality].captions != "whole":
                    data = choose_caption(data, source.rules[modality], seed=member_seed)
                features[modality] = self.processors[modality](data, seed=member_seed)
            except SampleError as error:
                problems[extension] = error
            except Exception as error:  # decoders of foreign bytes raise what they like; limits stop what is our fault
                problems[extension] = SampleError(f"{type(error).__name__}: {error}", kind="unexpected")
        sample_id = ref.source << SOURCE_BITS | ref.number
        return Sample(
            sample_id=sample_id,
            group_id=sample_id if raw.group is None else hash_int(raw.group),
            key=f"{raw.shard}/{raw.key}",
            features=features,
            faults=_describe(problems, source.name, raw, lost=not features) if problems else (),
        )


def _describe(problems: dict[str, SampleError], source: str, raw: RawSample, *, lost: bool) -> tuple[Fault, ...]:
    return tuple(
        Fault(source, raw.shard, raw.key, extension, error.kind, str(error), lost)
        for extension, error in problems.items()
    )
