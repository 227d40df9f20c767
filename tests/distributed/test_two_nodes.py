"""Two nodes: killed ranks with restarts; and, where they share nothing but a URL, others that go on in their place."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from distributed.launches import (
    TOLERANCE,
    find_ranks,
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
def two_nodes(
    run: Path, outputs: Sequence[Path], *settings: str, max_restarts: int = 0
) -> Iterator[list[tuple[subprocess.Popen[bytes], Path]]]:
    """Their launchers, of one rank each, and their run's folders, which may be one."""
    asked = {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "127.0.0.1", "MAIN_PROCESS_PORT": str(free_ports(1)[0])}
    nodes = []
    for number, output in enumerate(outputs):
        output.parent.mkdir(parents=True, exist_ok=True)
        node = {**asked, "MACHINE_RANK": str(number), "GLOO_SOCKET_IFNAME": "lo"}
        nodes.append((start("ddp", run, output, settings=settings, max_restarts=max_restarts, node=node), output))
    try:
        yield nodes
    finally:
        for process, _ in nodes:
            kill_all(process)


def own_folders(folder: Path) -> list[Path]:
    """Of two nodes that share no file system."""
    return [folder / f"node{number}" / "out" for number in range(2)]


def read_all_samples(folder: Path) -> dict[int, list[str]]:
    """As `read_samples`, of the ranks of both nodes."""
    (folder / "both").mkdir()
    for path in folder.glob("node*/out/samples.rank*.jsonl"):
        shutil.copy(path, folder / "both")
    return read_samples(folder / "both")


@pytest.mark.slow
def test_both_nodes_start_again_together_whichever_of_them_lost_its_rank(tmp_path: Path) -> None:
    """Node 1 ends first where its own rank is killed, and would meet what node 0 leaves."""
    run = write_run(tmp_path / "run.yaml", write_sparse_shards(tmp_path / "shards"), steps=2 * STEPS)
    output = tmp_path / "shared"
    with two_nodes(run, [output, output], "train.checkpoint_every=3", max_restarts=2) as nodes:
        for step, (process, _) in ((5, nodes[1]), (STEPS, nodes[0])):
            wait_for_step(nodes[0][0], output, step=step)
            (victim,) = find_ranks(process)
            victim.kill()
            psutil.wait_procs([victim])
        for process, _ in nodes:
            finish(process, output)
    assert Path(f"{output}.log").read_text().count("starting again") == 4
    finish(start("ddp", run, tmp_path / "alone"), tmp_path / "alone")
    assert read_samples(output) == read_samples(tmp_path / "alone")
    assert read_losses(output) == read_losses(tmp_path / "alone")  # to the last bit


@pytest.mark.slow
def test_killed_nodes_are_replaced_by_others_that_have_nothing_and_the_run_is_that_of_one_process(
    tmp_path: Path,
) -> None:
    run, url = write_run(tmp_path / "run.yaml", write_sparse_shards(tmp_path / "shards"), steps=STEPS), tmp_path / "url"
    settings = (f"train.checkpoint_url={url.as_uri()}", "train.keep_checkpoints=1")
    with two_nodes(run, own_folders(tmp_path / "first"), *settings) as nodes:
        wait_for_step(*nodes[0], step=9)
        while not (url / "step_00000006" / MANIFEST).exists():
            assert nodes[0][0].poll() is None
    with two_nodes(run, own_folders(tmp_path / "second"), *settings) as nodes:
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
