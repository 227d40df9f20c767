"""Our encoders give what the libraries give from the same weights, and padding changes nothing."""

import pytest
import timm
import torch
import torch.nn.functional as F
from batches import LETTERS, random_features, tiny_model, tiny_processors
from helpers import TINY_MODALITIES
from timm.models import save_for_hf
from transformers import (
    ASTConfig,
    ASTModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from unit.modalities.members import photograph, picture_file

from mmfuse.errors import ConfigError
from mmfuse.modalities import audio, image, text
from mmfuse.modalities.adaptation.lora import LoraConfig

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def collated(modality: str, seeds: range):
    return tiny_processors()[modality].collate([random_features(modality, seed=seed) for seed in seeds])


def built(modality: str):
    return tiny_model().modality_configs[modality].build_encoder().eval()


def test_text_from_a_local_folder_equals_the_library(tmp_path):
    bert = BertModel(BertConfig(vocab_size=6368, **SIZES), add_pooling_layer=False).eval()
    bert.save_pretrained(tmp_path)
    encoder = text.Config(pretrained=str(tmp_path), pooling="cls").build_encoder().eval()
    inputs = collated("text", range(5))
    mask = inputs["attention_mask"].long()
    second = mask * (torch.arange(mask.shape[1]) >= inputs["second"][:, None])
    assert second.any(1).tolist() == [False, True, True, False, True]  # as texts of one and of two sentences
    expected = bert(inputs["input_ids"], attention_mask=mask, token_type_ids=second).last_hidden_state
    output = encoder(inputs)
    assert encoder.width == 16
    torch.testing.assert_close(output.tokens, expected, rtol=0, atol=0)
    torch.testing.assert_close(output.pooled, expected[:, 0], rtol=0, atol=0)


def test_pretrained_text_of_any_family_has_the_dropout_of_the_settings_and_no_pooler(tmp_path):
    bert = BertModel(BertConfig(vocab_size=6368, **SIZES))  # with its pooler, and dropout of 0.1
    distilbert = DistilBertModel(DistilBertConfig(vocab_size=6368, dim=16, n_layers=1, n_heads=2, hidden_dim=32))
    inputs = collated("text", range(5))
    for model in (bert, distilbert):
        model.save_pretrained(tmp_path / type(model).__name__)
        for dropout in (0.0, 0.5):
            config = text.Config(pretrained=str(tmp_path / type(model).__name__), dropout=dropout)
            encoder = config.build_encoder().train()
            first, again = encoder(inputs), encoder(inputs)
            assert torch.equal(first.pooled, again.pooled) is (dropout == 0)
            first.pooled.sum().backward()
            assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_sound_through_a_vit_of_pictures_equals_the_library_on_a_full_clip(tmp_path):
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    pictures = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=10, **sizes)
    save_for_hf(pictures, tmp_path)
    config = audio.Config(encoder="vit", pretrained=f"local-dir:{tmp_path}", clip_seconds=0.48, num_mel_bins=32)
    encoder = config.build_encoder().eval()
    proj = encoder.vit.patch_embed.proj.weight
    torch.testing.assert_close(proj, pictures.patch_embed.proj.weight.sum(1, keepdim=True))
    fbank = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(3))
    expected = encoder.vit.forward_features(fbank.transpose(1, 2)[:, None])[:, 1:].unflatten(1, (2, 3)).mean(1)
    output = encoder({"fbank": fbank, "frames": torch.tensor([48, 48])})
    torch.testing.assert_close(output.tokens, expected, rtol=0, atol=1e-6)
    again = config.with_files(tmp_path).build_encoder()  # fresh weights of the same structure
    again.load_state_dict(encoder.state_dict())
    with pytest.raises(ConfigError, match="no_such_vit is no ViT that timm can build"):
        audio.Config(encoder="vit", architecture="no_such_vit").build_encoder()
    with pytest.raises(ConfigError, match="resnet18 is no"):
        audio.Config(encoder="vit", architecture="resnet18").build_encoder()


