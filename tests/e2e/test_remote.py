"""Training from a bucket: the samples and losses of local tars, through a cache that stays within its budget."""

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.launches import TOLERANCE, finish, read_losses, read_samples, start
from helpers import write_data_set, write_tar, write_tiny_run, write_yaml
from servers import HttpServer, serve_http

from mmfuse.cli import main
from mmfuse.errors import ConfigError, DataError
from mmfuse.train.run import load_run
from mmfuse.train.trainer import train

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SHARDS = (6, 5, 7, 6, 8, 4, 6, 5, 7, 6)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpServer]:
    with serve_http(tmp_path / "server") as running:
        write_data_set(tmp_path / "local", shard_sizes=SHARDS, modalities=["text", "image"])
        for tar in (tmp_path / "local").glob("*.tar"):
            shutil.copy2(tar, running.files)
        yield running


def write_recipe(folder: Path, address: str, *, name: str = "local") -> Path:
    """As the local data set's, whose name it has, so that both deal the same samples."""
    shards = [f"{address}/train-{{0..{len(SHARDS) - 1}}}.tar"]
    recipe = {"name": name, "splits": {"train": {"shards": shards, "samples": sum(SHARDS)}}}
    if (local := folder / name / "recipe.yaml").is_file():
        recipe["members"] = yaml.safe_load(local.read_text())["members"]
    return write_yaml(folder / f"{name}_in_bucket.yaml", recipe)


def train_on(recipe: Path, output: Path, *, cache: Path, budget: int, **changes: Any) -> list[dict[str, Any]]:
    """Six steps of a tiny run in this process with a worker; its metrics."""
    overrides = [
        "train.steps=6",
        "train.log_every=1",
        "train.record_samples=true",
        "train.global_batch=8",
        "data.lanes=4",
        "data.window_shards=1",
        "data.num_workers=1",
        "data.prefetch_batches=1",
        f"output_dir={output}",
        f"data.cache.folder={cache}",
        f"data.cache.budget_gib={budget / 2**30}",
        *(f"{name}={value}" for name, value in changes.items()),
    ]
    train(load_run(str(write_tiny_run(output.parent, recipe)), overrides=overrides))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def keys_of(output: Path) -> list[list[str]]:
    lines = (output / "samples.rank0.jsonl").read_text().splitlines()
    return [[key.rpartition("/")[2] for key in json.loads(line)["keys"]] for line in lines]


def test_a_run_from_a_server_is_the_run_from_local_tars(server: HttpServer, tmp_path: Path) -> None:
    tar = max(path.stat().st_size for path in server.files.iterdir())
    recipe = write_recipe(tmp_path, server.url("plain", "").rstrip("/"))
    assert main(["shards", "index", str(recipe), "--jobs", "1"]) == 0
    for sidecar in (tmp_path / "local_in_bucket.index").glob("*.mmindex"):
        sidecar.unlink()  # nodes need the manifest alone
    cache = tmp_path / "cache"
    remote = train_on(recipe, tmp_path / "remote", cache=cache, budget=9 * tar)
    local = train_on(tmp_path / "local/recipe.yaml", tmp_path / "here", cache=cache, budget=9 * tar)
    assert keys_of(tmp_path / "remote") == keys_of(tmp_path / "here")
    assert [line["loss"] for line in remote] == [line["loss"] for line in local]
    copies = [path for path in cache.iterdir() if path.name.endswith(".tar")]
    assert copies and sum(path.stat().st_size for path in copies) <= 9 * tar
    assert len(list((cache / "indexes").iterdir())) == len(copies)
    assert not list(cache.glob("*.part"))


