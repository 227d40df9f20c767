"""JSON lines that each rank writes for itself, cut to the resumed step when a run goes on."""

import json
from pathlib import Path
from typing import Any, TextIO

from mmfuse.files import drop_lines_after


class RankLines:
    """`NAME.rankN.jsonl` in a run's folder; there once something was written."""

    def __init__(self, folder: Path, name: str, rank: int, world_size: int, *, start: int) -> None:
        """Drops what was written after step `start`, also by ranks that a larger world had before."""
        self.path = folder / f"{name}.rank{rank}.jsonl"
        self._file: TextIO | None = None
        drop_lines_after(self.path, start)
        for other in folder.glob(f"{name}.rank*.jsonl"):
            if rank == 0 and int(other.name.split(".")[-2].removeprefix("rank")) >= world_size:
                drop_lines_after(other, start)

    def write(self, step: int, content: dict[str, Any]) -> None:
        """One line, there at once for whoever looks."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  # open as long as the run
        self._file.write(json.dumps({"step": step, **content}) + "\n")
