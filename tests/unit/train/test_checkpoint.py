"""Checkpoints: whole or not there, only of this model, and only as many as wanted."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmfuse.errors import CheckpointError
from mmfuse.train.checkpoint import (
    MANIFEST,
    RUN,
    STATE,
    complete_checkpoints,
    load_portable_state,
    load_weights,
    read_facts,
    save_checkpoint,
    verify_checkpoint,
)


def make_model(seed: int, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save(root: Path, step: int, *, keep: int = 9) -> Path:
    weights = weights_of(make_model(step))
    moments = {name: torch.full_like(tensor, step) for name, tensor in weights.items()}
    state = {"model": weights, "exp_avg": moments, "exp_avg_sq": moments}
    files = root.parent / "modalities"
    (files / "text").mkdir(parents=True, exist_ok=True)
    (files / "text" / "config.json").write_text("{}")
    facts, run_yaml = {"plan": {"seed": 3}}, "name: x\n"
    return save_checkpoint(root, step=step, state=state, facts=facts, run_yaml=run_yaml, modalities=files, keep=keep)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder.name == "step_00000007"
    verify_checkpoint(folder, contents=True)
    assert read_facts(folder) == {"step": 7, "plan": {"seed": 3}}
    assert (folder / RUN).read_text() == "name: x\n"
    model = make_model(0)
    load_weights(model, folder)
    expected = weights_of(make_model(7))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    portable = load_portable_state(folder)
    assert torch.equal(portable["exp_avg"]["0.weight"], torch.full((3, 2), 7.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep=2)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step_00000010", "step_00000011"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("keep", [1, 9])
def test_saving_removes_checkpoints_of_later_steps_whole_or_not_and_never_the_one_just_saved(
    tmp_path: Path, keep: int
) -> None:
    for step in (1, 5, 6):
        save(tmp_path, step)
    (tmp_path / "step_00000006" / MANIFEST).unlink()
    (tmp_path / "step_00000005.evaluation").mkdir()
    save(tmp_path, 2, keep=keep)
    kept = ["step_00000002"] if keep == 1 else ["step_00000001", "step_00000002"]
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "step_00000005.evaluation"]


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


@pytest.mark.parametrize("name", ["model.safetensors", "modalities/text/config.json", STATE, RUN])
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


def test_one_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed since it was written \(checksum\)"):
        verify_checkpoint(folder, contents=True)


def test_a_half_written_one_and_other_folders_are_not_taken(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    shutil.copytree(folder, tmp_path / "step_00000002.tmp")
    (tmp_path / "step_00000001.evaluation").mkdir()
    (tmp_path / "step_00000003").write_text("a file")
    assert complete_checkpoints(tmp_path) == [folder]
    assert complete_checkpoints(tmp_path / "no such folder") == []


def test_what_a_killed_save_left_does_not_enter_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / "step_00000001.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.safetensors").write_bytes(b"x")
    folder = save(tmp_path, 1)
    assert not leftover.exists()
    assert not (folder / "half.safetensors").exists()


def test_a_save_that_fails_keeps_the_one_before(tmp_path: Path, monkeypatch) -> None:
    folder = save(tmp_path, 1, keep=1)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmfuse.train.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep=1)
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
    for name in ("model.safetensors", STATE):
        size = (folder / name).stat().st_size
        (folder / name).write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not readable"):
        load_weights(make_model(0), folder)
    with pytest.raises(CheckpointError, match=f"{STATE} is not readable"):
        read_facts(folder)
