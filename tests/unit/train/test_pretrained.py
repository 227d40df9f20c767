"""A run from pretrained encoders: its checkpoint is the whole model, wherever the pretrained ones have gone."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import ALL, TINY_MODALITIES, picture_bytes, sound_bytes, write_data_set, write_tiny_run
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    WhisperConfig,
    WhisperModel,
)

import mmfuse
from mmfuse.cli import main
from mmfuse.errors import ConfigError
from mmfuse.modalities import audio, text
from mmfuse.train.checkpoint_store import find_checkpoint
from mmfuse.train.run import load_run
from mmfuse.train.trainer import train

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def write_pretrained(folder: Path) -> dict[str, dict]:
    """What a hub would give: three small models with preprocessing of their own; their settings by modality."""
    bert = DistilBertConfig(vocab_size=6368, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(bert).save_pretrained(folder / "text")
    text.Config().build_tokenizer().save_pretrained(folder / "text")
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    torch.save(vit.state_dict(), folder / "vit.pt")
    shape = {"patch_size": 16, "frequency_stride": 16, "time_stride": 16, "max_length": 32, "num_mel_bins": 16}
    widths = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ASTModel(ASTConfig(**widths, **shape)).save_pretrained(folder / "audio")
    ASTFeatureExtractor(mean=-6.8, std=5.5, num_mel_bins=16, max_length=32).save_pretrained(folder / "audio")
    return {
        "text": {"pretrained": str(folder / "text"), "tokenizer": str(folder / "text"), "vocab_size": 6368},
        "image": {**TINY_MODALITIES["image"], "pretrained": str(folder / "vit.pt")},
        "audio": {"pretrained": str(folder / "audio"), "clip_seconds": 0.32, "num_mel_bins": 16},
    }


def assert_embeds_on(checkpoint: Path, recipe: Path, *, moved_to: Path) -> None:
    """A folder of embeddings that the checkpoint began is known by its copy."""
    out = moved_to.with_name("embedded")
    for folder in (checkpoint, shutil.copytree(checkpoint, moved_to)):
        (out / "part-00000.json").unlink(missing_ok=True)
        assert main(["embed", str(folder), str(recipe), "--split", "train", "--out", str(out)]) == 0


@pytest.mark.parametrize("name", ["text", "audio", "whisper"])
def test_what_is_stored_in_half_precision_is_trained_in_fp32(tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape = {"patch_size": 16, "frequency_stride": 16, "time_stride": 16, "max_length": 32, "num_mel_bins": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    stored = {
        "text": lambda: BertModel(BertConfig(vocab_size=6368, **sizes)),
        "audio": lambda: ASTModel(ASTConfig(**sizes, **shape)),
        "whisper": lambda: WhisperModel(WhisperConfig(d_model=16, max_source_positions=16, num_mel_bins=16, **heads)),
    }
    stored[name]().half().save_pretrained(tmp_path / "hub")
    named = str(tmp_path / "hub")
    config = {
        "text": lambda: text.Config(pretrained=named),
        "audio": lambda: audio.Config(pretrained=named, clip_seconds=0.32, num_mel_bins=16),
        "whisper": lambda: audio.Config(encoder="whisper", pretrained=named, clip_seconds=0.32, num_mel_bins=16),
    }[name]()
    (tmp_path / "files").mkdir()
    config.save_files(tmp_path / "files")
    for each in (config, config.with_files(tmp_path / "files")):
        assert {parameter.dtype for parameter in each.build_encoder().parameters()} == {torch.float32}


def test_models_that_are_not_there_or_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    WhisperConfig().save_pretrained(tmp_path)
    named = str(tmp_path)
    with pytest.raises(ConfigError, match="is of the family whisper, not audio-spectrogram-transformer"):
        audio.Config(pretrained=named).build_encoder()
    for config in (text.Config(pretrained="no/such/model"), audio.Config(architecture=f"{tmp_path}/nowhere")):
        with pytest.raises(ConfigError, match=r"^(text.pretrained|audio.architecture) = .*(no/such/model|nowhere)"):
            config.build_encoder()
    with pytest.raises(ConfigError, match=r"text.tokenizer = no/such/tokenizer"):
        text.Config(tokenizer="no/such/tokenizer").build_processor()
    with pytest.raises(ValueError, match="set one of the two"):
        text.Config(pretrained="a", architecture="b")


def test_the_checkpoint_alone_embeds_and_goes_on_when_the_pretrained_models_are_gone(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    recipe = write_data_set(tmp_path / "set", modalities=ALL)
    path = str(write_tiny_run(tmp_path, recipe, modalities=ALL))
    settings = [f"model.modalities={write_pretrained(hub)}", "train.keep_checkpoints=9", "train.checkpoint_every=1"]
    folder = train(load_run(path, overrides=settings))
    items = {"text": ["a red apple", "rain"], "image": [picture_bytes(1)] * 2, "audio": [sound_bytes(1), None]}
    first = mmfuse.load(find_checkpoint(folder), device="cpu").encode(**items)

    assert_embeds_on(find_checkpoint(folder), recipe, moved_to=tmp_path / "copied")
    with pytest.raises(ConfigError, match=r"image.architecture: the checkpoint .* has its own"):
        mmfuse.load(folder, overrides=["model.modalities.image.architecture=vit_base_patch16_224"])
    shutil.rmtree(hub)
    shutil.move(find_checkpoint(folder), tmp_path / "taken")
    alone = mmfuse.load(tmp_path / "taken", device="cpu")
    assert alone.processors["audio"].spectrum.mean == -6.8
    for name, rows in alone.encode(**items).items():
        assert torch.equal(rows, first[name]), name
    # The newest is gone: from step 1 on to the same weights, and to a checkpoint that is whole again.
    train(load_run(path, overrides=settings))
    again = mmfuse.load(find_checkpoint(folder), device="cpu").encode(**items)
    assert all(torch.equal(rows, first[name]) for name, rows in again.items())


def test_a_pretrained_sound_model_brings_its_normalisation_and_its_rate(tmp_path: Path) -> None:
    extractor = ASTFeatureExtractor(mean=-6.8, std=5.5, num_mel_bins=32, max_length=64)
    extractor.save_pretrained(tmp_path)
    ASTConfig(max_length=64, num_mel_bins=32).save_pretrained(tmp_path)
    config = audio.Config(architecture=str(tmp_path), clip_seconds=0.64, num_mel_bins=32)
    waveform = torch.randn(16_000 * 64 // 100 + 240, generator=torch.Generator().manual_seed(0)) * 0.1
    processor = config.build_processor()
    fbank = processor(processor.to_bytes((waveform, 16_000)), seed=None)["fbank"]
    expected = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    torch.testing.assert_close(fbank, expected[: len(fbank)], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="needs sample_rate = 16000"):
        audio.Config(architecture=str(tmp_path), sample_rate=8_000, num_mel_bins=32).build_processor()
