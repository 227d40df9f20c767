"""A strategy file that says something else than the run is an error, and every difference is told at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfuse.errors import ConfigError
from mmfuse.train.engines.strategy import Asked, check_strategy, offloads_optimizer

ASKED = Asked("bf16", 2, 1.5, timeout_seconds=60)
Check = Callable[..., None]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """Compares a run with the variables of an Accelerate YAML, named without their prefix, or with a DeepSpeed JSON."""
    for name in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING", "USE_DEEPSPEED", "USE_FSDP"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)

    def compare(asked: Asked = ASKED, *, text: str | None = None, **variables: str) -> None:
        if text is not None:
            path = tmp_path / "strategy.json"
            path.write_text(text)
            variables |= {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": str(path)}
        for name, value in variables.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        check_strategy(asked)

    return compare


def zero2(**changes: Any) -> str:
    return json.dumps({"zero_optimization": {"stage": 2}, **changes})


def test_every_contradiction_is_named_with_both_sides_at_once(check: Check) -> None:
    variables = {"MIXED_PRECISION": "fp16", "GRADIENT_ACCUMULATION_STEPS": "4", "GRADIENT_CLIPPING": "0.5"}
    config = {
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 3,
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 5,
        "optimizer": {"type": "Lamb"},
        "scheduler": {},
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
    }
    with pytest.raises(ConfigError) as error:
        check(text=zero2(**config), **variables)
    assert str(error.value) == "the strategy contradicts the run: " + "; ".join(
        [
            "mixed_precision: fp16, but train.precision = bf16",
            "gradient_accumulation_steps: 4, but train.accumulation = 2",
            "gradient_clipping: 0.5, but optimizer.clip_norm = 1.5",
            "gradient_accumulation_steps: 8, but train.accumulation = 2",
            "gradient_clipping: 3, but optimizer.clip_norm = 1.5",
            "train_batch_size: the run decides; set it to auto",
            "train_micro_batch_size_per_gpu: the run decides; set it to auto",
            "optimizer: the run has its own; take it out",
            "scheduler: the run has its own; take it out",
            "bf16.enabled: False, but train.precision = bf16",
            "fp16.enabled: True, but train.precision = bf16",
        ]
    )


AUTO = dict.fromkeys(
    ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"), "auto"
)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"MIXED_PRECISION": "no", "GRADIENT_ACCUMULATION_STEPS": "1"},  # Accelerate's defaults say nothing
        {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "2", "GRADIENT_CLIPPING": "1.50"},
        {"GRADIENT_ACCUMULATION_STEPS": "auto", "GRADIENT_CLIPPING": "auto"},
        {"GRADIENT_CLIPPING": "none"},
        {"text": zero2()},
        {"text": zero2(**AUTO, bf16={"enabled": "auto"}, fp16={})},
        {"text": zero2(gradient_accumulation_steps=2, gradient_clipping=1.5, bf16={"enabled": True})},
    ],
)
def test_auto_and_equal_values_are_no_contradiction(check: Check, said: dict[str, str]) -> None:
    check(**said)


def test_no_clipping_is_a_value_too(check: Check) -> None:
    without = ASKED._replace(clip_norm=None)
    check(without, text=zero2(gradient_clipping=0), GRADIENT_CLIPPING="0.0")
    with pytest.raises(ConfigError, match=r"gradient_clipping: 1.0, but optimizer.clip_norm = None"):
        check(without, GRADIENT_CLIPPING="1.0")


@pytest.mark.parametrize(
    ("asked", "variables", "message"),
    [
        ("bf16", {"MIXED_PRECISION": "fp8"}, "fp8 is refused until it was measured"),
        ("fp16", {"USE_CPU": "true"}, "train.precision = fp16 needs a GPU"),
        ("fp16", {"USE_FSDP": "true"}, "fp16 with fsdp2 was never measured"),
        ("fp16", {}, None),
        ("bf16", {"USE_CPU": "true", "USE_FSDP": "true"}, None),
    ],
)
def test_a_precision_that_the_strategy_or_the_machine_does_not_have_is_refused(
    check: Check, monkeypatch: pytest.MonkeyPatch, asked: Any, variables: dict[str, str], message: str | None
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    if message is None:
        check(ASKED._replace(precision=asked), **variables)
    else:
        with pytest.raises(ConfigError, match=message):
            check(ASKED._replace(precision=asked), **variables)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no DeepSpeed configuration with zero_optimization.stage"),
        ("[]", "is no DeepSpeed configuration with zero_optimization.stage"),
        ("{}", "is no DeepSpeed configuration with zero_optimization.stage"),
        ('{"zero_optimization": true}', "is no DeepSpeed configuration with zero_optimization.stage"),
        ('{"zero_optimization": {}}', "is no DeepSpeed configuration with zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 0}}', "stage = 0; 1, 2 and 3 are known; without ZeRO use ddp"),
        ('{"zero_optimization": {"stage": "auto"}}', "stage = auto; 1, 2 and 3 are known"),
    ],
)
def test_a_json_without_a_stage_of_zero_is_refused(check: Check, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.json: .*{message}"):
        check(text=text)


def test_a_json_that_is_not_there_is_named(check: Check) -> None:
    with pytest.raises(ConfigError, match=r"no/such\.json: .*No such file"):
        check(USE_DEEPSPEED="true", DEEPSPEED_CONFIG_FILE="no/such.json")


@pytest.mark.parametrize(
    ("zero", "variable", "expected"),
    [
        (None, None, False),
        (None, "none", False),
        (None, "cpu", True),
        ({}, "cpu", False),  # a JSON is all there is
        ({"offload_optimizer": {"device": "cpu"}}, "none", True),
        ({"offload_optimizer": {"device": "none"}, "offload_param": {"device": "cpu"}}, None, False),
        ({"offload_optimizer": None}, None, False),
        ({"offload_optimizer": {"device": "auto"}}, "cpu", True),
        ({"offload_optimizer": {"device": "auto"}}, None, False),
    ],
)
def test_adam_in_the_host_s_memory_is_known_from_the_yaml_or_the_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, zero: dict[str, Any] | None, variable: str | None, expected: bool
) -> None:
    path = tmp_path / "strategy.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **(zero or {})}}))
    said = {"CONFIG_FILE": None if zero is None else str(path), "OFFLOAD_OPTIMIZER_DEVICE": variable}
    for name, value in said.items():
        monkeypatch.delenv(f"ACCELERATE_DEEPSPEED_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    assert offloads_optimizer() == expected
