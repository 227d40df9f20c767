"""Pages of samples: who is chosen, what is shown of them, and what hostile ones can do to the page."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import picture_bytes, sound_bytes
from html_pages import Page
from unit.shards.deadly_modality import DeadlyConfig
from unit.shards.hostile_set import hostile_members, write_shard

from mmfuse.data.recipe import MemberRule, Shard, place_shards
from mmfuse.errors import DataError
from mmfuse.shards.check import check_shards
from mmfuse.shards.findings import write_findings
from mmfuse.shards.view import draw_samples, find_keys, read_findings, render_samples
from mmfuse.shards.view_card import Wanted

pytestmark = pytest.mark.usefixtures("decoders_imported")

TEXT = {"text": MemberRule(extensions=("txt",))}
HOSTILE = "<script>alert(1)</script> \"' onerror=x <img src=https://example.org/x.png>"


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    members = [{f"{n:03}.txt": b"text %d" % n for n in range(start, start + 30)} for start in (0, 30, 60)]
    return [write_shard(tmp_path / f"{n}.tar", part) for n, part in enumerate(members)]


def show(wanted: list[Wanted], **options) -> Page:
    page = Page(render_samples(wanted, title="x", **options))
    page.assert_harmless()
    return page


def sources(page: Page, tag: str) -> list[str]:
    return [str(attributes["src"]) for name, attributes in page.tags if name == tag]


def uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def test_samples_are_drawn_by_the_seed_evenly_from_all_shards(shards: list[Shard]) -> None:
    drawn = draw_samples(shards, count=20, seed=3)
    assert drawn == draw_samples(shards, count=20, seed=3) != draw_samples(shards, count=20, seed=4)
    assert len(set(drawn)) == 20 and {sample.shard for sample in drawn} == set(shards)
    everything = [Wanted(shard, number) for shard in shards for number in range(30)]
    assert draw_samples(shards, count=1000) == everything and draw_samples([], count=3) == []


def test_keys_are_found_in_any_shard_and_unknown_ones_named(shards: list[Shard]) -> None:
    assert find_keys(shards, ["061", "003"]) == [Wanted(shards[0], 3), Wanted(shards[2], 1)]
    with pytest.raises(DataError, match=r"none of 3 shards has a sample '004\.txt'"):
        find_keys(shards, ["003", "004.txt"])


def test_the_findings_of_a_check_and_a_run_lead_to_their_samples(tmp_path: Path) -> None:
    bad = {"2.txt": b"", "3.jpg": b"no", "3.txt": b"\xff", "4.cls": b"x", "\udcff5.txt": b" "}
    shard = write_shard(tmp_path / "x.tar", {"1.txt": b"good", **bad})
    with open(tmp_path / "bad.jsonl", "w") as file:
        list(write_findings(check_shards([shard]), file))
    found = read_findings(tmp_path / "bad.jsonl")
    assert [sample.number for sample in found] == [1, 2, 4]
    assert found[1].note.startswith(".jpg: not_decodable: ") and "; .txt: not_decodable: " in found[1].note
    fault = {"source": "s", "shard": shard.shown, "key": "1", "extension": "txt", "kind": "k", "reason": "r", "step": 4}
    (tmp_path / "run.jsonl").write_text(2 * (json.dumps(fault) + "\n"))
    assert read_findings(tmp_path / "run.jsonl", shards=[shard]) == [Wanted(shard, 0, ".txt: k: r")]
    assert "k: r" in show(read_findings(tmp_path / "run.jsonl"), rules=TEXT).html
    (tmp_path / "run.jsonl").write_text(json.dumps(fault) + '\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"run\.jsonl:2: names no bad member"):
        read_findings(tmp_path / "run.jsonl")


def test_hostile_keys_captions_and_metadata_are_shown_as_text(tmp_path: Path) -> None:
    members = {
        "<script>k.txt": HOSTILE.encode(),
        "<script>k.json": json.dumps({"caption": f"</pre>{HOSTILE}"}).encode(),
        "<script>k.<img src=x>": b"x",
    }
    page = show(draw_samples([write_shard(tmp_path / "x.tar", members)], count=1))
    assert page.html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert "&lt;script&gt;k" in page.html and ".&lt;img src=x&gt;" in page.html and page.count("img") == 0


def test_every_hostile_member_is_a_sentence_and_the_page_is_whole(tmp_path: Path) -> None:
    hostile = {name: data for name, (data, _) in hostile_members().items()}
    shard = write_shard(tmp_path / "x.tar", hostile)
    page = show(draw_samples([shard], count=100))
    assert page.count("article") == len(hostile)
    assert page.html.count("does not decode") == 5  # no_bytes, html, cut, huge, noise
    assert "object at 0x" not in page.html


def test_pictures_sounds_and_missing_modalities_have_their_cells(tmp_path: Path) -> None:
    members = {"1.jpg": picture_bytes(1), "1.ogg": sound_bytes(1), "2.txt": b"words"}
    page = show(draw_samples([write_shard(tmp_path / "x.tar", members)], count=2))
    assert page.classes("div").count("cell") == 3 and page.classes("div").count("cell missing") == 3
    picture, crop, spectrogram = sources(page, "img")
    assert picture == uri("image/jpeg", members["1.jpg"]) and crop != spectrogram
    assert sources(page, "audio") == [uri("audio/ogg", members["1.ogg"])]
    assert "40 x 40 JPEG RGB" in page.html and "0.30 s, 16,000 Hz mono OGG VORBIS" in page.html
    assert "<code>[CLS]</code>" in page.html and page.html.count("what a model sees") == 3


def test_sounds_that_browsers_do_not_play_are_converted_and_long_ones_cut(tmp_path: Path) -> None:
    tone = 0.3 * np.sin(np.arange(16_000) / 9)
    members = {}
    for name, values, rate, subtype in (("1", tone, 16_000, "ULAW"), ("2", tone, 1000, "PCM_16"),
                                        ("3", np.tile(tone, 60), 16_000, "PCM_16")):  # fmt: skip
        file = io.BytesIO()
        soundfile.write(file, values, rate, format="WAV", subtype=subtype)
        members[f"{name}.wav"] = file.getvalue()
    page = show(draw_samples([write_shard(tmp_path / "x.tar", members)], count=3))
    played = [base64.b64decode(source.partition("base64,")[2]) for source in sources(page, "audio")]
    infos = [soundfile.info(io.BytesIO(data)) for data in played]
    assert [(info.subtype, info.samplerate, info.frames) for info in infos] == [
        ("PCM_16", 16_000, 16_000),
        ("PCM_16", 16_000, 256_000),
        ("PCM_16", 16_000, 320_000),
    ]
    values, _ = soundfile.read(io.BytesIO(played[0]))
    assert np.abs(values - tone).max() < 0.01


def test_a_page_that_is_full_says_so_and_keeps_the_texts(tmp_path: Path) -> None:
    members = {f"{n}.{e}": d for n in range(6) for e, d in (("jpg", picture_bytes(n, size=300)), ("txt", b"words"))}
    wanted = draw_samples([write_shard(tmp_path / "x.tar", members)], count=6)
    whole, cut = show(wanted), show(wanted, max_bytes=40_000)
    assert whole.count("img") == 12 and 0 < cut.count("img") < 12 and len(cut.html) < 55_000
    left_out = 6 - cut.count("img") // 2
    assert f"{left_out} without pictures and sounds" in cut.html and cut.html.count(">words<") >= 6
    assert cut.html.count("left out, the page is full") == left_out


def test_augmentations_are_those_of_the_seed_and_differ_from_each_other(tmp_path: Path) -> None:
    members = {"1.jpg": picture_bytes(1, size=200), "1.ogg": sound_bytes(1, seconds=1.0), "1.txt": b"words"}
    wanted = draw_samples([write_shard(tmp_path / "x.tar", members)], count=1)
    first, again = show(wanted, augmentations=3), show(wanted, augmentations=3)
    assert first.html == again.html
    assert len(set(sources(first, "img"))) == 1 + 2 * 4
    assert sources(first, "img")[:2] == sources(show(wanted), "img")[:2]  # evaluation does not change
    assert "evaluation and training 1, 2, 3" in first.html  # of the text, which is not augmented by default


def test_a_member_that_kills_its_decoder_costs_its_own_view_alone(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", {"1.txt": b"well", "2.txt": b"segfault", "3.txt": b"well"})
    page = show(draw_samples([shard], count=3), rules=TEXT, configs={"text": DeadlyConfig()})
    assert page.count("article") == 3 and page.html.count("a process died") == 1
    assert '<p class="text">segfault</p>' in page.html


def test_remote_shards_are_refused(tmp_path: Path) -> None:
    (shard,) = place_shards(["https://host/x.tar"], index_folder=tmp_path)
    with pytest.raises(DataError, match="is remote"):
        render_samples([Wanted(shard, 0)], title="x")
