"""The schedule as a function of the step, and which parameters decay and how fast they learn."""

import pytest
import torch
from helpers import ALL, write_tiny_run

from mmfuse.task import Task
from mmfuse.train.optim import OptimizerConfig, build_optimizer, learning_rate_factor, set_learning_rate
from mmfuse.train.run import load_run


def factors(steps: int, **settings: float) -> list[float]:
    config = OptimizerConfig.model_validate(settings)
    return [learning_rate_factor(step, config=config, total_steps=steps) for step in range(steps)]


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    rates = factors(110, warmup_steps=10, final_fraction=0.1)
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    assert factors(5, warmup_steps=0)[0] == 1.0


def test_past_the_end_the_rate_stays_at_the_final_fraction() -> None:
    config = OptimizerConfig(warmup_steps=1, final_fraction=0.25)
    assert learning_rate_factor(99, config=config, total_steps=10) == pytest.approx(0.25)


@pytest.fixture
def task(tmp_path) -> Task:
    path = write_tiny_run(tmp_path, "emoji_sample", modalities=ALL)
    run = load_run(str(path), overrides=["model.fusion={num_layers: 1, num_heads: 2}", "objectives.masked_language={}"])
    return Task(run.model, run.objective_configs, seed=0)


def test_every_parameter_is_in_one_group_with_its_own_peak_and_decay(task: Task) -> None:
    config = OptimizerConfig(learning_rate=3e-3, encoder_learning_rate=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(task, config)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert groups.keys() == {id(parameter) for parameter in task.parameters()}
    for name, parameter in task.named_parameters():
        group = groups[id(parameter)]
        assert group["peak_lr"] == (1e-3 if name.startswith("model.encoders.") else 3e-3), name
        exempt = parameter.ndim < 2 or any(word in name for word in ("embeddings.weight", "pos_embed", "_token"))
        exempt |= "position_embeddings" in name or name.endswith("_embedding")
        assert group["weight_decay"] == (0.0 if exempt else 0.2), name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}


def test_each_layer_of_an_encoder_learns_slower_than_the_one_above_it(tmp_path) -> None:
    path = write_tiny_run(tmp_path, "emoji_sample", modalities=ALL)
    run = load_run(str(path), overrides=[f"model.modalities.{name}.num_layers=3" for name in ALL])
    task = Task(run.model, run.objective_configs, seed=0)
    optimizer = build_optimizer(task, OptimizerConfig(encoder_learning_rate=0.8, layer_decay=0.5, learning_rate=0.3))
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    seen: dict[float, set[str]] = {}
    for name, parameter in task.named_parameters():
        seen.setdefault(rates[id(parameter)], set()).add(name.removeprefix("model.encoders."))
    assert {"text.bert.embeddings.word_embeddings.weight", "image.vit.pos_embed"} < seen[0.1]
    assert "audio.ast.embeddings.position_embeddings" in seen[0.1]
    assert {"text.bert.encoder.layer.0.output.dense.weight", "image.vit.blocks.0.mlp.fc1.bias"} < seen[0.2]
    assert {"image.vit.blocks.1.norm1.weight", "image.vit.blocks.1.mlp.fc1.bias"} < seen[0.4]
    assert {"image.vit.blocks.2.mlp.fc1.bias", "image.vit.norm.weight", "audio.ast.layernorm.weight"} < seen[0.8]
    assert all(name.startswith(("model.heads", "objectives.")) for name in seen.pop(0.3))
    assert seen.keys() == {0.1, 0.2, 0.4, 0.8}


def test_setting_the_rate_keeps_the_ratio_of_the_groups(task: Task) -> None:
    optimizer = build_optimizer(task, OptimizerConfig(learning_rate=3e-3, encoder_learning_rate=1e-3))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.1)  # of the peak, not of the rate before
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {3e-4, 1e-4}
    assert isinstance(optimizer, torch.optim.AdamW)
