"""Folders of files: which of them make a sample."""

from pathlib import Path

import pytest
from unit.shards.built_sets import (
    build,
    read_indexed,
    read_tars,
    write_files,
)

from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.errors import ConfigError


def test_files_of_one_stem_in_a_folder_or_below_are_one_sample(tmp_path: Path) -> None:
    files = {"a/1.jpg": b"j", "a/1.txt": b"t", "a/1.JSON": b"{}", "a-b/1.wav": b"w", "2.v1.png": b"p", ".x/y.txt": b"h"}
    folder = write_files(tmp_path / "in", files | {"a/.DS_Store": b"h", "a/1/2.txt": b"deep"})
    assert build(folder, to=tmp_path / "out", shuffle=False).samples == 4
    assert read_tars(tmp_path / "out") == read_indexed(tmp_path / "out")
    assert read_tars(tmp_path / "out") == {
        "2_v1": {"png": b"p"},
        "a/1": {"jpg": b"j", "json": b"{}", "txt": b"t"},
        "a/1/2": {"txt": b"deep"},
        "a-b/1": {"wav": b"w"},
    }


def test_files_that_no_modality_reads_are_refused_with_what_is_read(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"1.jpg": b"j", "1.gif": b"g", "2.gif": b"g", "README": b"r"})
    with pytest.raises(ConfigError, match=r"2 \*\.gif, 1 README; remove or ignore them. Known are \.flac \.jpeg \.jpg"):
        build(folder, to=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    last = build(folder, to=tmp_path / "out", folder={"ignore": ["*.gif", "README"]})
    assert read_tars(tmp_path / "out") == {"1": {"jpg": b"j"}} and last.rows == 1


def test_parallel_folders_are_joined_by_stem(tmp_path: Path) -> None:
    files = {f"images/{n}.jpg": b"j%d" % n for n in (1, 2, 10)} | {f"captions/{n}.txt": b"t" for n in (2, 10, 3)}
    folder = write_files(tmp_path / "in", files | {"images/x/1.jpg": b"jx", "captions/x/1.txt": b"tx"})
    build(folder, to=tmp_path / "out", folder={"layout": "parallel"})
    assert read_tars(tmp_path / "out") == {
        "1": {"jpg": b"j1"},
        "2": {"jpg": b"j2", "txt": b"t"},
        "3": {"txt": b"t"},
        "10": {"jpg": b"j10", "txt": b"t"},
        "x/1": {"jpg": b"jx", "txt": b"tx"},
    }


def test_folders_of_classes_give_captions_and_groups(tmp_path: Path) -> None:
    files = {"red_fox/1.jpg": b"1", "red_fox/2.jpg": b"2", "cat/1.jpg": b"3", "cat/9.jpg": b"4", "cat/9.txt": b"own"}
    folder = write_files(tmp_path / "in", files)
    last = build(folder, to=tmp_path / "out", folder={"caption": "a photo of a {}"})
    captions = {key: members["txt"] for key, members in read_tars(tmp_path / "out").items()}
    fox, cat = b"a photo of a red fox\n", b"a photo of a cat\n"
    assert captions == {"red_fox/1": fox, "red_fox/2": fox, "cat/1": cat, "cat/9": b"own"}
    source = open_source(SourceConfig(recipe=str(last.recipe)), modalities=("image", "text"))
    groups = [(raw.key.partition("/")[0], raw.group) for raw in map(source.read, range(4))]
    assert sorted(groups) == [("cat", "cat"), ("cat", "cat"), ("red_fox", "red_fox"), ("red_fox", "red_fox")]