@pytest.mark.slow
def test_two_processes_over_a_remote_blend_are_one_over_local_tars(server: HttpServer, tmp_path: Path) -> None:
    write_data_set(tmp_path / "spoken", shard_sizes=SHARDS, modalities=["text", "audio"])
    shutil.copytree(tmp_path / "spoken", server.files / "spoken", ignore=shutil.ignore_patterns("*.mmindex*", "*.yaml"))
    places = {"local": server.url("plain", "").rstrip("/"), "spoken": server.url("plain", "spoken")}
    remote = {name: write_recipe(tmp_path, address, name=name) for name, address in places.items()}
    here = {name: tmp_path / name / "recipe.yaml" for name in places}
    assert main(["shards", "index", *map(str, remote.values()), "--jobs", "1"]) == 0
    run = write_tiny_run(tmp_path, here["local"], modalities=("text", "image", "audio"))

    def finish_run(name: str, recipes: dict[str, Path], strategy: str) -> Path:
        blend = ", ".join(f"{{recipe: {path}, weight: {1 + n}}}" for n, path in enumerate(recipes.values()))
        settings = [
            f"data.train=[{blend}]",
            f"data.cache.folder={tmp_path / 'cache'}",
            "data.cache.budget_gib=1",
            "data.num_workers=1",
            "data.lanes=4",
            "data.window_shards=1",
            *("train.steps=12", "train.log_every=1", "train.record_samples=true", "train.global_batch=8"),
        ]
        finish(start(strategy, run, tmp_path / name, settings=settings), tmp_path / name)
        return tmp_path / name

    alone, together = finish_run("alone", here, "cpu"), finish_run("together", remote, "ddp")
    assert (together / "samples.rank1.jsonl").is_file()
    ids = [
        {step: [key.split("/")[-2:] for key in keys] for step, keys in read_samples(output).items()}
        for output in (alone, together)
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 12
    assert read_losses(together) == pytest.approx(read_losses(alone), rel=TOLERANCE)


def test_shards_in_a_bucket_have_the_embeddings_of_local_ones(server: HttpServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, server.url("plain", "").rstrip("/"))
    assert main(["shards", "index", str(recipe), "--jobs", "1"]) == 0
    cache, tar = tmp_path / "cache", max(path.stat().st_size for path in server.files.iterdir())
    train_on(tmp_path / "local/recipe.yaml", tmp_path / "run", cache=cache, budget=2**20)
    for place, out in ((recipe, "embedded"), (tmp_path / "local/recipe.yaml", "expected")):
        settings = [f"data.cache.folder={cache}", f"data.cache.budget_gib={3 * tar / 2**30}"]
        options = [option for setting in settings for option in ("--set", setting)]
        assert main(["embed", str(tmp_path / "run"), str(place), "--out", str(tmp_path / out), *options]) == 0
    remote, local = (sorted((tmp_path / out).glob("part-*.safetensors")) for out in ("embedded", "expected"))
    assert len(remote) == len(SHARDS) and [path.read_bytes() for path in remote] == [p.read_bytes() for p in local]
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= 3 * tar


def test_of_aligned_tars_only_what_is_in_the_bucket_is_fetched(server: HttpServer, tmp_path: Path) -> None:
    (server.files / "text").mkdir()
    for shard, tar in enumerate(sorted(server.files.glob("*.tar"))):
        with tarfile.open(tar) as opened:
            members = {member.name: opened.extractfile(member).read() for member in opened}
        write_tar(server.files / f"text/{shard}.tar", {n: data for n, data in members.items() if n.endswith(".txt")})
        write_tar(tmp_path / f"image/{shard}.tar", {n: data for n, data in members.items() if n.endswith(".jpg")})
    shards = {"text": [f"{server.url('plain', 'text')}/{{0..9}}.tar"], "image": ["image/{0..9}.tar"]}
    recipe = yaml.safe_load((tmp_path / "local/recipe.yaml").read_text()) | {"splits": {"train": {"shards": shards}}}
    place = write_yaml(tmp_path / "aligned.yaml", recipe)
    assert main(["shards", "index", str(place), "--jobs", "1"]) == 0
    cache = tmp_path / "cache"
    aligned = train_on(place, tmp_path / "aligned", cache=cache, budget=2**26)
    whole = train_on(tmp_path / "local/recipe.yaml", tmp_path / "here", cache=cache, budget=2**26)
    assert [line["loss"] for line in aligned] == [line["loss"] for line in whole]
    copied = {path.stat().st_size for path in cache.glob("*.tar")}
    assert copied and copied <= {path.stat().st_size for path in (server.files / "text").iterdir()}


def test_a_shard_that_changes_on_the_server_stops_the_run_with_its_name(server: HttpServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, server.url("plain", "").rstrip("/"))
    assert main(["shards", "index", str(recipe), "--jobs", "1"]) == 0
    for path in server.files.iterdir():
        path.write_bytes(path.read_bytes().replace(b"thing", b"thang"))
        os.utime(path, (1, 1))  # nginx tells versions by the second
    with pytest.raises(DataError, match=r"train-\d.tar.* has changed since it was indexed"):
        train_on(recipe, tmp_path / "out", cache=tmp_path / "cache", budget=10**6)


def test_a_server_that_is_gone_ends_the_run_within_the_deadline(server: HttpServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, server.url("plain", "").rstrip("/"))
    assert main(["shards", "index", str(recipe), "--jobs", "1"]) == 0
    server.process.kill()
    with pytest.raises(DataError, match=r"deadline_seconds"):
        changes = {"data.cache.fetch.deadline_seconds": 2.0}
        train_on(recipe, tmp_path / "out", cache=tmp_path / "cache", budget=10**6, **changes)


def test_the_share_of_evaluation_is_known_before_the_first_step(server: HttpServer, tmp_path: Path) -> None:
    tars = list(server.files.iterdir())
    (server.files / "kept").mkdir()
    for tar in tars:
        shutil.copy2(tar, server.files / "kept")
    places = {"local": server.url("plain", "").rstrip("/"), "kept": server.url("plain", "kept")}
    train_recipe, kept = (write_recipe(tmp_path, address, name=name) for name, address in places.items())
    assert main(["shards", "index", str(train_recipe), str(kept), "--jobs", "1"]) == 0
    changes = {"data.validation.kept.recipe": kept, "data.validation.kept.split": "train", "train.evaluate_every": 3}
    budget = 9 * max(tar.stat().st_size for tar in tars)
    with pytest.raises(ConfigError, match=r"budget_gib = .* is too small: .* that evaluation reads at a time"):
        train_on(train_recipe, tmp_path / "out", cache=tmp_path / "cache", budget=budget, **changes)
    assert not (tmp_path / "out/metrics.jsonl").read_text()


def test_a_budget_below_one_window_is_refused_with_the_formula(server: HttpServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, server.url("plain", "").rstrip("/"))
    assert main(["shards", "index", str(recipe), "--jobs", "1"]) == 0
    with pytest.raises(ConfigError, match=r"budget_gib = .* is too small: .*lanes x data.window_shards"):
        train_on(recipe, tmp_path / "out", cache=tmp_path / "cache", budget=30_000)
