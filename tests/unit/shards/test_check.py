"""Every bad member is named with its kind, in one order, whatever it does to the process that decodes it."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import picture_bytes, sound_bytes, write_tar
from unit.shards.deadly_modality import DeadlyConfig
from unit.shards.hostile_set import GOOD, hostile_members, write_shard

from mmfuse.config import plugin_names
from mmfuse.data.aligned import build_joined_index
from mmfuse.data.manifest import index_path
from mmfuse.data.recipe import JsonCaptions, MemberRule, Shard, place_shards
from mmfuse.errors import DataError
from mmfuse.shards.check import check_shards
from mmfuse.shards.findings import KINDS, Checked, CheckSummary, Finding, write_findings
from mmfuse.shards.modality_rules import default_rules

pytestmark = pytest.mark.usefixtures("decoders_imported")

TEXT = {"text": MemberRule(extensions=("txt",))}


def check(shards: Sequence[Shard], **options: Any) -> list[Finding]:
    return [finding for part in check_shards(shards, **options) for finding in part.findings]


def test_every_hostile_member_is_named_with_its_kind_and_no_good_one_is(tmp_path: Path) -> None:
    hostile = hostile_members()
    shard = write_shard(tmp_path / "x.tar", {**GOOD, **{name: data for name, (data, _) in hostile.items()}})
    findings = check([shard])
    assert [(f"{f.key}.{f.extension}", f.kind) for f in findings] == [
        (name, kind) for name, (_, kind) in hostile.items()
    ]
    assert {f.shard for f in findings} == {str(tmp_path / "x.tar")}
    assert {f.kind for f in findings} <= KINDS.keys()


def test_members_that_kill_or_hang_their_decoder_are_named_and_the_rest_is_decoded(tmp_path: Path) -> None:
    texts = ["well", "segfault", "kind", "hang", "well", "memory", "surprise", "segfault", "well"]
    shard = write_shard(tmp_path / "x.tar", {f"{i}.txt": text.encode() for i, text in enumerate(texts)})
    parts = list(check_shards([shard], rules=TEXT, configs={"text": DeadlyConfig()}, member_seconds=1.0))
    kinds = [(f.key, f.kind) for part in parts for f in part.findings]
    assert kinds == [("1", "crashed"), ("2", "unwanted"), ("3", "too_slow"), ("5", "too_large"), ("6", "unexpected"),
                     ("7", "crashed")]  # fmt: skip
    assert sum(part.samples for part in parts) == 9


def test_findings_have_one_order_for_any_number_of_processes(tmp_path: Path) -> None:
    bad = {n for n in range(300) if n % 7 == 3}
    shards = [
        write_shard(tmp_path / f"{s}.tar", {f"{n:03}.txt": b"" if n in bad else b"x" for n in range(300)}) for s in "ab"
    ]
    (tmp_path / "a.tar.mmindex").unlink()
    one, three = (check(shards, rules=TEXT, num_workers=workers) for workers in (1, 3))
    assert one == three
    assert [f.kind for f in one] == ["not_indexed", *["empty"] * len(bad)]
    assert [f.key for f in one[1:]] == [f"{n:03}" for n in sorted(bad)]


def test_a_tar_that_is_cut_renamed_in_place_or_replaced_is_not_decoded(tmp_path: Path) -> None:
    members = {f"{n}.txt": b"x" for n in range(9)}
    cut, renamed, replaced, longer, whole = (write_shard(tmp_path / f"{n}.tar", members) for n in range(5))
    path = Path(cut.parts[0])
    path.write_bytes(path.read_bytes()[:4000])
    write_tar(Path(renamed.parts[0]), {f"{(n + 1) % 9}.txt": b"x" for n in range(9)})
    write_tar(Path(replaced.parts[0]), {f"{n}.txt": b"y" * 600 for n in range(9)})
    write_tar(Path(longer.parts[0]), members | {"9.txt": b"x"})
    parts = list(check_shards([cut, renamed, replaced, longer, whole], rules=TEXT))
    kinds = ["damaged_shard", "index_differs", "index_differs", "index_differs"]
    assert [f.kind for part in parts for f in part.findings] == kinds
    assert [(part.shard, part.samples) for part in parts if part.samples] == [(whole.shown, 9)]


def test_a_shard_that_is_gone_is_unreadable(tmp_path: Path) -> None:
    gone = write_shard(tmp_path / "gone.tar", {"1.txt": b"x"})
    Path(gone.parts[0]).unlink()
    (finding,) = check([gone], rules=TEXT)
    assert (finding.kind, finding.shard) == ("unreadable", gone.shown)


def test_aligned_tars_are_checked_together(tmp_path: Path) -> None:
    texts = write_tar(tmp_path / "texts.tar", {"b.txt": b"x", "a.txt": b" "})
    images = write_tar(tmp_path / "images.tar", {"a.jpg": b"no", "b.jpg": picture_bytes(1), "c.jpg": b"neither"})
    shard = Shard((str(texts), str(images)), tmp_path, "joined")
    build_joined_index((texts, images), index_path(tmp_path, "joined"))
    found = [(f.key, f.extension, f.kind) for f in check([shard])]
    assert found == [("a", "txt", "empty"), ("a", "jpg", "not_decodable"), ("c", "jpg", "not_decodable")]
    write_tar(images, {"a.jpg": b"no", "d.jpg": picture_bytes(1), "c.jpg": b"neither"})
    assert [f.kind for f in check([shard], rules=TEXT)] == ["index_differs"]


def test_members_that_nothing_reads_are_one_note_a_shard_and_no_fault(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", {"1.txt": b"x", "1.cls": b"7", "2.cls": b"8", "2.seg.png": b"?"})
    summary = CheckSummary()
    parts = list(check_shards([shard], rules=TEXT))
    for part in parts:
        summary.add(part)
    notes = [(f.key, f.extension, f.kind) for part in parts for f in part.findings]
    assert notes == [(None, "cls", "unknown_extension"), (None, "seg.png", "unknown_extension")]
    assert summary.exit_code == 0 and "all good" in summary.to_table()


def test_captions_are_taken_where_the_recipe_says(tmp_path: Path) -> None:
    members = {"1.json": b'{"caption": "a"}', "2.json": b'{"caption": ""}', "3.json": b"{", "3.txt": b"\xff"}
    shard = write_shard(tmp_path / "x.tar", members)
    rule = MemberRule(extensions=("json",), captions=JsonCaptions(keys={"caption": 1.0}))
    findings = check([shard], rules={"text": rule})
    assert [(f.key, f.extension) for f in findings] == [(None, "txt"), ("2", "json"), ("3", "json")]


def test_findings_are_lines_of_json_as_they_come_and_harmless_in_a_terminal(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", {"\x1b[31mred.txt": b"", "1.txt": b"x", "b\udcffd.txt": b"\xff"})
    file = io.StringIO()
    parts = list(write_findings(check_shards([shard], rules=TEXT), file))
    findings = [finding for part in parts for finding in part.findings]
    assert [Finding(**json.loads(line)) for line in file.getvalue().splitlines()] == findings
    assert [finding.key for finding in findings] == ["\x1b[31mred", "b\udcffd"]
    assert "\\x1b[31mred.txt: empty" in findings[0].to_line() and findings[1].to_line().isprintable()


def test_the_summary_counts_kinds_and_gives_the_exit_code_of_bad_data() -> None:
    summary = CheckSummary()
    findings = (Finding("a", "1", "jpg", "empty", ""), Finding("a", "2", "jpg", "own_kind", ""))
    summary.add(Checked("a", 2, 3, 100, findings))
    assert summary.exit_code == DataError.exit_code
    counted = {"samples": 2, "members": 3, "bytes": 100, "good": False, "findings": {"empty": 1, "own_kind": 1}}
    assert json.loads(summary.to_json()) == counted
    assert "own_kind" in summary.to_table() and "all good" not in summary.to_table()


def test_remote_shards_are_refused() -> None:
    shards = place_shards(["https://host/x.tar"], index_folder=Path("indexes"))
    with pytest.raises(DataError, match="is remote"):
        check(shards)


def test_default_rules_are_those_of_the_modalities_files() -> None:
    rules = default_rules()
    assert rules.keys() == set(plugin_names("mmfuse.modalities"))
    assert rules["image"].extensions == ("jpg", "jpeg", "png", "webp") and rules["text"].extensions == ("txt",)


def test_good_members_of_every_known_extension_pass(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", {**GOOD, "long.ogg": sound_bytes(1, seconds=7)})
    assert check([shard]) == []
