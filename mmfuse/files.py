"""Small files that are whole or not there."""

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(text.encode("utf-8", "replace"))
    temporary.replace(path)


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the JSON lines up to `step`: a resumed run repeats the steps after its checkpoint."""
    if not path.is_file():
        return
    whole = (line for line in path.read_text().splitlines() if line.endswith("}"))  # a kill may cut the last one
    write_text(path, "".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))
