"""What `mmfuse checkpoint info` and `verify` say of whole and of damaged checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
from unit.train.tiny_runs import train_tiny

from mmfuse.cli import main

NEWEST = "step_00000004"


@pytest.fixture
def checkpoints(tiny_run: Path, tmp_path: Path) -> Path:
    """The folder of the two checkpoints of a run."""
    return train_tiny(tiny_run, tmp_path / "run") / "checkpoints"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_info_tells_step_content_data_and_sizes_to_people_and_to_programs(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "info", str(checkpoints.parent)]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["checkpoint"] == str(checkpoints / NEWEST)
    assert said["step"] == "4 of 4 of run tiny"
    assert (said["modalities"], said["objectives"]) == ("text, image", "contrastive")
    assert "seed 0, global batch 4" in said["data"] and "set/train, weight 8" in said["source"]
    assert "torch " in said["versions"]

    assert main(["checkpoint", "info", str(checkpoints / "step_00000002"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["step"] == 2 and told["run"] == "tiny"
    assert list(told["kinds"]) == ["model", "exp_avg", "exp_avg_sq"]
    model = told["kinds"]["model"]
    assert f"{model['values']:,} values in {model['tensors']} tensors" in said["model"]
    assert model["bytes"] >= 4 * model["values"] and model["files"] == 1
    on_disk = [path for path in (checkpoints / "step_00000002").rglob("*") if path.is_file()]
    assert told["files"] == len(on_disk) - 1  # but for the manifest
    assert told["bytes"] == sum(path.stat().st_size for path in on_disk if path.name != "manifest.json")


def test_verify_names_every_checkpoint_of_a_run_and_finds_the_flipped_bit(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, older = str(checkpoints.parent), checkpoints / "step_00000002"
    assert main(["checkpoint", "verify", run]) == 0
    assert [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(older),
        str(checkpoints / NEWEST),
    ]
    flip_a_bit(older / "exp_avg-00000.safetensors")
    assert main(["checkpoint", "verify", run]) == main(["checkpoint", "verify", str(older)]) == 4
    out, err = capsys.readouterr()
    assert out.startswith(f"{checkpoints / NEWEST}: as it was written, ") and len(out.splitlines()) == 1
    message = f"mmfuse: error: {older}: exp_avg-00000.safetensors has changed since it was written (checksum)"
    assert [line for line in err.splitlines() if line.startswith("mmfuse")] == [message, message]


def test_verify_finds_files_that_would_be_read_but_were_not_written_with_it(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoints / NEWEST
    shutil.copy(newest / "model-00000.safetensors", newest / "ema-00000.safetensors")
    assert main(["checkpoint", "verify", str(newest)]) == 4
    assert "ema-00000.safetensors was not written with it, but would be read" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_is_no_checkpoint_is_an_error_with_its_path(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", command, str(tmp_path / "none")]) == 4
    assert f"{tmp_path / 'none'}: is no complete checkpoint" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    assert main(["checkpoint", command, str(tmp_path)]) == 4
    assert str(tmp_path) in capsys.readouterr().err
