"""What the ranks of a run write of whole tensors."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mmfuse.distributed import slice_of_rank
from mmfuse.train.engines.base import Part
from mmfuse.train.state_files import write_parts


def write_in_parts(folder: Path, kind: str, tensors: Mapping[str, Tensor], *, ranks: int) -> list[Path]:
    """Each tensor dealt to so many ranks, of which some may get no value; their files in order."""
    shapes, paths = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, []
    for rank in range(ranks):
        parts = []
        for name, tensor in tensors.items():
            own = slice_of_rank(tensor.numel(), rank=rank, world_size=ranks)
            parts.append(Part(name, own.start, tensor.reshape(-1)[own].clone()))
        paths.append(write_parts(folder, kind, parts, rank=rank, shapes=shapes))
    return paths
