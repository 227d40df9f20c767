"""Training on a blend: weights that change, settings that must not, bad data that a run puts up with."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import (
    TINY_MODALITIES,
    index_folder,
    sample_members,
    write_data_set,
    write_tar,
    write_tiny_run,
    write_yaml,
)

from mmfuse.errors import CheckpointError, ConfigError, DataError
from mmfuse.train.checkpoint import complete_checkpoints, read_facts
from mmfuse.train.data import TrainingData, check_fed
from mmfuse.train.run import load_run
from mmfuse.train.trainer import train

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def write_run(folder: Path, *, weights: tuple[float, float] = (1.0, 1.0), steps: int = 2, **data: Any) -> str:
    """A run over two sources, which exist already or are made here."""
    sources = []
    for name, weight in zip(("a", "b"), weights, strict=True):
        recipe = folder / name / "recipe.yaml"
        if not recipe.is_file():
            write_data_set(folder / name, shard_sizes=(6, 6), modalities=["text", "image"])
        sources.append({"recipe": str(recipe), "weight": weight})
    run = {
        "name": "blend",
        "output_dir": str(folder / "out"),
        "model": {
            "width": 16,
            "embedding_dim": 8,
            "modalities": {modality: TINY_MODALITIES[modality] for modality in ("text", "image")},
            "fusion": None,
        },
        "objectives": {"contrastive": {}},
        "data": {"train": sources, "num_workers": 0, **data},
        "train": {"steps": steps, "global_batch": 8, "log_every": 1, "record_samples": True},
        "optimizer": {"warmup_steps": 1},
    }
    return str(write_yaml(folder / "run.yaml", run))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def share_of_b(folder: Path, steps: range) -> float:
    keys = [
        key for line in lines_of(folder / "out/samples.rank0.jsonl") if line["step"] in steps for key in line["keys"]
    ]
    return sum("/b/train-" in key for key in keys) / len(keys)


def test_new_weights_hold_from_where_a_run_goes_on_and_are_recorded(tmp_path: Path) -> None:
    train(load_run(write_run(tmp_path, weights=(1, 1), steps=4)))
    before = lines_of(tmp_path / "out/samples.rank0.jsonl")
    train(load_run(write_run(tmp_path, weights=(1, 3), steps=8)))
    assert lines_of(tmp_path / "out/samples.rank0.jsonl")[:4] == before
    assert share_of_b(tmp_path, range(1, 5)) == pytest.approx(0.5, abs=0.07)
    assert share_of_b(tmp_path, range(5, 9)) == pytest.approx(0.75, abs=0.07)
    newest = complete_checkpoints(tmp_path / "out/checkpoints")[-1]
    assert read_facts(newest)["weights"] == [[0, [1.0, 1.0]], [4, [1.0, 3.0]]]
    last = lines_of(tmp_path / "out/metrics.jsonl")[-1]
    assert min(last[f"sources/{name}/train/contrastive/text-image"] for name in ("a", "b")) <= last["loss"]
    assert max(last[f"sources/{name}/train/contrastive/text-image"] for name in ("a", "b")) >= last["loss"]
    train(load_run(write_run(tmp_path, weights=(1, 3), steps=9)))  # the same weights are no new segment
    newest = complete_checkpoints(tmp_path / "out/checkpoints")[-1]
    assert [start for start, _ in read_facts(newest)["weights"]] == [0, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 4}, "lanes was 8, is 4"),
        ({"window_shards": 1}, "window_shards was 8, is 1"),
    ],
)
def test_what_would_change_the_order_is_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    train(load_run(write_run(tmp_path)))
    with pytest.raises(CheckpointError, match=message):
        train(load_run(write_run(tmp_path, steps=4, **changes)))


def test_other_sources_are_refused(tmp_path: Path) -> None:
    place = write_run(tmp_path)
    train(load_run(place))
    run = yaml.safe_load(Path(place).read_text())
    run["data"]["train"].reverse()
    with pytest.raises(CheckpointError, match=r"sources was .*a/train.*b/train.*, is .*b/train.*a/train"):
        train(load_run(str(write_yaml(tmp_path / "reversed.yaml", run))))


def test_another_way_to_read_the_same_tars_is_refused(tmp_path: Path) -> None:
    place = write_run(tmp_path)
    train(load_run(place))
    recipe = yaml.safe_load((tmp_path / "b/recipe.yaml").read_text())
    write_yaml(tmp_path / "b/recipe.yaml", {**recipe, "group_pattern": "^00"})
    with pytest.raises(CheckpointError, match=r"data: members or group_pattern of b/train's recipe was \S+, is \S+$"):
        train(load_run(place))


def test_bad_members_are_recorded_and_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    place = write_run(tmp_path, steps=6)
    good = {name: data for number in range(6) for name, data in sample_members(number, ["text", "image"]).items()}
    write_tar(tmp_path / "b/train-1.tar", good | {"0003.jpg": b"no picture", "0004.jpg": b"", "0004.txt": b" "})
    index_folder(tmp_path / "b")
    train(load_run(place))
    faults = lines_of(tmp_path / "out/quarantine.rank0.jsonl")
    assert {(f["source"], f["key"], f["extension"], f["lost"]) for f in faults} == {
        ("b/train", "0003", "jpg", False),
        ("b/train", "0004", "jpg", True),
        ("b/train", "0004", "txt", True),
    }
    last = lines_of(tmp_path / "out/metrics.jsonl")[-1]
    assert last["sources/a/train/samples"] + last["sources/b/train/samples"] == 48
    assert last["sources/b/train/masked"] == sum(f["key"] == "0003" for f in faults)
    assert last["sources/b/train/lost"] == sum(f["key"] == "0004" for f in faults) / 2
    assert last["sources/a/train/epochs"] + last["sources/b/train/epochs"] == pytest.approx(4)
    page = (tmp_path / "out/report.html").read_text()
    for kind, count in Counter(f["kind"] for f in faults).items():
        assert f"<td>b/train</td><td>{kind}</td><td>{count}</td>" in page
    with open(tmp_path / "out/quarantine.rank0.jsonl", "a") as file:
        file.write(json.dumps(faults[0] | {"step": 7}) + "\n")  # of steps that a killed run took after its checkpoint
    train(load_run(write_run(tmp_path, steps=7)))
    assert [f for f in lines_of(tmp_path / "out/quarantine.rank0.jsonl") if f["step"] < 7] == faults
    resumed = lines_of(tmp_path / "out/metrics.jsonl")[-1]
    assert resumed["sources/a/train/samples"] + resumed["sources/b/train/samples"] == 56
    assert resumed["sources/b/train/masked"] >= last["sources/b/train/masked"]


def test_a_source_that_is_entirely_bad_stops_the_run_with_its_name(tmp_path: Path) -> None:
    place = write_run(tmp_path, steps=50, quarantine={"max_consecutive": 5})
    write_tar(tmp_path / "b/train-0.tar", {f"{n}.jpg": b"no picture" for n in range(6)})
    write_tar(tmp_path / "b/train-1.tar", {f"{n}.txt": b"" for n in range(6)})
    index_folder(tmp_path / "b")
    with pytest.raises(DataError, match=r"b/train: the last 5 samples that this rank read of it are all bad"):
        train(load_run(place))


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (
            {"contrastive": {}},
            r"objectives.contrastive learns from samples with image\+text, of which data.train \(set/train\) has none; "
            "its samples hold: image, text",
        ),
        ({"contrastive": {"pairs": {"text-image": 1}}}, r"objectives.contrastive.pairs.text-image learns from"),
        ({"contrastive": {"positives": "group"}}, None),
        ({"contrastive": {"positives": "group"}, "matching": {}}, "objectives.matching learns from"),
        ({"masked_image": {}}, None),
        ({"contrastive": {"positives": "group"}, "next_sentence": {}}, "reads as `captions: sentences`, and none does"),
    ],
)
def test_an_objective_that_the_data_cannot_feed_is_refused_with_both(
    tmp_path: Path, objectives: dict[str, Any], message: str | None
) -> None:
    """Every sample holds one modality alone."""
    lacking = {number: ("text",) if number % 2 else ("image",) for number in range(8)}
    recipe = write_data_set(tmp_path / "set", modalities=("text", "image"), lacking=lacking)
    path = write_tiny_run(tmp_path, recipe)
    fused = objectives.keys() & {"matching", "masked_image"}
    run = yaml.safe_load(path.read_text()) | {"objectives": objectives}
    run["model"]["fusion"] = {"num_layers": 1, "num_heads": 2} if fused else None
    run = load_run(str(write_yaml(path, run)))
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_fed(run, TrainingData(run).sources)
