"""How members become samples."""

from pathlib import Path

import pytest
from helpers import write_tar

from mmfuse.data.tar_samples import SamplePlaces, TarSamples, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a.b/0001.SEG.Png", ("a.b/0001", "seg.png")),
        ("./0001.jpg", ("./0001", "jpg")),
        ("0001", ("0001", "")),
        (".hidden", ("", "hidden")),
        ("/etc/0001.jpg", ("/etc/0001", "jpg")),
        ("/0001.jpg", ("/0001", "jpg")),
        ("../../0001.jpg", ("../../0001", "jpg")),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_base_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_members_with_dots_before_their_extension_belong_to_the_key_before_the_first(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"img.0001.jpg": b"x", "img.0002.jpg": b"y"})
    assert list(TarSamples(shard)) == [SamplePlaces("img", ("0001.jpg", "0002.jpg"), [512, 1536], [1, 1])]


def test_members_without_key_or_extension_are_counted_and_part_no_sample(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"1.jpg": b"x", "README": b"x", "a/.b": b"x", ".c": b"x", "1.txt": b"y"})
    samples = TarSamples(shard)
    assert [(sample.key, sample.extensions) for sample in samples] == [("1", ("jpg", "txt"))]
    assert samples.others == 3
