"""A trained model for use: texts, pictures and sounds in, embeddings out.

Shape legend: n items, E embedding.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmfuse.config import suggest
from mmfuse.data.collate import collate_samples
from mmfuse.distributed import rank
from mmfuse.errors import ConfigError, SampleError
from mmfuse.log import hide_bar
from mmfuse.modalities.base import Processor
from mmfuse.modalities.media.given import read_file
from mmfuse.model.model import FusionModel
from mmfuse.task import Task
from mmfuse.train.checkpoint import load_stored_run, load_weights, verify_checkpoint
from mmfuse.train.checkpoint_store import find_checkpoint
from mmfuse.train.environment import find_device
from mmfuse.train.run import RunConfig
from mmfuse.types import Batch, Sample


class Embedder:
    """A model with its weights and the processors that it was trained with."""

    def __init__(
        self,
        checkpoint: Path,
        run: RunConfig,
        model: FusionModel,
        processors: dict[str, Processor],
        device: torch.device,
    ) -> None:
        self.checkpoint, self.run, self.processors, self.device = checkpoint, run, processors, device
        self.model = model.to(device).eval()

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.model.modalities

    def encode(self, *, batch_size: int = 64, **items: Any) -> dict[str, Tensor]:
        """Embeddings of items that hold any subset of the modalities.

        `encode(text=["a cat", "rain"], audio=[None, "rain.wav"])` embeds two items, the second of text and sound.

        Args:
            items: by modality one value, or a list with None where an item lacks the modality. Text: `str`. Image: a
                path, a PIL picture, uint8 of NumPy `(H, W, 3)` or torch `(3, H, W)`. Audio: a path, or `(waveform,
                sample rate)` with floats `(values,)`, NumPy's `(values, channels)` or torch's `(channels, values)`.
                Any: the bytes of a file, or a `Path`.
            batch_size: items that the model sees at a time; changes speed and memory alone.
        Returns:
            fp32 `(n, E)` on the CPU for every modality that was given, and `fused` for the whole items where the model
            has a fusion; L2-normalised, zeros where an item lacks the modality.
        Raises:
            ConfigError: an unknown modality, nothing at all, lists of different lengths, or no batch size.
            SampleError: a value that cannot be read; names it.
        """
        if batch_size < 1:
            raise ConfigError(f"encode: batch_size = {batch_size}: expected at least 1")
        columns = self._columns(items)
        num_items = len(next(iter(columns.values())))
        starts = range(0, num_items, batch_size)
        parts: dict[str, list[Tensor]] = {}
        for start in tqdm(starts, desc="encoding", unit="batch", leave=False, disable=hide_bar(rank())):
            samples = list(self._read(columns, range(start, min(start + batch_size, num_items))))
            batch = collate_samples(samples, self.processors, step=0, global_rows=len(samples))
            for name, rows in self.embed(batch).items():
                parts.setdefault(name, []).append(rows.cpu())
        absent = set(self.modalities) - columns.keys()
        return {name: torch.cat(rows) for name, rows in parts.items() if name not in absent}

    def embed(self, batch: Batch) -> Mapping[str, Tensor]:
        """fp32 `(B, E)` by modality, and `fused`, of a batch of the processors; on the device, without gradient."""
        with torch.no_grad():
            return self.model.embed(batch.to(self.device))

    def _columns(self, items: Mapping[str, Any]) -> dict[str, list[Any]]:
        for name in items:
            if name not in self.modalities:
                raise ConfigError(f"encode: this model has no modality {suggest(name, self.modalities)}")
        columns = {name: value if isinstance(value, list) else [value] for name, value in items.items()}
        lengths = {name: len(column) for name, column in columns.items()}
        if not any(lengths.values()):
            raise ConfigError(f"encode: nothing to encode; give one of {', '.join(self.modalities)}")
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ConfigError(f"encode: different numbers of items: {said}; write None where an item lacks a modality")
        return columns

    def _read(self, columns: Mapping[str, list[Any]], numbers: Iterable[int]) -> Iterator[Sample]:
        for number in numbers:
            features = {}
            for name, column in columns.items():
                value, processor = column[number], self.processors[name]
                if value is None:
                    continue
                try:
                    features[name] = processor(_to_bytes(value, processor), seed=None)
                except SampleError as error:
                    raise SampleError(f"{name} of item {number}: {error}", kind=error.kind) from error
                except Exception as error:  # decoders of foreign values raise what they like
                    what = f"{type(error).__name__}: {error}"
                    raise SampleError(f"{name} of item {number}: {what}", kind="unexpected") from error
            yield Sample(sample_id=number, group_id=number, key=str(number), features=features)


def load(
    checkpoint: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    overrides: Iterable[str] = (),
    averaged: bool = True,
) -> Embedder:
    """A trained model, ready to `encode`.

    Args:
        checkpoint: a folder `step_NNNNNNNN`, or a run's folder for its newest one; or the URL of either.
        device: by default a GPU where there is one.
        overrides: settings of the run, `a.b=value`.
        averaged: with the moving average of the weights, where the run kept one (`train.ema_decay`), not the last ones.
    Raises:
        CheckpointError: incomplete, or of another model.
        ConfigError: no such device, or a wrong override.
    """
    folder = find_checkpoint(checkpoint)
    verify_checkpoint(folder)
    run, model = load_stored_run(folder, overrides=overrides)
    task = Task(model, run.objective_configs, seed=run.seed)
    load_weights(task, folder, averaged=averaged)
    processors = {name: config.build_processor() for name, config in model.modality_configs.items()}
    return Embedder(folder, run, task.model, processors, find_device(device))


def _to_bytes(value: Any, processor: Processor) -> bytes:
    if isinstance(value, bytes):
        return value
    return read_file(value) if isinstance(value, os.PathLike) else processor.to_bytes(value)
