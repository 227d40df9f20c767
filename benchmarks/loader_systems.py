"""One function per data loader: batches of 64 samples, shuffled, from the same tars or what was made of them.

Every system is set up as its documentation trains: shards and samples shuffled, its own defaults elsewhere, batches
through its own or torch's DataLoader. Without workers a batch is a list of `{extension: value}` and nothing is stacked;
with workers it is `{extension: column}`, for arrays that cross processes one by one cost more than to decode them.
Imports are inside the functions: a process must not pay for, or need, another system.
"""

import functools
import io
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

BATCH = 64
SHUFFLE_BUFFER = 1000
SEED = 7
LONGEST_SOUND = 10 * 16_000


class Job(NamedTuple):
    """What one process delivers."""

    folder: Path
    """Of the tars; converted sets are beside it."""
    extensions: tuple[str, ...]
    decode: bool
    num_workers: int

    def values_of(self, sample: Any) -> dict[str, Any]:
        """The members that count, decoded or not: the work that is the same for all systems."""
        if not self.decode:
            return {extension: sample[extension] for extension in self.extensions}
        return {extension: DECODERS[extension](sample[extension]) for extension in self.extensions}

    def collate(self, samples: list[dict[str, Any]]) -> Any:
        """The batch that is delivered, the same work for all systems."""
        if not self.num_workers:
            return samples
        return {extension: stack([sample[extension] for sample in samples]) for extension in self.extensions}


def stack(values: list[Any]) -> Any:
    """One tensor of arrays, padded with zeros to the longest sound there is; other values stay a list."""
    if not isinstance(values[0], np.ndarray):
        return values
    shape = values[0].shape if values[0].ndim > 1 else (LONGEST_SOUND,)
    column = torch.from_numpy(np.zeros((len(values), *shape), values[0].dtype))
    for row, value in zip(column.numpy(), values, strict=True):
        row[: len(value)] = value
    return column


def decode_jpeg(data: bytes) -> np.ndarray:
    """uint8 `(height, width, 3)`."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def decode_flac(data: bytes) -> np.ndarray:
    """float32 `(frames,)`."""
    import soundfile

    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


DECODERS: dict[str, Callable[[bytes], Any]] = {"jpg": decode_jpeg, "txt": bytes.decode, "flac": decode_flac}


def open_mmfuse(job: Job) -> Iterable[Any]:
    """Tars and their index: this repository's plan (64 lanes, windows of 8 shards), source and loader."""
    from mmfuse.data.decode import SampleDecoder
    from mmfuse.data.loader import load_batches, training_requests

    source, plan = _open_mmfuse_plan(job)
    modalities = dict(zip(("image", "text", "audio"), job.extensions, strict=True))
    processors = {m: _MmfuseProcessor(job, DECODERS[e] if job.decode else None) for m, e in modalities.items()}
    decoder = SampleDecoder([source], processors, seed=SEED)  # type: ignore[arg-type]  # lists instead of tensors
    requests = functools.partial(training_requests, plan, start=0, stop=len(source) // BATCH, rank=0, world_size=1)
    batches = load_batches(decoder, requests, num_workers=job.num_workers)
    return ({e: batch.inputs[m].inputs["values"] for m, e in modalities.items()} for batch in batches)


def open_mmfuse_source(job: Job) -> Iterable[Any]:
    """`Source.read` in the order of the plan, without a loader."""
    from mmfuse.data.loader import training_requests

    source, plan = _open_mmfuse_plan(job)
    requests = training_requests(plan, start=0, stop=len(source) // BATCH, rank=0, world_size=1)
    numbers = (request.refs[:, 1].tolist() for request in requests)
    return ([job.values_of(dict(source.read(number).members.values())) for number in batch] for batch in numbers)


def _open_mmfuse_plan(job: Job) -> tuple[Any, Any]:
    from mmfuse.data.plan import DataPlan, PlannedSource
    from mmfuse.data.recipe import MemberRule, Recipe, Split
    from mmfuse.data.source import Source

    modalities = ("image", "text", "audio")
    members = {m: MemberRule(extensions=(e,)) for m, e in zip(modalities, job.extensions, strict=True)}
    recipe = Recipe(name=job.folder.name, members=members, splits={"train": Split(shards=("*.tar",))})
    source = Source(recipe, "train", place=job.folder / "recipe.yaml", modalities=modalities)
    planned = PlannedSource(source.name, source.counts, 1.0, source.index_hash)
    return source, DataPlan([planned], seed=SEED, global_batch=BATCH)


class _MmfuseProcessor:
    """The bare decode call as a modality's processor."""

    def __init__(self, job: Job, decode: Callable[[bytes], Any] | None) -> None:
        self.job, self.decode = job, decode

    def __call__(self, data: bytes, *, seed: int | None) -> dict[str, Any]:
        return {"values": self.decode(data) if self.decode else data}

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        values = [feature["values"] for feature in features]
        return {"values": stack(values) if self.job.num_workers else values}


def open_webdataset(job: Job) -> Iterable[Any]:
    """Tars as a stream: shards shuffled, then a buffer of 1,000 samples, in front of the decoding."""
    import webdataset

    tars = [str(path) for path in sorted(job.folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=SEED)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).map(job.values_of).batched(BATCH, collation_fn=job.collate)
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=job.num_workers, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    """The loader's default would turn arrays into tensors."""
    return batch


def open_wids(job: Job) -> Iterable[Any]:
    """Tars by index (webdataset's own indexed reader): shards in random order, samples shuffled within a shard."""
    import wids
    from torch.utils.data import DataLoader

    per_shard = json.loads((job.folder / "manifest.json").read_text())["samples"] // 16
    shards = [{"url": str(path), "nsamples": per_shard} for path in sorted(job.folder.glob("*.tar"))]

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        return job.values_of({extension: sample["." + extension].getvalue() for extension in job.extensions})

    dataset = wids.ShardListDataset(shards, localname=str, keep=True, transformations=[transform])
    sampler = wids.ShardedSampler(dataset, shufflefirst=True, seed=SEED)
    return DataLoader(dataset, BATCH, sampler=sampler, num_workers=job.num_workers, collate_fn=job.collate)


def open_energon(job: Job) -> Iterable[Any]:
    """Tars and Energon's index: a crude dataset with a cooker, a buffer of 1,000 samples, the savable loader."""
    from megatron import energon

    @energon.edataclass
    class Cooked(energon.Sample):
        values: Any

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Cooked:
        return Cooked(**energon.basic_sample_keys(sample), values=job.values_of(sample))

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(cook),)

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: list[Any]) -> Any:
            return job.collate([sample.values for sample in samples])

        def encode_batch(self, batch: Any) -> Any:
            return batch

    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=job.num_workers)
    dataset = energon.get_train_dataset(
        job.folder,
        worker_config=config,
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
        repeat=False,
    )
    return energon.get_savable_loader(dataset)


