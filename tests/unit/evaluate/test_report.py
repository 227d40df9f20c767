"""The report: hostile data, missing parts, right answers, and that it loads nothing."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import index_folder, write_tar
from html_pages import read_page
from PIL import Image

from mmfuse.data.recipe import Recipe
from mmfuse.data.source import Source
from mmfuse.errors import DataError
from mmfuse.evaluate.report import write_report

HOSTILE = "<script>alert(1)</script> \"' onerror=x <img src=https://example.org/x.png>"
PICTURE = b"\xff\xd8\xff not decoded by the report, because it is small"


def make_source(folder: Path, samples: dict[str, dict[str, bytes]]) -> Source:
    """A real tar, indexed and opened; a key's group is what stands before `_`."""
    members = {f"{key}.{name}": data for key, sample in samples.items() for name, data in sample.items()}
    shard = write_tar(folder / "test-000000.tar", members)
    index_folder(folder)
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "members": {
                "text": {"extensions": ["txt"]},
                "image": {"extensions": ["jpg"]},
                "audio": {"extensions": ["ogg"]},
            },
            "group_pattern": "^([a-z]+)_",
            "splits": {"test": {"shards": [shard.name]}},
        }
    )
    return Source(recipe, "test", place=folder / "recipe.yaml", modalities=("text", "image", "audio"))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    samples = {
        "a_0": {"txt": HOSTILE.encode() + b"\nsecond caption\n", "jpg": PICTURE},
        "a_1": {"txt": b"again", "jpg": PICTURE, "ogg": bytes(300_001)},
        "b_0": {"txt": b"other", "jpg": PICTURE, "ogg": b"OggS"},
    }
    return make_source(tmp_path, samples)


def scores(*, recall: float, answers: list[int]) -> dict[str, Any]:
    found = {f"R@{k}": recall for k in (1, 5, 10)} | {f"chance R@{k}": 0.1 for k in (1, 5, 10)}
    examples = [{"query": 0, "answers": answers, "rank": 2}]
    return {**found, "median rank": 2.0, "queries": 3, "gallery": 3, "examples": examples}


