"""What every test may rely on: logs that pytest can see, and an Accelerator that starts anew."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Undoes `set_up_logging`, which keeps our messages from pytest's own handler."""
    yield
    ours = logging.getLogger("mmfuse")
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the whole process; a test that trains in this one must leave none."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
