"""What a run ran on, for its report and for anyone who wants the same numbers again."""

import json
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from mmfuse.config import dump_yaml
from mmfuse.distributed import rank, world_size
from mmfuse.errors import ConfigError
from mmfuse.files import write_text
from mmfuse.train.run import RunConfig
from mmfuse.version import VERSION

_LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "timm", "torchaudio", "numpy")


def library_versions() -> dict[str, str]:
    """Of mmfuse, Python, and what computes."""
    libraries = (*_LIBRARIES, *filter(find_spec, ["peft"]))
    return {
        "mmfuse": VERSION,
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }


def describe_environment(strategy: str) -> dict[str, str]:
    """Versions, hardware and launch, as text by name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        **library_versions(),
        "platform": platform.platform(),
        "device": device,
        "strategy": strategy,
        "world_size": str(world_size()),
        "threads": str(torch.get_num_threads()),
    }


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; without one the GPU, where there is one.

    Raises:
        ConfigError: no such device here.
    """
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device {name}: no such device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def write_environment(folder: Path, run: RunConfig, *, strategy: str) -> None:
    """`run.yaml`, proved to load again, and `environment.json`; rank 0 only writes.

    Raises:
        ConfigError: the folder cannot be made; on every rank, so that none waits for another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be a folder ({error.strerror}); choose another output_dir or name"
        ) from error
    if rank() == 0:
        dump_yaml(run, folder / "run.yaml")
        write_text(folder / "environment.json", json.dumps(describe_environment(strategy), indent=1))
