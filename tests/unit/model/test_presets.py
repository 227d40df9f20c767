"""The presets that ship: their sizes, and one step of `base`."""

import pytest
import torch
from batches import ALL_OBJECTIVES, objective_configs
from helpers import picture_bytes, sound_bytes

from mmfuse.config import PRESETS, load_yaml
from mmfuse.data.collate import collate_samples
from mmfuse.model.model import FusionModel, ModelConfig
from mmfuse.task import Task
from mmfuse.train.optim import OptimizerConfig, build_optimizer
from mmfuse.types import Sample

MILLIONS = {
    "tiny": {"text": 1.5, "image": 0.9, "audio": 1.3, "fusion": 0.5},
    "base": {"text": 108.9, "image": 85.8, "audio": 85.6, "fusion": 56.7},
    "large": {"text": 334.1, "image": 303.3, "audio": 303.1, "fusion": 100.8},
}


def read_preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate(load_yaml(PRESETS / f"{name}.yaml")["model"])


def test_every_preset_has_its_sizes_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == MILLIONS.keys()


@pytest.mark.parametrize("name", MILLIONS)
def test_a_preset_builds_without_network_and_has_the_parameters_of_its_names(name: str) -> None:
    with torch.device("meta"):
        model = FusionModel(read_preset(name))
    parts = {**model.encoders, "fusion": model.fusion}
    millions = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in parts.items()}
    assert millions == pytest.approx(MILLIONS[name], abs=0.05)


@pytest.mark.slow
def test_base_goes_forward_backward_and_a_step_with_every_objective() -> None:
    raw = load_yaml(PRESETS / "base.yaml")["model"]
    raw["modalities"]["text"]["tokenizer"] = "tiny"  # its own is on the hub
    model = ModelConfig.model_validate(raw)
    task = Task(model, objective_configs(ALL_OBJECTIVES), seed=0)
    processors = {name: config.build_processor() for name, config in model.modality_configs.items()}
    members = {"text": b"a red apple on the table", "image": picture_bytes(1), "audio": sound_bytes(1, seconds=2.0)}
    samples = [
        Sample(number, number, str(number), {m: processors[m](members[m], seed=number) for m in modalities})
        for number, modalities in enumerate((("text", "image", "audio"), ("text", "audio")))
    ]
    batch = collate_samples(samples, processors, step=0, global_rows=2)
    optimizer = build_optimizer(task, OptimizerConfig(learning_rate=1e-4, encoder_learning_rate=1e-4))
    losses = []
    for _ in range(3):
        output = task(batch)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in task.parameters())
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
