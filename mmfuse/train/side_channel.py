"""A store that all ranks share and that training does not use: for checkpoints written beside it, and the watchdog."""

import os

from torch.distributed import HashStore, TCPStore  # type: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from mmfuse.distributed import first_rank_decides, rank, world_size


def open_store() -> Store:
    """All ranks must call; rank 0 keeps it."""
    if world_size() == 1:
        return HashStore()
    host = os.environ["MASTER_ADDR"]
    kept: list[TCPStore] = []

    def serve() -> int:
        kept.append(TCPStore(host, 0, is_master=True, wait_for_workers=False))
        return kept[0].port

    port = first_rank_decides(serve)
    return kept[0] if rank() == 0 else TCPStore(host, port, is_master=False, wait_for_workers=False)
