"""Masked pictures and sounds: which patches are hidden, and what their prediction is compared with."""

import pytest
import torch
from batches import make_batch, make_samples, objective_configs, tiny_model, tiny_task

from mmfuse.errors import ConfigError
from mmfuse.modalities.base import PatchEncoder
from mmfuse.objectives.base import StepInputs
from mmfuse.objectives.patches.masked_patches import MaskedPatches

OBJECTIVES = {"masked_image": "image", "masked_audio": "audio"}
MANY = " ".join(["tia", "ia", "i", "a"] * 60)


def build(name: str, batch) -> tuple[MaskedPatches, StepInputs]:
    task = tiny_task((name,))
    objective = task.objectives[name]
    assert isinstance(objective, MaskedPatches)
    return objective, StepInputs(task.model, batch, task.model.encode(batch), None)


@pytest.mark.parametrize(("name", "modality"), OBJECTIVES.items())
def test_the_share_is_the_ratio_and_padding_is_never_hidden(name: str, modality: str) -> None:
    batch = make_batch(MANY)
    objective, inputs = build(name, batch)
    encoder, part = inputs.model.encoders[modality], batch.inputs[modality]
    assert isinstance(encoder, PatchEncoder)
    hidden, real = objective._hide(encoder, part, batch).hidden_nP, encoder.patches(part.inputs)[1]
    assert not (hidden & ~real).any()
    assert hidden.sum() / real.sum() == pytest.approx(objective.mask_ratio, abs=0.06)


@pytest.mark.parametrize(("name", "modality"), OBJECTIVES.items())
def test_the_loss_is_the_squared_error_of_normalised_patches(name: str, modality: str) -> None:
    objective, inputs = build(name, make_batch(MANY))
    batch, encoder, seen = inputs.batch, inputs.model.encoders[modality], []
    assert isinstance(encoder, PatchEncoder)
    objective.decoder.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    term = objective(inputs)[name]
    part = batch.inputs[modality]
    patches, _ = encoder.patches(part.inputs)
    hidden, expected = objective._hide(encoder, part, batch).hidden_nP, []
    for patch, predicted in zip(patches[hidden].double(), seen[0], strict=True):
        normal = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        expected.append(float((predicted - normal).square().mean()))
    assert term.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert term.row_losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(term.rows, part.rows[hidden.nonzero()[:, 0]])


def test_hiding_follows_the_sample_and_changes_with_the_step() -> None:
    samples = make_samples(MANY)
    alone, together, later = make_batch(samples[4:5]), make_batch(samples), make_batch(samples, step=4)
    objective, inputs = build("masked_image", together)
    encoder = inputs.model.encoders["image"]
    assert isinstance(encoder, PatchEncoder)
    (own,), everyone, then = (
        objective._hide(encoder, b.inputs["image"], b).hidden_nP for b in (alone, together, later)
    )
    place = together.inputs["image"].rows.tolist().index(4)
    assert torch.equal(own, everyone[place]) and not torch.equal(everyone, then)


def test_a_model_without_the_modality_or_its_patches_is_refused() -> None:
    for name, modality in OBJECTIVES.items():
        config = objective_configs((name,))[name]
        with pytest.raises(ConfigError, match=f"objectives.{name} needs the modality {modality}"):
            config.build(tiny_model("t"), seed=0)
    layered = tiny_model("ti").modality_configs["image"].model_copy(update={"architecture": "resnet18"})
    model = tiny_model("ti").model_copy(update={"modalities": {"image": layered}})
    with pytest.raises(ConfigError, match=r"objectives\.masked_image: the encoder of modality image has no patches"):
        objective_configs(("masked_image",))["masked_image"].build(model, seed=0)


def test_pixels_beyond_the_last_whole_patch_are_in_none() -> None:
    sizes = tiny_model("i").modality_configs["image"].model_copy(update={"image_size": 40})
    encoder = sizes.build_encoder()
    assert isinstance(encoder, PatchEncoder)
    inputs = {"pixels": torch.randint(256, (1, 3, 40, 40), dtype=torch.uint8)}
    patches, real = encoder.patches(inputs)
    assert patches.shape == (1, 4, sizes.count_patch_values())
    hidden = encoder.hide(inputs, torch.ones_like(real))["pixels"]
    assert not encoder.patches({"pixels": hidden})[0].any()
    assert torch.equal(hidden[:, :, 32:], inputs["pixels"][:, :, 32:].float())


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_r_s16_p8_224", "xcit_nano_12_p16_224"])
def test_only_pixels_count_as_patches(architecture: str) -> None:
    config = tiny_model("i").modality_configs["image"].model_copy(update={"architecture": architecture})
    assert config.count_patch_values() is None
