"""A run that trains in this process."""

from pathlib import Path

import pytest
from helpers import write_data_set, write_tiny_run


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerator: None) -> Path:
    """The YAML of a tiny run over eight samples of text and image, for one process on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return write_tiny_run(tmp_path, write_data_set(tmp_path / "set", modalities=("text", "image")))
