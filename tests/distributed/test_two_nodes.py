"""Two nodes that share nothing but a URL: killed, and continued on two others."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed.launches import (
    TOLERANCE,
    finish,
    kill_all,
    read_losses,
    read_samples,
    start,
    wait_for_step,
    write_run,
    write_sparse_shards,
)
from servers import free_ports

from mmfuse.train.manifest import MANIFEST

STEPS = 20


@contextmanager
def two_nodes(run: Path, folder: Path, *settings: str) -> Iterator[list[tuple[subprocess.Popen[bytes], Path]]]:
    """Their launchers, of one rank each, and their run's folders."""
    asked = {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "127.0.0.1", "MAIN_PROCESS_PORT": str(free_ports(1)[0])}
    nodes = []
    for number in range(2):
        output = folder / f"node{number}" / "out"
        output.parent.mkdir(parents=True)
        node = {**asked, "MACHINE_RANK": str(number), "GLOO_SOCKET_IFNAME": "lo"}
        nodes.append((start("ddp", run, output, settings=settings, node=node), output))
    try:
        yield nodes
    finally:
        for process, _ in nodes:
            kill_all(process)


def read_all_samples(folder: Path) -> dict[int, list[str]]:
    """As `read_samples`, of the ranks of both nodes."""
    (folder / "both").mkdir()
    for path in folder.glob("node*/out/samples.rank*.jsonl"):
        shutil.copy(path, folder / "both")
    return read_samples(folder / "both")


@pytest.mark.slow
def test_killed_nodes_are_replaced_by_others_that_have_nothing_and_the_run_is_that_of_one_process(
    tmp_path: Path,
) -> None:
    run, url = write_run(tmp_path / "run.yaml", write_sparse_shards(tmp_path / "shards"), steps=STEPS), tmp_path / "url"
    settings = (f"train.checkpoint_url={url.as_uri()}", "train.keep_checkpoints=1")
    with two_nodes(run, tmp_path / "first", *settings) as nodes:
        wait_for_step(*nodes[0], step=9)
        while not (url / "step_00000006" / MANIFEST).exists():
            assert nodes[0][0].poll() is None
    with two_nodes(run, tmp_path / "second", *settings) as nodes:
        for process, output in nodes:
            finish(process, output)
            assert [*(output / "checkpoints").iterdir()] == [] and not (output / "copies").exists()
    resumed = re.search(r"resumed from out/copies/step_(\d+)", (tmp_path / "second/node0/out.log").read_text())
    assert resumed and int(resumed[1]) in (6, 12)
    assert [path.name for path in url.glob("step_*")] == [f"step_{STEPS:08d}"]
    assert len([*(url / f"step_{STEPS:08d}").glob("model-*")]) == 2

    finish(start("cpu", run, tmp_path / "alone"), tmp_path / "alone")
    alone, losses = read_losses(tmp_path / "alone"), read_losses(tmp_path / "second/node0/out")
    assert list(losses) == list(alone) == list(range(1, STEPS + 1))
    assert max(abs(losses[step] / alone[step] - 1) for step in alone) < TOLERANCE
    before = {step: keys for step, keys in read_all_samples(tmp_path / "first").items() if step <= int(resumed[1])}
    assert before | read_all_samples(tmp_path / "second") == read_samples(tmp_path / "alone")
