"""Checkpoints: whole or not there, only of this model, and only as many as wanted."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from unit.train.parts import write_in_parts

from mmfuse.errors import CheckpointError
from mmfuse.train.checkpoint import (
    MANIFEST,
    MODALITIES,
    RUN,
    STATE,
    Keep,
    begin_checkpoint,
    complete_checkpoints,
    load_weights,
    publish_checkpoint,
    read_facts,
    remove_unfinished,
    store_file,
    verify_checkpoint,
)
from mmfuse.train.engines.base import MODEL
from mmfuse.train.state_files import StoredState


def make_model(seed: int, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save(root: Path, step: int, *, keep: int = 9, keep_every: int | None = None, lost: str = "") -> Path:
    """What two ranks save of a model made from its step; file `lost` never gets to rank 0."""
    temporary = begin_checkpoint(root, step)
    weights = weights_of(make_model(step))
    moments = {name: torch.full_like(tensor, step) for name, tensor in weights.items()}
    kinds = {MODEL: weights, "exp_avg": moments}
    files = [path for kind in kinds for path in write_in_parts(temporary, kind, kinds[kind], ranks=2)]
    (temporary / MODALITIES / "text").mkdir(parents=True)
    (temporary / MODALITIES / "text" / "config.json").write_text("{}")
    (temporary / RUN).write_text("name: x\n")
    written = {file.name: store_file(file) for file in files}
    if lost:
        (temporary / lost).unlink()
    facts = {"step": step, "plan": {"seed": 3}}
    return publish_checkpoint(temporary, written, facts=facts, keep=Keep(keep, keep_every))


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder.name == "step_00000007" and names_in(tmp_path) == [folder.name]
    verify_checkpoint(folder, contents=True)
    assert read_facts(folder) == {"step": 7, "plan": {"seed": 3}}
    assert (folder / RUN).read_text() == "name: x\n"
    model = make_model(0)
    load_weights(model, folder)
    expected = weights_of(make_model(7))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(StoredState(folder).whole("exp_avg")["0.weight"], torch.full((3, 2), 7.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep=2)
    assert names_in(tmp_path) == ["step_00000010", "step_00000011"]


def test_milestones_are_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (2, 3, 4, 6, 7, 8, 9):
        save(tmp_path, step, keep=2, keep_every=3)
    assert names_in(tmp_path) == [f"step_{step:08d}" for step in (3, 6, 8, 9)]


@pytest.mark.parametrize("keep", [1, 9])
def test_saving_removes_checkpoints_of_later_steps_whole_or_not_and_never_the_one_just_saved(
    tmp_path: Path, keep: int
) -> None:
    for step in (1, 5, 6):
        save(tmp_path, step)
    (tmp_path / "step_00000006" / MANIFEST).unlink()
    (tmp_path / "step_00000005.evaluation").mkdir()
    save(tmp_path, 2, keep=keep, keep_every=5)
    kept = ["step_00000002"] if keep == 1 else ["step_00000001", "step_00000002"]
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == kept
    assert names_in(tmp_path) == [*kept, "step_00000005.evaluation"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_00000001/extra").write_text("from before")
    folder = save(tmp_path, 1)
    assert not (folder / "extra").exists()
    verify_checkpoint(folder, contents=True)


def break_manifest(folder: Path, text: str | None) -> None:
    (folder / MANIFEST).unlink()
    if text is not None:
        (folder / MANIFEST).write_text(text)


@pytest.mark.parametrize("text", [None, "", '{"state.json"', "[]", "{}", '{"state.json": {}, "run.yaml": 1}'])
def test_without_a_whole_manifest_it_is_no_checkpoint(tmp_path: Path, text: str | None, caplog) -> None:
    older, folder = save(tmp_path, 1), save(tmp_path, 2)
    break_manifest(folder, text)
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        verify_checkpoint(folder)
    with caplog.at_level(logging.WARNING):
        assert complete_checkpoints(tmp_path) == [older]
    assert str(folder) in caplog.text


@pytest.mark.parametrize("name", ["model-00001.safetensors", "modalities/text/config.json", STATE, RUN])
def test_a_missing_or_cut_off_file_is_named_and_the_checkpoint_not_taken(tmp_path: Path, name: str) -> None:
    older, folder = save(tmp_path, 1), save(tmp_path, 2)
    whole = (folder / name).read_bytes()
    for content in (whole[:-1], None):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is missing or has another size"):
            verify_checkpoint(folder)
        assert complete_checkpoints(tmp_path) == [older]


@pytest.mark.parametrize("name", ["model-00000.safetensors", "exp_avg-00001.safetensors", STATE, RUN])
def test_one_flipped_bit_is_found_by_the_checksum(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)
    verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{name} has changed since it was written \(checksum\)"):
        verify_checkpoint(folder, contents=True)


def test_a_half_written_one_and_other_folders_are_not_taken(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    shutil.copytree(folder, tmp_path / "step_00000002.tmp")
    (tmp_path / "step_00000001.evaluation").mkdir()
    (tmp_path / "step_00000003").write_text("a file")
    assert complete_checkpoints(tmp_path) == [folder]
    assert complete_checkpoints(tmp_path / "no such folder") == []


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / "step_00000001.evaluation").mkdir()
    leftover = begin_checkpoint(tmp_path, 2)
    (leftover / "half.safetensors").write_bytes(b"x")
    remove_unfinished(tmp_path)
    assert names_in(tmp_path) == [folder.name, "step_00000001.evaluation"]
    remove_unfinished(tmp_path / "no such folder")


def test_a_file_of_another_rank_that_is_not_seen_here_leaves_the_older_one_the_newest(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, keep=1)
    with pytest.raises(CheckpointError, match=r"exp_avg-00001.safetensors: .*nodes must share output_dir"):
        save(tmp_path, 2, keep=1, lost="exp_avg-00001.safetensors")
    assert complete_checkpoints(tmp_path) == [folder]


def test_weights_of_another_model_are_refused_with_their_names(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"holds another model; 6 weights differ, such as 0.weight, 0.bias, 1.weight"
    ):
        load_weights(make_model(0, width=4), folder)
    with pytest.raises(CheckpointError, match=r"holds another model; 5 weights differ, such as 1.bias"):
        load_weights(nn.Sequential(nn.Linear(2, 3)), folder)


def test_unreadable_files_are_named_although_their_size_is_right(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for name in ("model-00001.safetensors", STATE):
        size = (folder / name).stat().st_size
        (folder / name).write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match=r"model-00001.safetensors is not readable"):
        load_weights(make_model(0), folder)
    with pytest.raises(CheckpointError, match=f"{STATE} is not readable"):
        read_facts(folder)