def make_run(folder: Path, recalls: dict[int, float], *, answers: list[int], metrics: str | None = None) -> Path:
    """A run's folder with an evaluation at each step of `recalls`."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "run.yaml").write_text("name: tiny\nobjectives: {contrastive: {}}\ntrain: {steps: 20, global_batch: 8}\n")
    facts = {"torch": "2.11", "devices": ["cpu"], "python": {"executable": "/home/me/bin/python", "version": "3.11"}}
    (folder / "environment.json").write_text(json.dumps(facts))
    for step, recall in recalls.items():
        directions = {d: scores(recall=recall, answers=answers) for d in ("image->text", "text->image", "text->audio")}
        evaluation = {"step": step, "sets": {"new <things>": directions}}
        (folder / f"evaluations/step_{step:08d}.json").write_text(json.dumps(evaluation))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics)
    return folder


METRICS = "".join(
    json.dumps({"step": step, "loss": 9 / step, "contrastive/text-image": 4 / step, "grad_norm": 1.0}) + "\n"
    for step in (5, 10, 15, 20)
)


def test_a_hostile_caption_is_shown_as_text(tmp_path, source):
    run = make_run(tmp_path / "run", {20: 0.5}, answers=[0, 2])
    page = read_page(write_report(run, sources={"new <things>": source}))
    assert not [tag for tag, _ in page.tags if tag in ("script", "things")]
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.html
    assert "second caption" not in page.html


def test_answers_of_the_query_s_group_are_marked_right_and_no_others(tmp_path, source):
    run = make_run(tmp_path / "run", {20: 0.5}, answers=[2, 1, 0])
    page = read_page(write_report(run, sources={"new <things>": source}))
    cards = [name.removeprefix("card ") for name in page.classes("div") if name.startswith("card ")]
    assert cards == 3 * ["query", "wrong", "right", "right"]


def test_the_page_loads_nothing(tmp_path, source):
    run = make_run(tmp_path / "run", {0: 0.1, 10: 0.3, 20: 0.5}, answers=[2, 1], metrics=METRICS)
    page = read_page(write_report(run, sources={"new <things>": source}))
    places = [a[name] for _, a in page.tags for name in ("src", "href", "xlink:href", "data", "srcset") if name in a]
    assert places and all(str(place).startswith(("data:", "#")) for place in places)
    assert not re.search(r"@import|url\((?!#)", page.html)
    assert [tag for tag, _ in page.tags].count("svg") == 1 + 2 + 1  # recall; two losses; gradient norm


def test_a_run_without_metrics_environment_and_baseline_has_a_report(tmp_path, source):
    run = make_run(tmp_path / "run", {20: 0.5}, answers=[2, 1])
    (run / "environment.json").unlink()
    page = read_page(write_report(run, sources={}))
    assert "at step 0" not in page.html and "<svg" not in page.html and "Sample retrievals" not in page.html
    summary = json.loads((run / "report.json").read_text())
    assert (summary["baseline"], summary["last_metrics"], summary["environment"]) == (None, None, {})


def test_a_run_that_was_never_evaluated_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", {}, answers=[], metrics=METRICS)
    assert "has not been evaluated" in read_page(write_report(run, sources={})).html


def test_report_json_holds_final_and_first_scores_and_no_paths(tmp_path, source):
    metrics = METRICS + '{"step": 25, "loss": NaN}\n{"step": 30, "lo'
    run = make_run(tmp_path / "run", {0: 0.1, 20: 0.5}, answers=[2, 1], metrics=metrics)
    write_report(run, sources={"new <things>": source})
    summary = json.loads((run / "report.json").read_text())
    expected = scores(recall=0.5, answers=[])
    del expected["examples"]
    assert summary["scores"]["new <things>"]["image->text"] == expected
    assert summary["baseline"]["new <things>"]["image->text"]["R@10"] == 0.1
    assert (summary["steps"], summary["samples_seen"], summary["evaluated_step"]) == (25, 200, 20)
    assert summary["last_metrics"] == {"step": 25, "loss": None}
    assert summary["environment"] == {"torch": "2.11", "devices": ["cpu"], "python.version": "3.11"}
    assert str(tmp_path) not in (run / "report.json").read_text()


def test_a_member_too_large_for_the_page_is_named_instead(tmp_path, source):
    run = make_run(tmp_path / "run", {20: 0.5}, answers=[0, 1, 2])
    page = read_page(write_report(run, sources={"new <things>": source}))
    assert "<em>absent</em>" in page.html and "300 kB, too large to show" in page.html
    assert [tag for tag, _ in page.tags].count("audio") == 1


def test_large_pictures_shrink_and_the_page_stays_below_six_megabytes(tmp_path):
    noise = io.BytesIO()
    Image.effect_noise((900, 900), 90).save(noise, "JPEG", quality=95)
    source = make_source(tmp_path, {"a_0": {"txt": b"loud", "jpg": noise.getvalue(), "ogg": bytes(290_000)}})
    run = make_run(tmp_path / "run", {20: 0.5}, answers=[0] * 14)
    page = read_page(write_report(run, sources={"new <things>": source}))
    assert len(noise.getvalue()) > 300_000
    assert [tag for tag, _ in page.tags].count("img") == 1 + 14  # image->text shows one, text->image fourteen
    assert "left out, the page is full" in page.html and len(page.html) < 6_000_000


def test_an_evaluation_of_another_source_is_refused(tmp_path, source):
    run = make_run(tmp_path / "run", {20: 0.5}, answers=[7])
    with pytest.raises(DataError, match=r"sample 7, but tiny/test has 3"):
        write_report(run, sources={"new <things>": source})
    assert not list(run.glob("report.*"))
