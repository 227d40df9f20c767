"""A start that is killed while DeepSpeed's libraries are compiled."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed.launches import needs_compiler

LOAD = "from mmfuse.train.engines.extension import load_extensions as load; load(adam={})"


def start_loading(cache: Path, *, adam: bool) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": str(cache)}
    environment.pop("TORCH_EXTENSIONS_DIR", None)
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of ninja
    return subprocess.Popen([sys.executable, "-c", LOAD.format(adam)], env=environment)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("adam", "compiled"), [(False, "deepspeed_shm_comm"), (True, "cpu_adam")])
def test_two_starts_after_a_kill_in_the_compiler_do_not_wait_for_the_lock_that_it_left(
    tmp_path: Path, adam: bool, compiled: str
) -> None:
    killed = start_loading(tmp_path, adam=adam)
    while not (logs := list(tmp_path.glob(f"torch_extensions/mmfuse_*/{compiled}/.ninja_log"))):
        assert killed.poll() is None
        time.sleep(0.02)
    build = logs[0].parent
    compiler = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()  # first: it frees its lock when the compiler fails
    for process in compiler:
        process.kill()
    killed.wait()
    assert (build / "lock").exists(), "the trap is gone: torch frees its lock"
    again = [start_loading(tmp_path, adam=adam) for _ in range(2)]
    assert [process.wait(timeout=600) for process in again] == [0, 0]
    assert not (build / "lock").exists() and (build / f"{compiled}.so").exists()
