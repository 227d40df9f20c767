"""DeepSpeed's library for exchanges on the CPU, compiled so that a start that was killed does not stop the next."""

import logging
import os
import socket
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from mmfuse.errors import LaunchError
from mmfuse.files import locked
from mmfuse.hashing import hash_int

logger = logging.getLogger(__name__)


def load_cpu_extension() -> None:
    """Loads `deepspeed_shm_comm` before DeepSpeed does, and compiles it where this is the first to; nothing on GPUs.

    `torch.utils.cpp_extension` marks a build by a file `lock`, which a killed process leaves behind: every later start
    then waits for it, in silence and for ever. So only one process at a time comes so far, by a lock that the kernel
    frees with its owner, and whatever `lock` it meets belongs to nobody. That holds for a folder of mmfuse alone, which
    is one of this environment, for two that shared one would compile by turns. TORCH_EXTENSIONS_DIR names another;
    there torch's lock is left as it is.

    Raises:
        LaunchError: it cannot be compiled.
    """
    accelerator = get_accelerator()
    assert accelerator is not None
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is None or accelerator.device_name() != "cpu":
        return
    own = Path(get_default_build_root()) / f"mmfuse_torch{torch.__version__}_{hash_int(sys.prefix):016x}"
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))
    build = folder / builder.name
    try:
        build.mkdir(parents=True, exist_ok=True)
        with locked(folder) as is_alone:
            if is_alone and folder == own:
                (build / "lock").unlink(missing_ok=True)
            if not (build / f"{builder.name}.so").exists():
                logger.info("DeepSpeed compiles a small library for the CPU, once: about a minute")
            builder.load()
    except (RuntimeError, ImportError, OSError) as error:
        raise LaunchError(
            f"{socket.gethostname()}: DeepSpeed cannot compile its library for the CPU in {build}: {error}. Install "
            "g++ and ninja, set TORCH_EXTENSIONS_DIR to a folder that can be written, or use the strategy ddp"
        ) from error