@pytest.mark.parametrize(("kind", "registers"), [("gap", 4), ("siglip", 0)])
def test_pictures_of_several_shapes_in_one_batch_are_what_the_library_makes_of_each(kind, registers):
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 3}
    config = image.Config(architecture=f"naflexvit_base_patch16_{kind}", max_patches=12, **sizes)
    encoder, processor = config.build_encoder().eval(), config.build_processor()
    features = [processor(picture_file(photograph(*size)), seed=None) for size in ((64, 48), (60, 60), (20, 90))]
    assert [tuple((item["place"].max(0).values + 1).tolist()) for item in features] == [(3, 4), (3, 3), (6, 2)]
    together = encoder(processor.collate(features))
    assert together.mask.sum(1).tolist() == [12 + registers, 9 + registers, 12 + registers]
    for row, item in enumerate(features):
        pixels = (item["patches"].float() / 255 - 0.5) / 0.5
        vit = encoder.vit
        expected = vit.fc_norm(vit.forward_features(pixels[None], patch_coord=item["place"][None])["patches"])
        torch.testing.assert_close(together.tokens[row, : expected.shape[1]], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.pooled[row], expected[0, registers:].mean(0), rtol=0, atol=1e-5)
    crops = [processor(picture_file(photograph(300, 60)), seed=seed)["place"].max(0).values + 1 for seed in range(20)]
    assert (
        all(rows * columns <= 12 and columns >= 2 * rows for rows, columns in crops) and len(set(map(str, crops))) > 1
    )


def test_naflex_weights_with_a_pooling_are_loaded_without_it(tmp_path):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    vit = timm.create_model("naflexvit_base_patch16_siglip", **sizes)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    config = image.Config(
        architecture="naflexvit_base_patch16_siglip",
        pretrained=str(tmp_path / "vit.pt"),
        **{"max_patches": 9, "hidden_size": 24, "num_layers": 1, "num_heads": 3},
    )
    found = config.build_encoder().vit.state_dict()
    assert all(torch.equal(tensor, vit.state_dict()[name]) for name, tensor in found.items())
    assert not any("attn_pool" in name for name in found)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (image.Config(architecture="naflexvit_base_patch16_gap", max_patches=9, pooling="cls"), "image.pooling = cls"),
        (image.Config(architecture="vit_medium_patch16_gap_240", pooling="cls"), "image.pooling = cls"),
        (audio.Config(encoder="vit", architecture="vit_medium_patch16_gap_240", pooling="cls"), "audio.pooling = cls"),
        (audio.Config(encoder="vit", num_mel_bins=80), "64 mel bins and 8 frames do not fill num_mel_bins = 80"),
        (audio.Config(encoder="vit", time_stride=300), "64 mel bins and 300 frames do not fill .* 256 frames"),
        (audio.Config(encoder="vit", architecture="deit_tiny_distilled_patch16_224"), "no ViT that timm can build"),
        (audio.Config(encoder="vit", architecture="vit_tiny_r_s16_p8_224"), "no Vision Transformer with learned"),
    ],
)
def test_what_an_architecture_cannot_do_is_refused_before_the_first_step(config, message):
    with pytest.raises(ConfigError, match=message):
        config.build_encoder()


@pytest.mark.parametrize(
    ("architecture", "max_patches"), [("naflexvit_base_patch16_gap", None), ("vit_tiny_patch16_224", 9)]
)
def test_a_shape_that_the_architecture_does_not_take_is_refused(architecture, max_patches):
    with pytest.raises(ConfigError, match=f"{architecture}: image.max_patches = {max_patches}; naflexvit"):
        image.Config(architecture=architecture, max_patches=max_patches).build_processor()


def test_image_weights_of_another_size_are_fitted(tmp_path):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, **sizes)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    config = image.Config(pretrained=str(tmp_path / "vit.pt"), image_size=32, hidden_size=24, num_layers=1, num_heads=3)
    encoder = config.build_encoder()
    assert encoder(collated("image", range(2))).tokens.shape == (2, 5, 24)
    assert torch.equal(encoder.vit.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)


