"""Tables of paths and captions: what a cell may hold, and what is said of the others."""

import csv
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from unit.shards.built_sets import (
    build,
    captions_table,
    media_table,
    read_indexed,
    read_problems,
    read_tars,
    read_webdataset,
    tar_bytes,
    write_csv,
)

from mmfuse.errors import ConfigError, DataError


def test_csv_jsonl_and_parquet_of_one_content_give_the_same_tars(tmp_path: Path) -> None:
    table = media_table(tmp_path / "in", rows=7)
    build(table, to=tmp_path / "csv")
    with open(table, newline="") as lines:
        rows = [{name: value or None for name, value in row.items()} for row in csv.DictReader(lines)]
    rows = [row | {"caption": json.loads(row["caption"])} for row in rows]
    (tmp_path / "in/table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(tmp_path / "in/table.jsonl", to=tmp_path / "jsonl")
    whole = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(whole.slice(0, 4), tmp_path / "in/a.parquet", row_group_size=2)
    pyarrow.parquet.write_table(whole.slice(4), tmp_path / "in/b.parquet")
    build(tmp_path / "in/a.parquet", tmp_path / "in/b.parquet", to=tmp_path / "parquet")
    assert tar_bytes(tmp_path / "csv") == tar_bytes(tmp_path / "jsonl") == tar_bytes(tmp_path / "parquet")


def test_keys_lose_their_dots_and_double_ones_their_later_rows(tmp_path: Path) -> None:
    keys = ["ключ", "a.b", "a_b", "n01/x.jpg", "./c", "..", "", "__x__/y", "d", "d", "u\n"]
    table = captions_table(tmp_path / "in", keys)
    last = build(table, to=tmp_path / "out", table={"key": "key"}, max_problem_ratio=1)
    assert read_indexed(tmp_path / "out").keys() == read_webdataset(tmp_path / "out").keys()
    assert read_tars(tmp_path / "out").keys() == {"ключ", "a_b", "n01/x_jpg", "c", "d", "u"}
    assert read_tars(tmp_path / "out")["a_b"] == {"txt": b"thing a.b\n"}
    reasons = {p["row"]: p["reason"] for p in read_problems(tmp_path / "out")}
    assert reasons.keys() == {2, 5, 6, 7, 9} and last.left_out == 5
    assert reasons[2] == "has the key 'a_b' of row 1"
    assert "empty or leads out" in reasons[5] and "empty or leads out" in reasons[6]
    assert "webdataset skips" in reasons[7]


def test_captions_come_from_several_columns_and_lists_and_others_are_kept_as_json(tmp_path: Path) -> None:
    rows = [
        {"a": "one", "b": ["two", None, "  three \n lines "], "url": "u0", "n": 1.5},
        {"a": "[laughs] not a list", "b": "[1, 2]", "url": None, "n": float("nan")},
        {"a": ["x"], "b": {"no": "caption"}, "url": "u2", "n": 3},
        {"a": "", "b": [], "url": "u3", "n": 4},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n\n[1]\n")
    columns = {"captions": ["a", "b"], "keep": ["url", "n"]}
    last = build(tmp_path / "t.jsonl", to=tmp_path / "out", table=columns, max_problem_ratio=1)
    samples = read_tars(tmp_path / "out")
    assert [samples[f"{n:09d}"]["txt"] for n in range(3)] == [
        b"one\ntwo\nthree lines\n",
        b"[laughs] not a list\n[1, 2]\n",
        b"x\n",
    ]
    assert [json.loads(samples[f"{n:09d}"]["json"]) for n in range(2)] == [
        {"url": "u0", "n": 1.5},
        {"url": None, "n": None},
    ]
    assert (last.rows, last.samples, last.left_out) == (6, 3, 3)
    assert [(p["row"], p["reason"]) for p in read_problems(tmp_path / "out")] == [
        (2, "holds a dict, not a caption"),
        (3, "holds no member: all its cells are empty"),
        (4, "is not JSON"),
        (5, "is no JSON object"),
    ]


def test_metadata_alone_is_no_sample(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"j")
    rows = [["1.jpg", "u1"], ["gone.jpg", "u2"], ["", "u3"]]
    table = write_csv(tmp_path / "t.csv", "image url", rows)
    last = build(table, to=tmp_path / "out", table={"paths": {"image": "image"}, "keep": ["url"]}, max_problem_ratio=1)
    assert read_tars(tmp_path / "out") == {"000000000": {"jpg": b"j", "json": b'{"url": "u1"}'}}
    assert (last.left_out, len(read_problems(tmp_path / "out"))) == (2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": {"captions": ["captoin"]}}, r"has no column 'captoin'; did you mean 'caption'\?"),
        ({"table": {"paths": {"imgae": "key"}}}, r"no modality 'imgae'; did you mean 'image'\?"),
        ({"table": {"paths": {"text": "key"}, "captions": ["caption"]}}, "a sample has one member .txt"),
        ({"folder": {"layout": "parallel"}}, "is a table, but settings for a folder are given"),
        ({"validation_ratio": 0.0001}, "leaves one split empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict, message: str
) -> None:
    table = captions_table(tmp_path / "in", "abc")
    with pytest.raises(ConfigError, match=message):
        build(table, to=tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_what_is_no_table_or_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"t.xlsx: is no table of a known format \(.csv"):
        build(tmp_path / "t.xlsx", to=tmp_path / "out")
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"t.parquet: cannot be read"):
        build(tmp_path / "t.parquet", to=tmp_path / "out")
    (tmp_path / "t.csv").write_text('caption\n"opened\nand never closed\n')
    with pytest.raises(DataError, match=r"t.csv: cannot be read after line 3: unexpected end of data"):
        build(tmp_path / "t.csv", to=tmp_path / "out")
    (tmp_path / "u.csv").write_text("caption,image\nfine,\none,,more\n")
    assert build(tmp_path / "u.csv", to=tmp_path / "out", max_problem_ratio=0.5).samples == 1
    assert read_problems(tmp_path / "out")[0]["reason"] == "has 3 cells, the header has 2"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pip install 'mmfuse\[parquet\]'"):
        build(tmp_path / "t.parquet", to=tmp_path / "out")
