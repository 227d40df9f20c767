"""Samples -> one rank's batch: compact rows per modality, no placeholders for what is missing."""

import torch

from mmfuse.modalities.base import Processor
from mmfuse.types import Batch, ModalityBatch, Sample


def collate_samples(samples: list[Sample], processors: dict[str, Processor], *, step: int, global_rows: int) -> Batch:
    """The batch of these samples, rows in their order; modalities that no sample has are not in `inputs`."""
    modalities = tuple(processors)
    inputs = {}
    for modality, processor in processors.items():
        rows = [row for row, sample in enumerate(samples) if modality in sample.features]
        if rows:
            features = processor.collate([samples[row].features[modality] for row in rows])
            inputs[modality] = ModalityBatch(torch.tensor(rows), features)
    present = torch.tensor([[modality in sample.features for modality in modalities] for sample in samples])
    return Batch(
        modalities=modalities,
        present=present,
        group_id=torch.tensor([sample.group_id for sample in samples]),
        sample_id=torch.tensor([sample.sample_id for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        inputs=inputs,
        step=step,
        global_rows=global_rows,
        faults=tuple(fault for sample in samples for fault in sample.faults),
    )
