"""DeepSpeed's libraries for the CPU, compiled so that a start that was killed does not stop the next."""

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator

from mmfuse.errors import LaunchError
from mmfuse.files import locked
from mmfuse.train.engines.build_folder import build_folder, own_folder

logger = logging.getLogger(__name__)


class Extension(NamedTuple):
    """A library that is loaded."""

    name: str
    folder: Path
    seconds: float
    """Of loading, and of compiling where that was to do."""


def load_extensions(*, adam: bool) -> list[Extension]:
    """Loads before DeepSpeed does what it needs, and compiles it where this process is the first to.

    That is `deepspeed_shm_comm`, for exchanges, where it runs on the CPU, and `cpu_adam` where that is asked for.
    `torch.utils.cpp_extension` marks a build by a file `lock`, which a killed process leaves behind: every later start
    then waits for it, in silence and for ever. So only one process at a time comes so far, by a lock that the kernel
    frees with its owner, and whatever `lock` it meets belongs to nobody. That holds for a folder of mmfuse alone.
    TORCH_EXTENSIONS_DIR names another; there torch's lock is left as it is.

    Args:
        adam: the optimizer steps in the host's memory, under the CPU's control on GPUs too.
    Raises:
        LaunchError: one of them cannot be compiled.
    """
    accelerator = get_accelerator()
    assert accelerator is not None
    wanted = [*(["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else []), *(["CPUAdamBuilder"] * adam)]
    builders = [builder for name in wanted if (builder := accelerator.create_op_builder(name)) is not None]
    if not builders:
        return []
    folder = build_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)  # DeepSpeed loads them from there
    return [_load(builder, folder, is_ours=folder == own_folder()) for builder in builders]


def _load(builder: Any, folder: Path, *, is_ours: bool) -> Extension:
    build, began = folder / builder.name, time.monotonic()
    try:
        build.mkdir(parents=True, exist_ok=True)
        with locked(folder) as is_alone:
            if is_alone and is_ours:
                (build / "lock").unlink(missing_ok=True)
            if not (build / f"{builder.name}.so").exists():
                logger.info("DeepSpeed compiles its library %s for the CPU, once: one or two minutes", builder.name)
            builder.load()
    except (RuntimeError, ImportError, OSError) as error:
        others = "a strategy without offload_optimizer" if builder.name == "cpu_adam" else "the strategy ddp or fsdp2"
        raise LaunchError(
            f"{socket.gethostname()}: DeepSpeed cannot compile its library {builder.name} for the CPU in {build}: "
            f"{error}. Install g++ and ninja, set TORCH_EXTENSIONS_DIR to a folder that can be written, or use "
            f"{others}; mmfuse doctor --build tries again"
        ) from error
    return Extension(builder.name, build, time.monotonic() - began)
