"""A folder of embeddings: one part per shard, whole or not there, and a manifest that says what they are.

manifest.json            which model, data and form; at the end also the parts and the number of samples
part-00000.safetensors   `text`, `image`, .., `fused`, each (samples, E), and `present`, bool (samples, modalities);
                         with the layout npy each in a file of its own: part-00000.text.npy
part-00000.keys.jsonl    the key of each row, a JSON string a line
part-00000.json          written last: the shard, its number of samples, and members that could not be decoded
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from mmfuse.errors import ConfigError, DataError
from mmfuse.files import replacing, write_text
from mmfuse.types import Fault

MANIFEST = "manifest.json"
_FORMAT = 1


class Form(NamedTuple):
    """How embeddings are written."""

    layout: Literal["safetensors", "npy"] = "safetensors"
    dtype: Literal["fp32", "fp16"] = "fp32"


class Part(NamedTuple):
    """The embeddings of one shard, rows in the order of its samples."""

    shard: str
    """Shown."""
    keys: Sequence[str]
    tensors: Mapping[str, Tensor]
    faults: Sequence[Fault]


class EmbeddingStore:
    """The folder; several processes may write different parts of it at one time."""

    def __init__(self, folder: Path, *, identity: Mapping[str, Any], form: Form) -> None:
        """Looks at what is there and writes nothing.

        Args:
            identity: all that embeddings depend on; JSON.
        Raises:
            ConfigError: the folder holds other embeddings, or other files.
        """
        self.folder, self.form = folder, form
        self.identity = {"format": _FORMAT, **form._asdict(), **identity}
        is_file = folder.exists() and not folder.is_dir()
        known = None if is_file else _read_json(folder / MANIFEST)
        if known is None:
            if is_file or (folder.exists() and any(path.suffix != ".tmp" for path in folder.iterdir())):
                raise ConfigError(f"{folder}: is there and holds no embeddings; name a new folder with --out")
            return
        differing = [name for name, value in self.identity.items() if known.get(name) != value]
        if differing:
            first = differing[0]
            raise ConfigError(
                f"{folder}: holds embeddings with {first} = {known.get(first)!r}, not {self.identity[first]!r}; "
                "name another folder with --out, or delete it"
            )

    def prepare(self, parts: int) -> list[int]:
        """Makes the folder and removes what a killed command has left; one process, before all others write.

        Returns:
            Which of so many parts are not there yet.
        Raises:
            DataError: the folder cannot be written.
        """
        with self._writing():
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            if not (self.folder / MANIFEST).exists():
                write_text(self.folder / MANIFEST, json.dumps({**self.identity, "complete": False}, indent=1))
        return [number for number in range(parts) if not self._facts(number).exists()]

    def write(self, number: int, part: Part) -> None:
        """Writes a part; it counts once its last file is there. Raises a DataError where it cannot be written."""
        with self._writing():
            self._write(number, part)

    def _write(self, number: int, part: Part) -> None:
        stem = self._stem(number)
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[self.form.dtype]
        tensors = {n: x.to(dtype) if x.is_floating_point() else x.contiguous() for n, x in part.tensors.items()}
        if self.form.layout == "safetensors":
            with replacing(self.folder / f"{stem}.safetensors") as file:
                file.write(save(tensors))
        else:
            for name, tensor in tensors.items():
                with replacing(self.folder / f"{stem}.{name}.npy") as file:
                    np.save(file, tensor.numpy())
        write_text(self.folder / f"{stem}.keys.jsonl", "".join(f"{json.dumps(key)}\n" for key in part.keys))
        facts = {"shard": part.shard, "samples": len(part.keys), "faults": [fault._asdict() for fault in part.faults]}
        write_text(self._facts(number), json.dumps(facts, indent=1))

    def finish(self, parts: int, *, samples: int) -> dict[str, Any]:
        """Completes the manifest; one process, when all parts are there.

        Raises:
            DataError: parts or samples are missing.
        """
        known = [fact for number in range(parts) if (fact := _read_json(self._facts(number))) is not None]
        held = sum(fact["samples"] for fact in known)
        if len(known) < parts or held != samples:
            raise DataError(
                f"{self.folder}: has {len(known)} of {parts} parts and {held:,} of {samples:,} samples; start the "
                "command again"
            )
        listed = [
            {"name": self._stem(number), "shard": fact["shard"], "samples": fact["samples"]}
            for number, fact in enumerate(known)
        ]
        faults = sum(len(fact["faults"]) for fact in known)
        manifest = {**self.identity, "complete": True, "samples": samples, "undecodable_members": faults}
        write_text(self.folder / MANIFEST, json.dumps({**manifest, "parts": listed}, indent=1))
        return manifest

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def _stem(self, number: int) -> str:
        return f"part-{number:05d}"

    def _facts(self, number: int) -> Path:
        return self.folder / f"{self._stem(number)}.json"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; delete the folder and start again") from error
