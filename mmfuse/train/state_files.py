"""Tensors of a training state in safetensors files, one a rank and kind: each holds contiguous parts of flattened
weights, so that ranks write what they own, at the same time, and any engine on any number of ranks reads what it needs.

`KIND-NNNNN.safetensors` has under each weight's name the part of one rank; its metadata tell where parts begin and what
shapes the weights have. `KIND.safetensors` has whole weights, for everyone who reads safetensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmfuse.errors import CheckpointError
from mmfuse.train.engines.base import Part

SUFFIX = ".safetensors"
Shapes = Mapping[str, tuple[int, ...]]
"""Of all weights and buffers of a task, by name."""


def write_parts(folder: Path, kind: str, parts: list[Part], *, rank: int, shapes: Shapes) -> Path:
    """One rank's file of a kind; returns its path."""
    path = folder / f"{kind}-{rank:05d}{SUFFIX}"
    metadata = {
        "starts": json.dumps({part.name: part.start for part in parts}),
        "shapes": json.dumps({part.name: shapes[part.name] for part in parts}),
    }
    save_file({part.name: part.values for part in parts}, path, metadata=metadata)
    return path


def write_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Whole tensors by name, for any reader of safetensors."""
    save_file(dict(tensors), path)


class _Piece(NamedTuple):
    start: int
    length: int
    file: Any
    """An open safetensors file."""


class StoredState:
    """The tensors of a checkpoint, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Reads what is where.

        Raises:
            CheckpointError: a file is not readable, or parts of a weight are missing.
        """
        self.folder = folder
        self._pieces: dict[str, dict[str, list[_Piece]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, list[str]] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                self._add(path)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise CheckpointError(f"{folder}: {path.name} is not readable: {error}") from error
        for kind, weights in self._pieces.items():
            for name, pieces in weights.items():
                self._check_whole(kind, name, sorted(pieces, key=lambda piece: (piece.start, piece.length)))

    def _add(self, path: Path) -> None:
        file = safe_open(path, "pt")
        metadata = file.metadata() or {}
        starts, shapes = (json.loads(metadata.get(key, "{}")) for key in ("starts", "shapes"))
        kind = path.name.removesuffix(SUFFIX).rpartition("-")[0] if "starts" in metadata else path.stem
        weights = self._pieces.setdefault(kind, {})
        self._files.setdefault(kind, []).append(path.name)
        for name in file.keys():  # noqa: SIM118  # not a dict
            stored = tuple(file.get_slice(name).get_shape())
            length = torch.Size(stored).numel()
            weights.setdefault(name, []).append(_Piece(starts.get(name, 0), length, file))
            self._shapes[name] = tuple(shapes.get(name, stored))

    def _check_whole(self, kind: str, name: str, pieces: list[_Piece]) -> None:
        reached = 0
        for piece in pieces:
            if piece.start != reached:
                break
            reached += piece.length
        if reached != torch.Size(self._shapes[name]).numel():
            raise CheckpointError(f"{self.folder}: values of {name} ({kind}) are missing from {reached} on")
        self._pieces[kind][name] = pieces

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._pieces)

    def files(self, kind: str) -> list[str]:
        """The names of those that hold this kind."""
        return self._files.get(kind, [])

    def shapes(self, kind: str) -> Shapes:
        """Of the weights that have this kind."""
        return {name: self._shapes[name] for name in self._pieces.get(kind, {})}

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Values of a flattened tensor from `start` on, `(length,)`.

        Raises:
            CheckpointError: a file has become unreadable.
        """
        found = []
        for piece in self._pieces[kind][name]:
            first, end = max(start, piece.start), min(start + length, piece.start + piece.length)
            if first < end or not length:
                found.append(self._read_piece(name, piece, first - piece.start, end - piece.start))
        return torch.cat(found)[:length] if len(found) != 1 else found[0][:length]

    def _read_piece(self, name: str, piece: _Piece, first: int, end: int) -> Tensor:
        try:
            stored = piece.file.get_slice(name)
            if len(stored.get_shape()) == 1:
                return stored[first:end]
            return piece.file.get_tensor(name).reshape(-1)[first:end]  # a slice has no values of a scalar
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: {name} is not readable: {error}") from error

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor."""
        shape = self._shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).reshape(shape)

    def whole(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind by name."""
        return {name: self.tensor(kind, name) for name in self.shapes(kind)}
