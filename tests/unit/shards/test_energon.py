"""What Megatron-Energon prepared is taken over, and what has changed since is named."""

import json
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import write_tar, write_yaml
from unit.shards.converted_sets import convert, count_readable

from mmfuse.data.recipe import load_recipe
from mmfuse.data.shard_index import build_index
from mmfuse.errors import DataError
from mmfuse.shards.energon import check_energon_offsets, import_energon_offsets

PAIR = [("1.jpg", b"j1"), ("1.txt", b"t1"), ("2.jpg", b"j2"), ("2.txt", b"t2")]


def write_energon(folder: Path, *, field_map: dict[str, str], exclude: Sequence[str] = ()) -> Path:
    """Three tars and the files that `energon prepare` of megatron-energon 7.4.1 writes beside them."""
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        long = f"{number}" * (150 if number else 50)  # a name with an extended header before its own
        members = [(f"{long}.jpg", b"x" * 700), (f"{long}.txt", b"t"), (f"{number}b.JPG", b"y"), ("README", b"r")]
        write_tar(folder / f"a_{number:03d}.tar", [*members, (f"{number}c.txt", b"z")], tar_format=form)
        write_energon_offsets(folder / f"a_{number:03d}.tar")
    counts = {f"a_{number:03d}.tar": 3 for number in range(3)}
    info = {"energon_version": "7.4.1", "shard_counts": counts}
    parts = {"train": ["a_{000..001}.tar"], "val": [], "test": ["a_002.tar"]}
    write_yaml(folder / ".nv-meta/split.yaml", {"split_parts": parts, "exclude": list(exclude)})
    (folder / ".nv-meta/.info.json").write_text(json.dumps(info, indent=2))
    sample_type = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
    write_yaml(folder / ".nv-meta/dataset.yaml", {"sample_type": sample_type, "field_map": field_map})
    return folder


def write_energon_offsets(shard: Path) -> None:
    """As `WebdatasetPreparator._preprocess_tar` does: where each sample's first header is, and the end of the last."""
    offsets, last = [], None
    with tarfile.open(shard) as tar:
        for member in tar:
            key, dot, _ = member.name.partition(".")
            if dot and key != last:
                offsets.append(member.offset)
                last = key
        offsets.append(tar.offset)
    shard.with_suffix(".tar.idx").write_bytes(struct.pack(f"{len(offsets)}Q", *offsets))


def test_what_energon_prepared_needs_nothing_but_a_recipe_with_its_splits_and_fields(tmp_path: Path) -> None:
    source = write_energon(tmp_path / "in", field_map={"image": "jpg,png", "caption": "txt", "boxes": "npy"})
    last = convert(source, source)
    recipe, _ = load_recipe(str(last.recipe))
    assert {name: (split.shards, split.samples) for name, split in recipe.splits.items()} == {
        "train": (("a_000.tar", "a_001.tar"), 6),
        "test": (("a_002.tar",), 3),
    }
    assert {name: rule.extensions for name, rule in recipe.members.items()} == {
        "image": ("jpg", "png"),
        "text": ("txt",),
    }
    assert last.notes[1:] == ("the field 'boxes' (npy) is of no modality and is not read",)
    assert last.problems == 0
    assert (count_readable(last.recipe), count_readable(last.recipe, "test")) == (6, 3)


def test_captions_in_json_and_excluded_shards_are_carried_over_and_excluded_samples_told(tmp_path: Path) -> None:
    fields = {"image": "jpg", "caption": "json[caption]"}
    source = write_energon(tmp_path / "in", field_map=fields, exclude=["a_000.tar", "a_001.tar/1b"])
    last = convert(source, source)
    recipe, _ = load_recipe(str(last.recipe))
    assert recipe.splits["train"].shards == ("a_001.tar",)
    assert recipe.members["text"].extensions == ("json",)
    assert recipe.members["text"].captions.keys == {"caption": 1.0}
    assert "excludes 1 single samples, such as a_001.tar/1b" in last.notes[1]


def test_energon_s_offsets_are_those_of_the_index_until_a_shard_changes(tmp_path: Path) -> None:
    source = write_energon(tmp_path / "in", field_map={})
    for shard in sorted(source.glob("*.tar")):
        index = build_index(shard, shard.with_name(shard.name + ".mmindex"))
        assert len(import_energon_offsets(shard)) == len(index) + 1 == 4
        assert check_energon_offsets(shard, index) is None
    write_tar(source / "a_000.tar", [("1.jpg", b"x" * 3000), ("2.jpg", b"y"), ("3.jpg", b"z")])
    write_tar(source / "a_001.tar", [("1.jpg", b"x")])
    cut = write_tar(source / "a_003.tar", PAIR)
    write_energon_offsets(cut)
    write_tar(cut, [*PAIR[:3], ("2.txt", b"t" * 513)])
    index = build_index(cut, tmp_path / "cut.mmindex")
    assert "its last sample ends at byte 4608, Energon's list says 4096" in check_energon_offsets(cut, index)
    (source / "a_002.tar.idx").write_bytes(b"\0" * 30)
    _, moved, fewer, broken = convert(source, source).notes
    assert moved.startswith(f"{source}/a_000.tar: sample 1 of Energon's list starts at byte")
    assert fewer == f"{source}/a_001.tar: has 1 samples, Energon prepared 3: it has changed since"
    assert broken.startswith(f"{source}/a_002.tar.idx: has 30 bytes")
    (source / "a_002.tar.idx").unlink()
    assert import_energon_offsets(source / "a_002.tar") is None
    (source / "a_002.tar.idx").mkdir()
    assert convert(source, source).notes[-1] == f"{source}/a_002.tar.idx: cannot be read: Is a directory"


def test_half_written_metadata_of_energon_is_refused(tmp_path: Path) -> None:
    source = write_energon(tmp_path / "in", field_map={})
    (source / ".nv-meta/split.yaml").write_text("split_parts: [train]\n")
    with pytest.raises(DataError, match=r"\.nv-meta: not as `energon prepare` writes it"):
        convert(source, source)
