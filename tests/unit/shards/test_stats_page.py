"""The statistics page: hostile names, missing parts, and that every figure is there."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import picture_bytes, sound_bytes
from html_pages import Page
from unit.shards.hostile_set import write_shard

from mmfuse.shards.sketch import Sketch
from mmfuse.shards.stats import ShardRow, ShardStats, collect_stats
from mmfuse.shards.stats_page import render_stats

pytestmark = pytest.mark.usefixtures("decoders_imported")

HOSTILE = "<script>alert(1)</script> \"' onerror=x"


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> ShardStats:
    folder = tmp_path_factory.mktemp("shards")
    first = {"1.jpg": picture_bytes(1), "1.txt": HOSTILE.encode(), "2.txt": HOSTILE.encode(), "2.ogg": sound_bytes(2)}
    second = {"3.jpg": picture_bytes(3, size=60), "3.<img src=x>": b"x", "4.jpg": b"no picture"}
    shards = [write_shard(folder / "a<b>.tar", first), write_shard(folder / "b.tar", second)]
    *_, stats = collect_stats(shards, probe=True)
    return stats


def test_names_and_captions_from_data_are_shown_as_text(probed: ShardStats) -> None:
    page = Page(render_stats(probed, title=HOSTILE))
    page.assert_harmless()
    assert page.html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2 + 1  # title and heading; repeated caption
    assert "a&lt;b&gt;.tar" in page.html and ".&lt;img src=x&gt;" in page.html
    assert not page.count("b" if "<b>.tar" in page.html else "script")


def test_every_modality_has_its_figures_and_the_mix_its_rows(probed: ShardStats) -> None:
    page = Page(render_stats(probed, title="x"))
    assert page.count("svg") == 3 + 1 + 2 + 3 + 2  # pictures, sounds, captions, members, shards
    dots = [name for name in page.classes("td") if name.startswith("dot")]
    assert len(dots) == len(probed.subsets) * 3 and page.html.count("&#9679;") == sum(map(len, probed.subsets))
    assert "1.00 unreadable" not in page.html and "<b>1</b>" in page.html


def test_a_page_without_probe_or_without_samples_is_whole(tmp_path: Path) -> None:
    *_, counted = collect_stats([write_shard(tmp_path / "x.tar", {"1.txt": b"x"})])
    page = Page(render_stats(counted, title="x"))
    page.assert_harmless()
    assert page.count("svg") == 1 and "Captions" not in page.html
    assert Page(render_stats(ShardStats(modalities=("text",)), title="empty")).count("svg") == 0


def test_many_shards_and_samples_stay_a_small_page(probed: ShardStats) -> None:
    sizes = Sketch()
    sizes.add(np.random.default_rng(0).lognormal(9, 3, 100_000).astype(np.int64))
    rows = [ShardRow(f"{n}.tar", 10_000, 10**9 + n, Counter(image=9000)) for n in range(20_000)]
    rows[777] = ShardRow("odd.tar", 10_000, 10**9, Counter(image=10))
    stats = ShardStats(
        modalities=("image",), samples=2 * 10**8, bytes=2 * 10**13, subsets=Counter({("image",): 10**8, (): 10**8}),
        member_bytes={"jpg": sizes}, rows=rows, probe=probed.probe,
    )  # fmt: skip
    page = Page(render_stats(stats, title="large"))
    assert len(page.html) < 1_000_000
    assert "odd.tar" in page.html and "The first 500 shards" in page.html and "200M" in page.html
