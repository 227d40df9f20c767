"""Embeddings of what a user has in hand: in any form, any subset, any company, the same numbers."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import picture_bytes, sound_bytes
from PIL import Image

import mmfuse
from mmfuse.embed.embedder import Embedder
from mmfuse.errors import CheckpointError, ConfigError, SampleError


@pytest.fixture(scope="module")
def embedder(run_folder: Path) -> Embedder:
    return mmfuse.load(run_folder, device="cpu")


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_picture_has_one_embedding_in_every_form(embedder: Embedder, tmp_path: Path) -> None:
    data = picture_bytes(1)
    (tmp_path / "a.jpg").write_bytes(data)
    picture = Image.open(io.BytesIO(data))
    pixels = np.asarray(picture)
    forms = [data, tmp_path / "a.jpg", str(tmp_path / "a.jpg"), picture, pixels]
    forms.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    rows = embedder.encode(image=forms)["image"]
    assert rows.shape == (len(forms), embedder.run.model.embedding_dim)
    assert_same(rows, rows[:1].expand_as(rows))
    assert not torch.allclose(rows[:1], embedder.encode(image=picture_bytes(2))["image"], atol=1e-3)


def test_a_picture_that_lies_on_its_side_stands_upright_in_every_form(embedder: Embedder, tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(picture_bytes(1))).crop((0, 0, 40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    rows = embedder.encode(image=[tmp_path / "a.png", Image.open(tmp_path / "a.png"), upright, picture.convert("CMYK")])
    assert_same(rows["image"][:3], rows["image"][2:3].expand(3, -1))
    assert not torch.allclose(rows["image"][3], rows["image"][2], atol=1e-3)


def test_a_grey_picture_of_32_bits_is_the_one_of_16(embedder: Embedder, tmp_path: Path) -> None:
    grey = (np.random.default_rng(0).random((32, 32)) * 60_000).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    rows = embedder.encode(image=[tmp_path / "grey.png", Image.fromarray(grey.astype(np.int32))])["image"]
    assert_same(rows[:1], rows[1:])


def test_a_sound_has_one_embedding_in_every_form(embedder: Embedder, tmp_path: Path) -> None:
    (tmp_path / "a.ogg").write_bytes(sound_bytes(1))
    values, rate = soundfile.read(tmp_path / "a.ogg", dtype="float32")
    stereo = np.stack([values, values], axis=1)
    forms = [sound_bytes(1), tmp_path / "a.ogg", str(tmp_path / "a.ogg"), (values, rate), (stereo, rate)]
    forms += [(torch.from_numpy(stereo.T.copy()), rate), (values.astype(np.float64), rate)]
    rows = embedder.encode(audio=forms)["audio"]
    assert_same(rows, rows[:1].expand_as(rows))


def test_an_item_does_not_depend_on_its_company(embedder: Embedder) -> None:
    texts = ["a", "a much longer name of a thing", None, "sun", "sun"]
    images = [picture_bytes(n) for n in range(4)] + [None]
    sounds = [None, sound_bytes(1, seconds=0.1), sound_bytes(2), None, None]
    together = embedder.encode(text=texts, image=images, audio=sounds)
    in_twos = embedder.encode(text=texts, image=images, audio=sounds, batch_size=2)
    assert together.keys() == {"text", "image", "audio", "fused"}
    for name, rows in together.items():
        assert_same(in_twos[name], rows)
        norms = rows.norm(dim=1)
        present = {"text": texts, "image": images, "audio": sounds}.get(name, [1] * 5)
        assert_same(norms, torch.tensor([float(item is not None) for item in present]))
    alone = embedder.encode(text="sun")
    assert alone.keys() == {"text", "fused"}
    for name in alone:
        assert_same(alone[name], together[name][4:])


def test_what_cannot_be_encoded_is_told_by_its_place(embedder: Embedder, tmp_path: Path) -> None:
    for wrong, message in (
        ({"image": [picture_bytes(1), b"junk"]}, "image of item 1: not a readable JPEG, PNG or WebP"),
        ({"image": np.zeros((4, 4, 3))}, r"image of item 0: .* uint8 pixels, got ndarray \(4, 4, 3\) of float64"),
        ({"image": np.zeros((2, 4, 4, 3), np.uint8)}, "several pictures are a list"),
        ({"audio": np.zeros(9, np.float32)}, "audio of item 0: expected a path or"),
        ({"audio": (np.zeros(9, np.int16), 8000)}, "expected a waveform of floats"),
        ({"audio": "none.wav"}, "audio of item 0: none.wav: cannot be read: .*No such file"),
        ({"audio": tmp_path / "none.wav"}, "none.wav: cannot be read"),
        ({"image": Image.new("F", (9, 9))}, "image of item 0: a picture of floats"),
        (
            {"image": Image.open(io.BytesIO(picture_bytes(1)[:-60]))},
            "image of item 0: OSError: ",
        ),
        ({"audio": (np.zeros(9, np.float32), 2**70)}, "audio of item 0: .*Error"),
        ({"text": ["a", 7]}, "text of item 1: expected a str, got int"),
        ({"text": "  "}, "text of item 0: the text is empty"),
    ):
        with pytest.raises(SampleError, match=message):
            embedder.encode(**wrong)
    for wrong, message in (
        ({"txt": "a"}, r"no modality 'txt'.*text"),
        ({"text": ["a"], "image": []}, "different numbers of items: text 1, image 0"),
        ({}, "nothing to encode; give one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            embedder.encode(**wrong)


def test_only_a_checkpoint_or_a_run_s_folder_is_loaded(run_folder: Path, embedder: Embedder) -> None:
    assert embedder.checkpoint == run_folder / "checkpoints/step_00000001"
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        mmfuse.load(run_folder.parent)
