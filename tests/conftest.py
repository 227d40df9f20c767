"""What every test may rely on: logs that pytest can see, and an Accelerator that starts anew."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run on CI that skipped a test: everything that tests need is installed there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Undoes `set_up_logging`, which keeps our messages from pytest's own handler."""
    yield
    ours = logging.getLogger("mmfuse")
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the whole process; a test that trains in this one must leave none."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def emoji_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of an indexed copy of the committed sample."""
    from helpers import index_folder

    folder = tmp_path_factory.mktemp("emoji")
    tars = sorted((REPOSITORY / "data_shards/samples/emoji").glob("*.tar"))
    (folder / "samples/emoji").mkdir(parents=True)
    for tar in tars:
        shutil.copy(tar, folder / "samples/emoji")
    index_folder(folder / "samples/emoji")
    (folder / "recipes").mkdir()
    return Path(shutil.copy(REPOSITORY / "data_shards/recipes/emoji_sample.yaml", folder / "recipes"))
