"""Embeddings of whole shards: those of their samples, whatever happens meanwhile."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, index_folder, sample_members, write_tar
from safetensors.torch import load_file
from unit.embed.conftest import LACKING, SHARDS

import mmfuse
from mmfuse.cli import main

NAMES = ("text", "image", "audio", "fused", "present")


def embed(run: Path, *arguments: object) -> int:
    return main(["embed", str(run), *map(str, arguments), "--set", "evaluation.batch_size=2"])


def read(folder: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Keys and columns of all parts."""
    assert json.loads((folder / "manifest.json").read_text())["complete"]
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    lines = [line for path in sorted(folder.glob("*.keys.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines], {name: torch.cat([part[name] for part in parts]) for name in NAMES}


@pytest.fixture(scope="module")
def embedded(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "whole"
    assert embed(run_folder, run_folder.parent / "set/recipe.yaml", "--out", out) == 0
    return out


def test_rows_are_what_encode_gives_for_each_sample(run_folder: Path, embedded: Path) -> None:
    keys, columns = read(embedded)
    assert keys == [f"{number:04d}" for number in range(sum(SHARDS))]
    modalities = json.loads((embedded / "manifest.json").read_text())["modalities"]
    expected = [[m not in LACKING.get(n, ()) for m in modalities] for n in range(sum(SHARDS))]
    assert columns["present"].tolist() == expected
    embedder = mmfuse.load(run_folder, device="cpu")
    for number in range(sum(SHARDS)):
        members = {name.partition(".")[2]: data for name, data in sample_members(number).items()}
        given = {"image": members["jpg"], "text": members["txt"], "audio": members["ogg"]}
        given = {name: value for name, value in given.items() if name not in LACKING.get(number, ())}
        for name, row in embedder.encode(**given).items():
            torch.testing.assert_close(columns[name][number : number + 1], row, rtol=0, atol=1e-6)
        for name in LACKING.get(number, ()):
            assert not columns[name][number].any()


def test_a_killed_command_goes_on_with_the_parts_that_are_missing(run_folder: Path, embedded: Path) -> None:
    out = embedded.with_name("killed")
    shutil.copytree(embedded, out)
    (out / "part-00001.json").unlink()  # killed before its last file was there
    (out / "part-00002.safetensors.0123.tmp").write_bytes(b"half")
    kept = (out / "part-00000.safetensors").stat().st_mtime_ns
    assert embed(run_folder, run_folder.parent / "set/recipe.yaml", "--out", out) == 0
    assert (out / "part-00000.safetensors").stat().st_mtime_ns == kept
    (keys, columns), (all_keys, all_columns) = read(out), read(embedded)
    assert keys == all_keys and all(torch.equal(columns[name], all_columns[name]) for name in NAMES)
    assert not list(out.glob("*.tmp"))


def test_processes_that_share_the_work_write_the_same(run_folder: Path, embedded: Path) -> None:
    out = embedded.with_name("shared")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "mmfuse", "embed", run_folder]
    command += [run_folder.parent / "set/recipe.yaml", "--out", out, "--set", "evaluation.batch_size=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], env=environment, check=True, timeout=120)
    (keys, columns), (all_keys, all_columns) = read(out), read(embedded)
    assert keys == all_keys
    for name in NAMES:
        torch.testing.assert_close(columns[name], all_columns[name], rtol=0, atol=1e-6)


def test_tars_without_a_recipe_become_npy_in_half_precision(run_folder: Path, embedded: Path) -> None:
    out = embedded.with_name("npy")
    arguments = [run_folder.parent / "set", "--out", out, "--layout", "npy", "--dtype", "fp16"]
    assert embed(run_folder, *arguments) == 0
    rows = np.concatenate([np.load(path) for path in sorted(out.glob("part-*.image.npy"))])
    assert rows.dtype == np.float16
    assert np.allclose(rows, read(embedded)[1]["image"].numpy(), atol=1e-3)


def test_members_that_cannot_be_decoded_are_absent_and_named(run_folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/a.tar", {**sample_members(1), "0002.jpg": b"junk", "0002.txt": b"sun", "0003.jpg": b""})
    index_folder(tmp_path / "tars")
    assert embed(run_folder, tmp_path / "tars/a.tar", "--out", tmp_path / "out") == 0
    keys, columns = read(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    has = [sorted(m for m, here in zip(manifest["modalities"], row, strict=True) if here) for row in columns["present"]]
    assert dict(zip(keys, has, strict=True)) == {"0001": ["audio", "image", "text"], "0002": ["text"], "0003": []}
    assert manifest["undecodable_members"] == 2
    faults = json.loads((tmp_path / "out/part-00000.json").read_text())["faults"]
    assert [(fault["key"], fault["extension"]) for fault in faults] == [("0002", "jpg"), ("0003", "jpg")]


def test_a_folder_of_other_embeddings_or_files_is_left_alone(
    run_folder: Path, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run_folder.parent / "set/recipe.yaml"
    before = {path.name: path.stat().st_mtime_ns for path in embedded.iterdir()}
    assert embed(run_folder, recipe, "--out", embedded, "--dtype", "fp16") == 2
    assert "holds embeddings with dtype = 'fp32', not 'fp16'" in capsys.readouterr().err
    pooling = ("--set", "model.modalities.text.pooling=cls")
    assert embed(run_folder, recipe, "--out", embedded, *pooling) == 2
    assert "holds embeddings with settings = " in capsys.readouterr().err
    (tmp_path / "mine").write_text("mine")
    assert embed(run_folder, recipe, "--out", tmp_path / "mine") == 2
    assert "mine: is there and holds no embeddings" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
    assert embed(run_folder, recipe, "--out", tmp_path) == 2
    assert "is there and holds no embeddings" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in embedded.iterdir()} == before
    assert embed(run_folder, recipe, "--out", tmp_path / "new", "--split", "none") == 2
    assert "has no split 'none'" in capsys.readouterr().err