def test_an_ast_of_another_clip_length_is_refused_when_it_is_built(tmp_path):
    shape = {"patch_size": 16, "frequency_stride": 16, "time_stride": 8, "max_length": 48, "num_mel_bins": 16}
    ASTModel(ASTConfig(**SIZES, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"needs clip_seconds = 0.48 and num_mel_bins = 16"):
        audio.Config(pretrained=str(tmp_path), clip_seconds=0.32, num_mel_bins=16).build_encoder()
    with pytest.raises(ValueError, match="patch_size = 64 does not fit 32 frames"):
        audio.Config(clip_seconds=0.32)


def test_image_from_a_local_file_equals_the_library_with_its_own_normalisation(tmp_path):
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    config = image.Config(pretrained=str(tmp_path / "vit.pt"), image_size=32, hidden_size=24, num_layers=1, num_heads=3)
    encoder = config.build_encoder().eval()
    inputs = collated("image", range(3))
    mean, std = (torch.tensor(vit.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert mean.flatten().tolist() == [0.5, 0.5, 0.5]  # augreg, not ImageNet's
    expected = vit.forward_features((inputs["pixels"] / 255 - mean) / std)
    torch.testing.assert_close(encoder(inputs).tokens, expected, rtol=1e-5, atol=1e-5)


def test_audio_from_a_local_folder_equals_the_library_on_a_full_clip(tmp_path):
    shape = {"patch_size": 16, "frequency_stride": 16, "time_stride": 8, "max_length": 32, "num_mel_bins": 32}
    ast = ASTModel(ASTConfig(**SIZES, **shape)).eval()
    ast.save_pretrained(tmp_path)
    encoder = audio.Config(pretrained=str(tmp_path), clip_seconds=0.32, num_mel_bins=32, pooling="cls").build_encoder()
    fbank = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    output = encoder.eval()({"fbank": fbank, "frames": torch.tensor([32, 32])})
    expected = ast(input_values=fbank)
    torch.testing.assert_close(output.pooled, expected.pooler_output, rtol=1e-5, atol=1e-6)
    patches = expected.last_hidden_state[:, 2:].unflatten(1, (2, 3)).mean(1)  # 2 bands, 3 times
    torch.testing.assert_close(output.tokens, patches, rtol=1e-5, atol=1e-6)


def test_whisper_from_a_local_folder_equals_the_library_in_features_and_tokens(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    shape = WhisperConfig(**sizes, decoder_layers=1, decoder_attention_heads=2, max_source_positions=50)
    whisper = WhisperModel(shape).eval()
    whisper.save_pretrained(tmp_path)
    extractor = WhisperFeatureExtractor()
    extractor.save_pretrained(tmp_path)
    settings = {"encoder": "whisper", "pretrained": str(tmp_path), "clip_seconds": 1.0, "num_mel_bins": 80}
    config = audio.Config(**settings, token_stride=1)
    waveforms = [torch.randn(n, generator=torch.Generator().manual_seed(n)).numpy() * 0.1 for n in (16_000, 6_400)]
    clip = {"sampling_rate": 16_000, "max_length": 16_000, "padding": "max_length", "return_tensors": "pt"}
    heard = extractor(waveforms, **clip)["input_features"]
    processor = config.build_processor()
    inputs = processor.collate([processor(processor.to_bytes((w, 16_000)), seed=None) for w in waveforms])
    torch.testing.assert_close(inputs["fbank"].transpose(1, 2), heard, rtol=0, atol=1e-5)
    assert inputs["frames"].tolist() == [100, 40]

    expected = whisper.encoder(inputs["fbank"].transpose(1, 2)).last_hidden_state
    output = config.build_encoder().eval()(inputs)
    assert output.mask.sum(1).tolist() == [50, 20]
    torch.testing.assert_close(output.tokens, expected * output.mask[..., None], rtol=0, atol=0)
    torch.testing.assert_close(output.pooled[1], expected[1, :20].mean(0))
    pooled = audio.Config(**settings, token_stride=8).build_encoder().eval()(inputs)
    assert pooled.mask.sum(1).tolist() == [7, 3]
    torch.testing.assert_close(pooled.tokens[1, 2], expected[1, 16:20].mean(0))
    with pytest.raises(ConfigError, match=r"needs clip_seconds = 1.0 and num_mel_bins = 80"):
        audio.Config(**settings | {"clip_seconds": 2.0}).build_encoder()
    with pytest.raises(ValueError, match="has no class token"):
        audio.Config(encoder="whisper", pooling="cls")


def test_a_row_does_not_depend_on_its_batch_mates_or_their_padding():
    for modality in LETTERS.values():
        encoder = built(modality)
        together, alone = encoder(collated(modality, range(6))), encoder(collated(modality, range(2, 3)))
        length = int(alone.mask[0].sum())
        torch.testing.assert_close(together.pooled[2], alone.pooled[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.tokens[2, :length], alone.tokens[0, :length], rtol=1e-4, atol=1e-5)


def test_sound_after_the_last_real_patch_is_not_heard():
    settings = {**TINY_MODALITIES["audio"], "num_mel_bins": 32}  # two bands, so that masks must follow AST's order
    encoder = audio.Config.model_validate(settings).build_encoder().eval()
    fbank = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(1))
    other = fbank.clone()
    other[:, 24:] += 3.0  # patches start at 0, 8, 16 and are 16 long; the last real one ends at 24
    frames = torch.tensor([9])
    first, second = (encoder({"fbank": x, "frames": frames}) for x in (fbank, other))
    assert first.mask.tolist() == [[True, True, False]]
    torch.testing.assert_close(first.pooled, second.pooled, rtol=0, atol=1e-6)
    heard = encoder({"fbank": other, "frames": torch.tensor([32])})
    assert not torch.allclose(heard.pooled, second.pooled, atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("frames", [1, 9, 17, 48])
@pytest.mark.parametrize(("kind", "most"), [("ast", 5), ("vit", 6)])  # patches of 16 frames, and of 8
def test_a_clip_is_heard_the_same_whatever_its_padding(kind, most, frames, pooling):
    settings = {"clip_seconds": 0.48, "num_mel_bins": 32, "patch_size": 16, "frequency_stride": 16, "time_stride": 8}
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "pooling": pooling}
    encoder = audio.Config(encoder=kind, **settings, **sizes).build_encoder()
    fbank = torch.randn(1, frames, 32, generator=torch.Generator().manual_seed(frames))
    real = min(-(-frames // 8), most)
    heard = {
        length: encoder.eval()({"fbank": F.pad(fbank, (0, 0, 0, length - frames)), "frames": torch.tensor([frames])})
        for length in (frames, frames + 3, 48, 60)
    }
    assert heard[frames].tokens.shape == (1, real, 32) and heard[frames].mask.all()
    assert heard[48].tokens.shape == heard[60].tokens.shape == (1, most, 32)
    for output in heard.values():
        torch.testing.assert_close(output.pooled, heard[48].pooled, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.tokens[:, :real], heard[48].tokens[:, :real], rtol=0, atol=1e-5)
        assert output.mask.sum() == real


def test_short_clips_cost_few_tokens_and_no_clip_the_fewest():
    encoder, processor = audio.Config().build_encoder(), audio.Config().build_processor()
    inputs = processor.collate([{"fbank": torch.randn(frames, 64)} for frames in (30, 50)])
    assert inputs["fbank"].shape == (2, 50, 64) and inputs["frames"].tolist() == [30, 50]
    assert inputs["fbank"][0, 30:].eq(0).all()
    assert encoder(inputs).mask.sum(1).tolist() == [4, 7]  # a patch starts every 8 frames
    assert encoder(inputs).tokens.shape[1] == 7
    assert encoder(encoder.minimal_inputs(torch.device("cpu"))).tokens.shape[1] == 1


def test_weights_have_the_names_and_the_order_of_the_library_s():
    encoder = audio.Config().build_encoder()
    assert list(encoder.ast.state_dict()) == list(ASTModel(encoder.ast.config).state_dict())


def test_a_fresh_ast_starts_with_tame_gradients():
    encoder = built("audio").train()
    encoder(collated("audio", range(4))).pooled.square().sum().backward()
    norm = encoder.ast.embeddings.cls_token.grad.norm()
    assert norm < 10, f"{norm}: transformers' zero tokens would give thousands"


def test_lora_of_an_encoder_that_reads_weights_instead_of_calling_maps_learns_everywhere():
    config = image.Config(
        architecture="beit_base_patch16_224", image_size=32, num_layers=1, hidden_size=24, num_heads=3
    )
    encoder = config.model_copy(update={"lora": LoraConfig(rank=2)}).build_trained_encoder()
    encoder(encoder.minimal_inputs(torch.device("cpu"))).pooled.sum().backward()
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    assert any("mlp.fc1.lora_A" in name for name in trained) and not any("qkv" in name for name in trained)
    assert all(gradient is not None for gradient in trained.values())
