"""What tests of processes that decode share."""

import multiprocessing
from multiprocessing import forkserver

import pytest


@pytest.fixture(scope="session")
def decoders_imported() -> None:
    """Starts the server that these processes fork from with all they need; the first test to use it would decide."""
    modules = ["mmfuse.shards.member_decoder", "mmfuse.shards.view_features", "mmfuse.modalities.image"]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*modules, "mmfuse.modalities.audio"])
    forkserver.ensure_running()
