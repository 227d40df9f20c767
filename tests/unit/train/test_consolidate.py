"""Whole weights for use elsewhere: the same ones to the last bit, complete or not there, and no place to train from."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import picture_bytes, write_data_set, write_tiny_run
from safetensors.torch import load_file
from torch import Tensor
from unit.train.parts import write_in_parts
from unit.train.tiny_runs import stored_state, train_tiny

import mmfuse
from mmfuse.cli import main
from mmfuse.errors import CheckpointError
from mmfuse.train.checkpoint import AVERAGE, complete_files, load_stored_run, read_facts, verify_checkpoint
from mmfuse.train.consolidate import consolidate_checkpoint
from mmfuse.train.engines.base import MODEL
from mmfuse.train.state_files import StoredState

NEWEST = Path("checkpoints/step_00000004")
ITEMS = {"text": ["red", "a blue thing", None], "image": [picture_bytes(1), None, picture_bytes(2)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that kept a moving average of what it trained, and froze a layer."""
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("consolidate")
    settings = write_tiny_run(folder, write_data_set(folder / "set", modalities=("text", "image")))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_CPU", "true")
        frozen = "model.modalities.text.frozen_layers=1"
        yield train_tiny(settings, folder / "run", "train.ema_decay=0.5", "optimizer.learning_rate=0.01", frozen)
    AcceleratorState._reset_state(reset_partial_state=True)


def consolidate(checkpoint: Path, out: Path, *options: str) -> int:
    return main(["checkpoint", "consolidate", str(checkpoint), "--out", str(out), *options])


def assert_holds(out: Path, expected: dict[str, Tensor]) -> None:
    """The file has these weights and nothing else, for a reader that knows safetensors alone."""
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_the_moving_average_or_the_last_weights_are_whole_in_one_file_without_moments(
    run: Path, tmp_path: Path
) -> None:
    stored = stored_state(run)
    last, average = stored.whole(MODEL), stored.whole(AVERAGE)
    assert 0 < len(average) < len(last)
    assert not any(torch.equal(tensor, last[name]) for name, tensor in average.items() if tensor.any())
    assert consolidate(run, tmp_path / "average") == 0
    assert consolidate(run / NEWEST, tmp_path / "deep/last", "--last-weights") == 0
    assert_holds(tmp_path / "average", {**last, **average})
    assert_holds(tmp_path / "deep/last", last)
    assert sorted(path.name for path in (tmp_path / "average").iterdir()) == [
        "manifest.json",
        "modalities",
        "model.safetensors",
        "run.yaml",
        "state.json",
    ]
    assert load_stored_run(tmp_path / "average")[0] == load_stored_run(run / NEWEST)[0]
    origin = {"from": "step_00000004", "weights": AVERAGE, "mmfuse": mmfuse.__version__}
    assert read_facts(tmp_path / "average") == {**read_facts(run / NEWEST), "consolidated": origin}


def test_parts_of_three_ranks_give_the_same_file(run: Path, tmp_path: Path) -> None:
    one, three = run / NEWEST, tmp_path / "three"
    three.mkdir()
    for kind in (MODEL, AVERAGE, "exp_avg"):
        write_in_parts(three, kind, stored_state(run).whole(kind), ranks=3)
    shutil.copy(one / "run.yaml", three)
    shutil.copytree(one / "modalities", three / "modalities")
    complete_files(three, {}, facts=read_facts(one))
    assert len(StoredState(three).files(MODEL)) == 3
    for checkpoint in (one, three):
        consolidate_checkpoint(checkpoint, tmp_path / f"from_{checkpoint.name}")
    files = [tmp_path / f"from_{checkpoint.name}" / "model.safetensors" for checkpoint in (one, three)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_embeds_and_scores_as_the_checkpoint_that_it_was_made_from(run: Path, tmp_path: Path) -> None:
    for averaged in (True, False):
        out = tmp_path / f"averaged_{averaged}"
        consolidate_checkpoint(run / NEWEST, out, averaged=averaged)
        ours = mmfuse.load(out, device="cpu", averaged=averaged).encode(**ITEMS)
        theirs = mmfuse.load(run, device="cpu", averaged=averaged).encode(**ITEMS)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    recipe, scores = run.parent / "set/recipe.yaml", []
    for checkpoint in (run / NEWEST, tmp_path / "averaged_True"):
        report, rows = tmp_path / f"{checkpoint.name}.report", tmp_path / f"{checkpoint.name}.rows"
        validation = f"data.validation={{seen: {{recipe: {recipe}}}}}"
        assert main(["eval", str(checkpoint), "--out", str(report), "--set", validation]) == 0
        assert main(["embed", str(checkpoint), str(recipe), "--out", str(rows)]) == 0
        scores.append(
            [(report / "evaluations/step_00000004.json").read_text(), load_file(rows / "part-00000.safetensors")]
        )
    assert scores[0][0] == scores[1][0]
    assert all(torch.equal(tensor, scores[1][1][name]) for name, tensor in scores[0][1].items())


def test_the_last_weights_are_not_asked_of_what_holds_the_average_alone(run: Path, tmp_path: Path) -> None:
    consolidate_checkpoint(run / NEWEST, tmp_path / "average")
    for ask in (
        lambda: mmfuse.load(tmp_path / "average", averaged=False),
        lambda: consolidate_checkpoint(tmp_path / "average", tmp_path / "again", averaged=False),
    ):
        with pytest.raises(CheckpointError, match="holds the moving average of the weights alone"):
            ask()
    consolidate_checkpoint(tmp_path / "average", tmp_path / "again")
    assert read_facts(tmp_path / "again") == read_facts(tmp_path / "average")


@pytest.mark.parametrize("place", ["there", "run/checkpoints/model"])
def test_a_folder_that_is_there_or_lies_among_checkpoints_is_refused(
    run: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert consolidate(run, tmp_path / place) == 2
    said = {"there": "is there already; choose another folder"}.get(place, "lies among the checkpoints of a run")
    assert said in capsys.readouterr().err and not list((tmp_path / "there").iterdir())


def test_what_cannot_be_written_whole_leaves_nothing(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / NEWEST, tmp_path / "copy"))
    (copy / "modalities/gone").symlink_to("nowhere")  # fails after the weights are written
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "new/out", tmp_path / "file/out"):
        with pytest.raises(CheckpointError, match=r"out: cannot be written: .*choose another --out"):
            consolidate_checkpoint(copy, out)
    assert not list((tmp_path / "new").iterdir())


def test_a_damaged_checkpoint_is_not_consolidated(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / NEWEST, tmp_path / "copy"))
    data = bytearray((copy / "ema-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "ema-00000.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        consolidate_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_run_goes_on_from_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    consolidate_checkpoint(run / NEWEST, tmp_path / "out")
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "out", folder / NEWEST)
    verify_checkpoint(folder / NEWEST, contents=True)
    with pytest.raises(CheckpointError, match="was consolidated: it holds weights without Adam"):
        train_tiny(run.parent / "tiny.yaml", folder, "train.ema_decay=0.5")