def open_streaming(job: Job) -> Iterable[Any]:
    """MDS shards: Streaming's global shuffle (py1e)."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Decoded(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            return job.values_of(super().__getitem__(at))

    folder = job.folder.with_name(f"{job.folder.name}.streaming")
    dataset = Decoded(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)
    return DataLoader(dataset, BATCH, num_workers=job.num_workers, collate_fn=job.collate)


def open_litdata(job: Job) -> Iterable[Any]:
    """LitData chunks: chunks shuffled, samples in windows within a chunk; its views into mapped files made bytes."""
    import litdata

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        # A view into a map that nobody has touched is not read: the others deliver bytes in memory.
        return job.values_of({extension: bytes(sample[extension]) for extension in job.extensions})

    folder = job.folder.with_name(f"{job.folder.name}.litdata")
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=SEED, transform=transform)
    return litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=job.num_workers, collate_fn=job.collate)


def open_bare(job: Job, *, seed: int = SEED) -> Iterator[Any]:
    """The floor. Decoding: the calls alone, on bytes in memory; reading: `os.pread` of each member at a known place."""
    places = list(_places(job.folder))
    random.Random(seed).shuffle(places)
    files = {path: os.open(path, os.O_RDONLY) for path, _ in places}

    def read(place: _Place) -> dict[str, bytes]:
        file, members = files[place[0]], place[1]
        return {extension: os.pread(file, *members[extension]) for extension in job.extensions}

    if job.decode:
        return _deliver([read(place) for place in places], job.values_of, job)
    return _deliver(places, read, job)


def _deliver(samples: list[Any], give: Callable[[Any], dict[str, Any]], job: Job) -> Iterator[Any]:
    for start in range(0, len(samples), BATCH):
        yield job.collate([give(sample) for sample in samples[start : start + BATCH]])


_Place = tuple[Path, dict[str, tuple[int, int]]]
"""Tar, and `{extension: (size, offset)}`."""


def _places(folder: Path) -> Iterator[_Place]:
    """Where every sample lies, by the standard library alone."""
    import tarfile

    for path in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = (member.size, member.offset_data)
        yield from ((path, sample) for sample in members.values())


SYSTEMS: dict[str, Callable[[Job], Iterable[Any]]] = {
    "bare": open_bare,
    "mmfuse": open_mmfuse,
    "mmfuse_source": open_mmfuse_source,
    "webdataset": open_webdataset,
    "wids": open_wids,
    "energon": open_energon,
    "streaming": open_streaming,
    "litdata": open_litdata,
}
