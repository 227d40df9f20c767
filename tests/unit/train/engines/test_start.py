"""The engine that starts is the one that was asked for, or the run does not start."""

import pytest

from mmfuse.errors import LaunchError
from mmfuse.train.engines.start import start_engine
from mmfuse.train.engines.strategy import Asked

ASKED = Asked("fp32", 1, None, timeout_seconds=60)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MMFUSE_NUM_PROCESSES", "2", "asked for 2 processes, but Accelerate started 1"),
        (
            "ACCELERATE_USE_FSDP",
            "true",
            "asked for fsdp2, but a single process was started; start with launch/train.sh fsdp2",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asked for DeepSpeed, but Accelerate started NO"),
    ],
)
def test_what_the_libraries_would_silently_not_do_is_an_error(
    monkeypatch: pytest.MonkeyPatch, fresh_accelerator: None, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(variable, value)
    with pytest.raises(LaunchError, match=message):
        start_engine(ASKED)


def test_one_process_is_what_starts_when_nothing_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, fresh_accelerator: None
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    engine = start_engine(ASKED)
    assert (engine.name, engine.rank, engine.world_size, engine.device.type) == ("one process", 0, 1, "cpu")
