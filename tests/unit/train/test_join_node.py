"""A node that starts again, and the store that node 0's launcher keeps."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

import pytest
from servers import free_ports
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]

from mmfuse.errors import LaunchError, Stopped
from mmfuse.launch import LAUNCH_FOLDER
from mmfuse.train.join_node import join_node, note_meeting


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


def keep_store(port: int) -> TCPStore:
    """As torchrun's static rendezvous on node 0."""
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)


@pytest.fixture
def ranks_meet(port: int, monkeypatch: pytest.MonkeyPatch):
    """What the first rank of a node does when it has met the others."""

    def meet(machine_rank: int) -> None:
        told = {"GROUP_WORLD_SIZE": 3, "GROUP_RANK": machine_rank, "LOCAL_RANK": 0}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        note_meeting()

    return meet


def test_a_node_whose_ranks_have_met_others_in_a_store_waits_for_the_next_one(port: int, ranks_meet) -> None:
    store = keep_store(port)
    for _ in range(2):  # its launcher may have died before its ranks met others: they still wait for it
        join_node("127.0.0.1", port, 1, limit_seconds=5)
    ranks_meet(1)
    join_node("[127.0.0.1]", port, 2, limit_seconds=5)  # others are not kept out
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(join_node, "127.0.0.1", port, 1, limit_seconds=30)
        with pytest.raises(NotYet):
            joined.result(timeout=2)
        del store
        with pytest.raises(NotYet):
            joined.result(timeout=2)
        new = keep_store(port)
        joined.result(timeout=30)
    del new


def test_a_node_waits_for_no_longer_than_it_may(port: int, ranks_meet) -> None:
    with pytest.raises(LaunchError, match=rf"node 3 waits for node 0 at 127.0.0.1:{port} since \d+ s: nothing answers"):
        join_node("127.0.0.1", port, 3, limit_seconds=1)
    store = keep_store(port)
    ranks_meet(3)
    with pytest.raises(LaunchError, match="its last start has not ended"):
        join_node("127.0.0.1", port, 3, limit_seconds=1)
    del store


def test_a_node_that_waits_hears_a_request_to_stop(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped, match="stopped on request: node 1 waits"):
        join_node("127.0.0.1", port, 1)
