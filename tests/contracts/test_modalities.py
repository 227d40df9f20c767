"""Every file in `mmfuse/modalities` keeps the contract of `base.py`."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import picture_bytes, sound_bytes
from PIL import Image

from mmfuse.config import find_plugin, plugin_names
from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities.base import Encoder, ModalityConfig, PatchEncoder
from mmfuse.model.blocks import checkpoint_activations

SIZES = {"hidden_size": 24, "num_layers": 2, "num_heads": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in plugin_names("mmfuse.modalities")},
    "naflex": ("image", {"architecture": "naflexvit_base_patch16_siglip", "max_patches": 9, **SIZES}),
    "vit": ("audio", {"encoder": "vit"}),
    "whisper": ("audio", {"encoder": "whisper", "clip_seconds": 1.0, "num_mel_bins": 80}),
}
"""By name a file in the folder, and settings that take another way through it."""
MEMBERS = {"text": [b"a red apple", b"sun"], "image": [picture_bytes(1), picture_bytes(2)]}
MEMBERS["audio"] = [sound_bytes(1, seconds=0.5), sound_bytes(2, seconds=1.0)]
"""Two members by modality; a new modality adds its own here, with its tests."""
VALUES = {"text": "sun", "image": Image.new("L", (9, 9)), "audio": (np.zeros(400, np.float32), 16_000)}
"""What a user may hold in memory."""


def make_config(variant: str, **changes: Any) -> Any:
    name, settings = VARIANTS[variant]
    return find_plugin("mmfuse.modalities", name).Config(**settings, **changes)


def members_of(variant: str) -> list[bytes]:
    return MEMBERS[VARIANTS[variant][0]]


@pytest.mark.parametrize("name", VARIANTS)
def test_members_become_rows_and_rows_become_tokens(name):
    module = find_plugin("mmfuse.modalities", VARIANTS[name][0])
    config = make_config(name)
    assert isinstance(config, ModalityConfig)
    assert module.EXTENSIONS and all(extension == extension.lower().strip(".") for extension in module.EXTENSIONS)
    processor = config.build_processor()
    inputs = processor.collate(
        [processor(data, seed=seed) for data, seed in zip(members_of(name), (None, 1), strict=True)]
    )
    assert {len(tensor) for tensor in inputs.values()} == {2}

    assert processor.to_bytes(VALUES[VARIANTS[name][0]])
    with pytest.raises(SampleError):
        processor.to_bytes(object())

    encoder = config.build_encoder()
    assert isinstance(encoder, Encoder)
    for rows, size in ((inputs, 2), (encoder.minimal_inputs(torch.device("cpu")), 1)):
        output = encoder(rows)
        assert output.tokens.shape == (size, output.mask.shape[1], encoder.width)
        assert output.mask.dtype == torch.bool and output.mask.any(1).all()
        assert output.pooled.shape == (size, encoder.width)
        assert torch.isfinite(output.pooled).all()
    assert set(encoder.minimal_inputs(torch.device("cpu"))) == set(inputs)


@pytest.mark.parametrize("name", VARIANTS)
def test_from_its_files_comes_the_same_encoder_and_the_same_preprocessing(name, tmp_path):
    config = make_config(name)
    config.save_files(tmp_path)
    again = config.with_files(tmp_path)
    processors, encoders = (
        [c.build_processor() for c in (config, again)],
        [c.build_encoder() for c in (config, again)],
    )
    first, second = (p.collate([p(data, seed=None) for data in members_of(name)]) for p in processors)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    encoders[1].load_state_dict(encoders[0].state_dict())
    outputs = [encoder.eval()(first) for encoder in encoders]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_takes_part(name):
    encoder = make_config(name).build_encoder()
    output = encoder(encoder.minimal_inputs(torch.device("cpu")))
    (output.tokens.sum() + output.pooled.sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []


PATCHED = [name for name in VARIANTS if make_config(name).count_patch_values()]


def test_pictures_and_sounds_have_patches() -> None:
    assert PATCHED == ["audio", "image", "naflex", "vit"]


@pytest.mark.parametrize("name", PATCHED)
def test_hidden_patches_hold_the_mean_and_nothing_of_them_is_left(name):
    torch.manual_seed(0)
    config = make_config(name)
    encoder, processor = config.build_encoder().eval(), config.build_processor()
    assert isinstance(encoder, PatchEncoder)
    inputs = processor.collate([processor(data, seed=None) for data in members_of(name)])
    patches, real = encoder.patches(inputs)
    assert patches.shape[2] == config.count_patch_values() and real.shape == patches.shape[:2]
    torch.testing.assert_close(encoder(encoder.hide(inputs, torch.zeros_like(real))), encoder(inputs))

    hidden = real & (torch.rand(real.shape) < 0.5)
    without = encoder.hide(inputs, hidden)
    left, _ = encoder.patches(without)
    assert left[hidden].abs().max() < 1e-6 and hidden.any() and not hidden.all()
    torch.testing.assert_close(left[~hidden], patches[~hidden])
    output = encoder(without)
    assert encoder.patch_tokens(output.tokens).shape[:2] == real.shape
    large = next(key for key, value in inputs.items() if value.ndim > 2)  # pixels, or a filter bank
    scrambled = {**inputs, large: torch.where(inputs[large] == without[large], inputs[large], 7)}
    torch.testing.assert_close(encoder(encoder.hide(scrambled, hidden)), output, rtol=0, atol=1e-5)


def kept_and_gradients(name: str, *, computes_again: bool, training: bool) -> tuple[int, list[torch.Tensor | None]]:
    """Bytes that forward keeps for backward beside the parameters, and what backward makes of them."""
    torch.manual_seed(0)
    config, kept = make_config(name), {}
    encoder, processor = config.build_encoder().train(training), config.build_processor()
    if computes_again:
        checkpoint_activations(encoder.layers())
    inputs = processor.collate([processor(data, seed=None) for data in members_of(name)])

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = encoder(inputs)
    (output.tokens.square().mean() + output.pooled.sum()).backward()
    own = sum(p.numel() * p.element_size() for p in encoder.parameters())
    return sum(kept.values()) - own, [parameter.grad for parameter in encoder.parameters()]


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_that_compute_again_keep_less_and_change_no_gradient(name):
    for training in (True, False):
        kept, expected = kept_and_gradients(name, computes_again=False, training=training)
        kept_again, gradients = kept_and_gradients(name, computes_again=True, training=training)
        torch.testing.assert_close(gradients, expected)
        assert kept_again < 0.6 * kept if training else kept_again == kept, (training, kept_again, kept)


@pytest.mark.parametrize("name", VARIANTS)
def test_lora_changes_what_an_encoder_gives_and_nothing_else_of_it_learns(name):
    processor = make_config(name).build_processor()
    inputs = processor.collate([processor(data, seed=None) for data in members_of(name)])
    torch.manual_seed(0)
    plain = make_config(name).build_trained_encoder().eval()
    torch.manual_seed(0)
    encoder = make_config(name, lora={"rank": 2}).build_trained_encoder()
    torch.testing.assert_close(encoder.eval()(inputs).pooled, plain(inputs).pooled, rtol=0, atol=1e-6)  # zero at first

    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):  # the first moves one factor of each change, the second the other too
        optimizer.zero_grad()
        encoder.train()(inputs).pooled.square().sum().backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
    assert (encoder.eval()(inputs).pooled - plain(inputs).pooled).abs().max() > 1e-3
    changed = {name for name, parameter in encoder.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in trained if ".lora_B" in name} <= changed <= trained.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_frozen_layers_and_all_that_is_before_them_have_no_gradient(name):
    num_layers = len(make_config(name).build_encoder().layers())
    assert num_layers > 1
    encoder = make_config(name, frozen_layers=1).build_trained_encoder()
    inputs = encoder.minimal_inputs(torch.device("cpu"))
    output = encoder(inputs)
    (output.tokens.sum() + output.pooled.sum()).backward()
    depths = encoder.depths()
    assert set(depths.values()) >= {0, 1, 2, num_layers}
    assert {name for name, p in encoder.named_parameters() if p.grad is None} == {
        n for n, d in depths.items() if d <= 1
    }
    everything = make_config(name, frozen_layers="all").build_trained_encoder()
    assert not any(parameter.requires_grad for parameter in everything.parameters())
    with pytest.raises(ConfigError, match=f"frozen_layers = 99, but {num_layers} layers are known"):
        make_config(name, frozen_layers=99).build_trained_encoder()
    with pytest.raises(ValueError, match="lora keeps all weights"):
        make_config(name, frozen_layers=1, lora={})
