"""Where the libraries go that DeepSpeed compiles."""

import os
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from mmfuse.hashing import hash_int


def own_folder() -> Path:
    """That of this environment alone: two that shared one would compile by turns."""
    return Path(get_default_build_root()) / f"mmfuse_torch{torch.__version__}_{hash_int(sys.prefix):016x}"


def build_folder() -> Path:
    """TORCH_EXTENSIONS_DIR, or our own."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or own_folder())
