"""The run: shipped runs load and survive their own YAML; contradictions and changes are found."""

from pathlib import Path
from typing import Any

import pytest
from helpers import ALL, write_tiny_run

from mmfuse.config import dump_yaml
from mmfuse.errors import ConfigError
from mmfuse.train.run import SHIPPED_RUNS, RunConfig, changed_settings, load_run

SHIPPED = [path.stem for path in sorted(SHIPPED_RUNS.glob("*.yaml"))]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_run(tmp_path, "emoji_sample", modalities=ALL)


def load(path: Path, *overrides: str) -> RunConfig:
    return load_run(str(path), overrides=overrides)


def test_runs_ship() -> None:
    assert "quickstart" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_run_equals_itself_after_its_own_yaml(name: str, tmp_path: Path) -> None:
    run = load_run(name)
    dump_yaml(run, tmp_path / "run.yaml")
    again = load_run(str(tmp_path / "run.yaml"))
    assert again == run
    assert again.objective_configs == run.objective_configs != {}
    assert run.name == name
    assert changed_settings(run, again) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.fusion={}"], "model.fusion is set, but no objective trains it"),
        (["objectives.matching={}"], "model.fusion is null, but objectives.matching needs it"),
        (
            ["model.fusion={}", "objectives.matching={}", "train.accumulation=2"],
            "train.accumulation = 2 with objectives.matching: its negatives",
        ),
        (
            ["train.global_batch=5", "train.accumulation=2"],
            "global_batch = 5 is not a multiple of train.accumulation = 2",
        ),
        (
            ["objectives.next_sentence={}", "train.accumulation=4"],
            "objectives.next_sentence draws from a micro-batch, and one of 1 row",
        ),
        (["data.lanes=3"], "train.global_batch = 4 is not a multiple of data.lanes = 3"),
        (["optimizer.warmup_steps=2"], "optimizer.warmup_steps = 2 is not below train.steps = 2"),
    ],
)
def test_a_run_that_contradicts_itself_is_refused(tiny: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="the run contradicts itself") as error:
        load(tiny, *overrides)
    assert message in str(error.value)


def test_all_contradictions_are_told_at_once(tiny: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tiny, "train.accumulation=3", "data.lanes=3", "optimizer.warmup_steps=9", "objectives.matching={}")
    assert str(error.value).count(";") >= 4
    assert all(name in str(error.value) for name in ("train.accumulation", "data.lanes", "optimizer.warmup_steps"))


def test_a_fusion_with_an_objective_that_trains_it_is_no_contradiction(tiny: Path) -> None:
    run = load(tiny, "model.fusion={num_heads: 2}", "objectives.masked_language={}", "objectives.contrastive=null")
    assert [*run.objectives] == ["masked_language"]
    assert load(tiny, "model.fusion={}", "objectives.masked_language={}", "train.accumulation=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_bach=8"], "train: unknown setting 'global_bach'; did you mean 'global_batch'?"),
        (
            ["objectives.contrastive.wieght=1"],
            "objectives.contrastive: unknown setting 'wieght'; did you mean 'weight'?",
        ),
        (["objectives.contrasive=null"], "no file for 'contrasive'; did you mean 'contrastive'?"),
        (["model.modalities.imag={}"], "no file for 'imag'; did you mean 'image'?"),
        (["model.modalities.image.augment.flop=1"], "model.modalities.image.augment: unknown setting 'flop'; did you"),
        (["objectives.contrastive=null"], "objectives = {}: Dictionary should have at least 1 item"),
        (["train.precision=fp8"], "train.precision = 'fp8': Input should be 'fp32', 'bf16' or 'fp16'"),
        (["name=a/b"], "name = 'a/b': String should match"),
    ],
)
def test_a_wrong_override_is_told_with_its_place(tiny: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tiny, *overrides)
    assert message in str(error.value)
    assert str(tiny) in str(error.value)


def test_an_unknown_run_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no run 'quikstart'; did you mean 'quickstart'\? \(a path must end in .yaml\)"
    ):
        load_run("quikstart")
    with pytest.raises(ConfigError, match=r"no/such.yaml: not readable: No such file"):
        load_run("no/such.yaml")


def test_a_world_with_an_empty_rank_is_refused(tiny: Path) -> None:
    run = load(tiny)
    run.check_world_size(4)
    with pytest.raises(
        ConfigError, match=r"5 ranks, but a micro-batch has only 4 rows .* start fewer processes or raise"
    ):
        run.check_world_size(5)
    accumulating = load(
        tiny, "model.fusion={}", "objectives={masked_language: {}, contrastive: null}", "train.accumulation=2"
    )
    accumulating.check_world_size(2)
    with pytest.raises(ConfigError, match="3 ranks, but a micro-batch has only 2 rows"):
        accumulating.check_world_size(3)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("seed=1", ["seed"]),
        ("model.width=32", ["model.width"]),
        ("model.modalities.image.augment.flip=false", ["model.modalities.image.augment.flip"]),
        ("train.global_batch=8", ["train.global_batch"]),
        ("data.lanes=2", ["data.lanes"]),
        ("data.window_shards=2", ["data.window_shards"]),
        ("data.train=[{recipe: emoji}]", []),  # what its plan identifies, resume compares
        ("objectives.contrastive.weight=2", ["objectives.contrastive.weight"]),
        ("train.steps=9", []),
        ("train.precision=bf16", []),
        ("optimizer.learning_rate=1", []),
        ("output_dir=elsewhere", []),
        ("data.num_workers=3", []),
        ("data.prefetch_batches=3", []),
        ("data.validation={x: {recipe: emoji_sample}}", []),
        ("evaluation.batch_size=3", []),
    ],
)
def test_a_resumed_run_may_change_only_what_changes_no_batch_and_no_model(
    tiny: Path, override: str, names: list[Any]
) -> None:
    changed = changed_settings(load(tiny), load(tiny, override))
    assert [line.split(":")[0] for line in changed] == names
    assert all(" then, " in line and line.endswith(" now") for line in changed)


def test_a_run_s_folder_is_named_after_it_or_given(tiny: Path) -> None:
    assert load(tiny, "output_dir=null").folder == Path("runs/tiny")
    assert load(tiny, "output_dir=x/y").folder == Path("x/y")
