"""Statistics against the members that they were made of."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import sound_bytes, write_tar
from PIL import ExifTags, Image
from unit.shards.hostile_set import huge_png, long_flac, write_shard

from mmfuse.data.recipe import MemberRule, Shard, place_shards
from mmfuse.errors import DataError, ShardError
from mmfuse.shards.balance import find_outliers
from mmfuse.shards.probe import Chosen, ProbeWork
from mmfuse.shards.stats import ShardRow, ShardStats, collect_stats
from mmfuse.shards.stats_table import to_table

pytestmark = pytest.mark.usefixtures("decoders_imported")


def stats_of(shards: Sequence[Shard], **options: Any) -> ShardStats:
    *_, last = collect_stats(shards, **options)
    return last


def picture(width: int, height: int, *, mode: str = "RGB", orientation: int = 1, kind: str = "JPEG") -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new(mode, (width, height)).save(file, kind, exif=exif)
    return file.getvalue()


def caption_shards(folder: Path, *, sizes: tuple[int, ...] = (700, 100, 200)) -> list[Shard]:
    return [
        write_shard(folder / f"{s}.tar", {f"{n:04}.txt": f"caption {n}".encode() for n in range(size)})
        for s, size in enumerate(sizes)
    ]


def test_counts_and_sizes_are_those_of_the_members(tmp_path: Path) -> None:
    a = write_shard(tmp_path / "a.tar", {"1.jpg": b"x" * 5, "1.txt": b"x", "2.jpg": b"x" * 7, "3.txt": b"xyz"})
    b = write_shard(tmp_path / "b.tar", {"1.txt": b"xx", "1.png": b"x" * 9, "2.cls": b"7"})
    stats = stats_of([a, b])
    assert (len(stats.rows), stats.samples) == (2, 5)
    assert stats.bytes == sum(Path(shard.parts[0]).stat().st_size for shard in (a, b))
    assert stats.subsets == {("image", "text"): 2, ("image",): 1, ("text",): 1, (): 1}
    assert stats.extensions == {("jpg", "txt"): 1, ("jpg",): 1, ("txt",): 1, ("png", "txt"): 1, ("cls",): 1}
    assert {e: (s.count, s.total, s.largest) for e, s in stats.member_bytes.items()} == {
        "jpg": (2, 12, 7), "txt": (3, 6, 3), "png": (1, 9, 9), "cls": (1, 1, 1)
    }  # fmt: skip
    assert [row.modalities for row in stats.rows] == [{"image": 2, "text": 2}, {"image": 1, "text": 1}]
    assert stats.probe is None and json.loads(stats.to_json())["probe"] is None


def test_headers_say_sizes_and_lengths_and_nothing_more_is_decoded(tmp_path: Path) -> None:
    wide = picture(300, 200)
    members = {
        "0.jpg": wide[: len(wide) // 2],  # its pixels are cut off
        "1.jpg": picture(64, 48, orientation=6),
        "2.png": huge_png(15_000),
        "3.webp": picture(50, 50, mode="RGBA", kind="WEBP"),
        "4.flac": long_flac(seconds=36_000),
        "5.ogg": sound_bytes(1, seconds=1.5),
        "6.jpg": b"<html>",
        "7.ogg": b"",
    }
    stats = stats_of([write_shard(tmp_path / "x.tar", members)], probe=True)
    assert stats.probe is not None
    pictures, sounds = stats.probe.pictures, stats.probe.sounds
    assert (pictures.width.total, pictures.height.total) == (300 + 48 + 15_000 + 50, 200 + 64 + 15_000 + 50)
    assert pictures.kinds.counts == {"JPEG RGB": 2, "PNG RGB": 1, "WEBP RGBA": 1}
    assert pictures.aspect.largest == 1.5 and pictures.shapes.sum() == 4
    assert (sounds.seconds.total, sounds.seconds.largest) == (36_001.5, 36_000)
    assert sounds.kinds.counts == {"1,000 Hz mono FLAC": 1, "16,000 Hz mono OGG": 1}
    assert stats.probe.unreadable == {"jpg": 1, "ogg": 1}
    assert (stats.rows[0].unreadable, stats.rows[0].means["seconds"]) == (2, 18_000.75)


def test_captions_are_counted_as_the_recipe_reads_them(tmp_path: Path) -> None:
    members = {"1.txt": b"a cat\n\nthe cat\n", "2.txt": b"a cat", "3.txt": b" \n", "4.txt": b"\xff"}
    shard = write_shard(tmp_path / "x.tar", members)
    lines = stats_of([shard], probe=True, rules={"text": MemberRule(extensions=("txt",), captions="lines")}).probe
    whole = stats_of([shard], probe=True).probe
    assert lines is not None and whole is not None
    assert (lines.captions.words.count, lines.captions.words.total, lines.captions.characters.total) == (3, 6, 17)
    assert lines.captions.common.most_common(2) == [("a cat", 2), ("the cat", 1)]
    assert (lines.captions.repeated, lines.captions.empty) == (pytest.approx(1 / 3), 1)
    assert (whole.captions.words.count, whole.captions.words.total, whole.captions.repeated) == (2, 6, 0)
    assert lines.unreadable == whole.unreadable == {"txt": 1}


def test_of_a_limit_every_shard_has_its_share_drawn_by_the_seed(tmp_path: Path) -> None:
    shards = caption_shards(tmp_path)
    first, again, other = (stats_of(shards, probe=True, limit=50, seed=seed) for seed in (1, 1, 2))
    assert first.probe is not None and again.probe is not None and other.probe is not None
    assert [row.probed for row in first.rows] == [35, 5, 10] and first.probe.samples == first.to_probe == 50
    assert first.probe.captions.distinct.count == len(first.probe.captions.common.counts) > 40
    assert first.to_json() == again.to_json() != other.to_json()
    assert first.samples == 1000 and first.subsets == {("text",): 1000}


def test_any_number_of_processes_and_no_limit_give_the_same(tmp_path: Path) -> None:
    shards = caption_shards(tmp_path)
    one, three = (stats_of(shards, probe=True, num_workers=workers) for workers in (1, 3))
    assert one.to_json() == three.to_json()
    assert one.probe is not None and one.probe.samples == 1000
    assert stats_of(shards, probe=True, limit=10**6).to_json() == one.to_json()


def test_progress_comes_with_every_shard_and_every_group_of_samples(tmp_path: Path) -> None:
    shards = caption_shards(tmp_path)
    seen = [(len(stats.rows), stats.probe.samples if stats.probe else 0) for stats in collect_stats(shards, probe=True)]
    assert seen == [(1, 0), (2, 0), (3, 0), (3, 512), (3, 700), (3, 800), (3, 1000)]


def test_a_member_that_a_process_died_over_counts_as_unreadable(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", {"1.txt": b"a", "1.ogg": sound_bytes(1), "2.txt": b"b"})
    rules = {"text": MemberRule(extensions=("txt",)), "audio": MemberRule(extensions=("ogg",))}
    marks: list[int] = []
    totals = ProbeWork(rules)(Chosen(shard, np.arange(2)), frozenset({1}), marks.append)
    assert totals.unreadable == {"ogg": 1} and totals.captions.words.count == 2
    assert [mark for mark in marks if mark >= 0] == [0, 1, 2]


def test_a_shard_that_has_changed_or_has_no_index_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", {"1.txt": b"x"})
    write_tar(Path(shard.parts[0]), {f"{n}.txt": b"x" for n in range(20)})
    with pytest.raises(ShardError, match=r"x\.tar: has another size"):
        stats_of([shard])
    (unknown,) = place_shards([str(write_tar(tmp_path / "y.tar", {"1.txt": b"x"}))], index_folder=None)
    with pytest.raises(ShardError, match=r"y\.tar: is not indexed"):
        stats_of([unknown])
    with pytest.raises(DataError, match="is remote"):
        stats_of(place_shards(["https://host/x.tar"], index_folder=tmp_path), probe=True)


def rows(*, samples: Sequence[int], **changes: ShardRow) -> list[ShardRow]:
    made = [ShardRow(f"{n}.tar", count, 1000 * count, Counter(image=count)) for n, count in enumerate(samples)]
    return [changes.get(f"at{place}", row) for place, row in enumerate(made)]


def test_shards_that_stand_out_are_named_with_what_is_typical() -> None:
    lacking = ShardRow("lacking.tar", 1000, 1_000_000, Counter(image=400))
    heavy = ShardRow("heavy.tar", 1000, 9_000_000, Counter(image=1000))
    broken = ShardRow("broken.tar", 1000, 1_000_000, Counter(image=1000), probed=100, unreadable=30)
    found = find_outliers(rows(samples=[1000 + n % 3 for n in range(40)], at7=lacking, at9=heavy, at12=broken))
    assert {(o.shard, o.what, o.value, o.typical) for o in found} >= {
        ("lacking.tar", "samples with image", "40.0%", "100.0%"),
        ("heavy.tar", "kB a sample", "9.0", "1.0"),
    }
    assert {o.shard for o in found} == {"lacking.tar", "heavy.tar"}  # of the broken one alone something was read


def test_shards_of_one_kind_and_few_shards_do_not_stand_out() -> None:
    noisy = [int(n) for n in np.random.default_rng(0).normal(10_000, 300, 200)]
    assert find_outliers(rows(samples=noisy)) == find_outliers(rows(samples=[1, 1000, 1000])) == []


def test_the_table_says_it_in_words_and_is_harmless_in_a_terminal(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", {"1.txt": b"two words", "1.\x1b[31m": b"x", "2.txt": b"two words"})
    table = to_table(stats_of([shard], probe=True))
    assert "1 shard, 2 samples, " in table and "caption, words" in table and "50.0% repeat another" in table
    assert "\x1b" not in table
