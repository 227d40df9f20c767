"""A node that starts again, and the store that node 0's launcher keeps."""

import threading
import time
from pathlib import Path

import pytest
from servers import free_ports
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]

from mmfuse.errors import LaunchError, Stopped
from mmfuse.launch import LAUNCH_FOLDER
from mmfuse.train.join_node import join_node


def keep_store(port: int) -> TCPStore:
    """As torchrun's static rendezvous on node 0."""
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)


def test_a_node_that_was_in_a_store_waits_for_the_next_one() -> None:
    (port,) = free_ports(1)
    store = keep_store(port)
    join_node("127.0.0.1", port, 1)
    join_node("127.0.0.1", port, 2)  # others are not kept out
    joined = threading.Thread(target=join_node, args=("127.0.0.1", port, 1))
    joined.start()
    time.sleep(2)
    assert joined.is_alive()
    del store
    time.sleep(2)
    assert joined.is_alive()
    new = keep_store(port)
    joined.join(timeout=30)
    assert not joined.is_alive()
    del new


def test_a_node_waits_for_no_longer_than_it_may() -> None:
    (port,) = free_ports(1)
    with pytest.raises(LaunchError, match=rf"node 3 waits for node 0 at 127.0.0.1:{port} since 1 s: nothing answers"):
        join_node("127.0.0.1", port, 3, limit_seconds=1)
    store = keep_store(port)
    join_node("127.0.0.1", port, 3)
    with pytest.raises(LaunchError, match="its last start has not ended"):
        join_node("127.0.0.1", port, 3, limit_seconds=1)
    del store


def test_a_node_that_waits_hears_a_request_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped, match="stopped on request: node 1 waits"):
        join_node("127.0.0.1", free_ports(1)[0], 1)
