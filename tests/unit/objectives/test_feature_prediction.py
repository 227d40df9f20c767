"""Feature prediction: which embeddings are predicted, from what, and that they do not bend to the prediction."""

import pytest
import torch
from batches import make_batch, make_samples, objective_configs, tiny_model, tiny_task

from mmfuse.errors import ConfigError

MIXED = "tia ti t ta ia i - tia"


def test_every_modality_that_has_company_is_predicted_from_the_others() -> None:
    task = tiny_task(("feature_prediction",))
    batch, objective = make_batch(MIXED), task.objectives["feature_prediction"]
    output = task(batch)
    encoded, losses = task.model.encode(batch), []
    for row, pattern in enumerate(MIXED.split()):
        for letter, name in zip("tia", task.model.modalities, strict=True):
            if letter not in pattern or len(pattern) < 2:
                continue
            rest = make_samples(MIXED)[row]
            rest = rest._replace(features={n: f for n, f in rest.features.items() if n != name})
            pooled = task.model.fuse(task.model.encode(make_batch([rest])).token_batch).pooled
            predicted = objective.predictors[name](pooled)[0]
            losses.append(1 - torch.cosine_similarity(predicted, encoded.embeddings[name][row], dim=0))
    assert len(losses) == 3 + 2 + 2 + 2 + 3
    assert output.loss.item() == pytest.approx(float(torch.stack(losses).mean()), rel=1e-9)


def test_targets_get_no_gradient() -> None:
    task = tiny_task(("feature_prediction",))
    task(make_batch(MIXED)).loss.backward()
    for name in task.model.modalities:
        head, predictor = task.model.heads[name].weight.grad, task.objectives["feature_prediction"].predictors[name]
        assert head is not None and not head.any()
        assert predictor[0].weight.grad.any() and task.model.projections[name].weight.grad.any()


def test_one_modality_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs at least two modalities"):
        objective_configs(("feature_prediction",))["feature_prediction"].build(tiny_model("t"), seed=0)
