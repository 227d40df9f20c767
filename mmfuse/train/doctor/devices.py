"""GPUs as torch sees them, what carries messages between processes, and the compiler that DeepSpeed calls."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

from mmfuse.train.doctor.finding import Finding

_FREE_SHARE = 0.9
"""Of a GPU that nobody else uses; the driver keeps some hundred MB."""


class Gpu(NamedTuple):
    """One GPU."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int
    """Bytes."""


class Devices(NamedTuple):
    """What torch was built for, and what it finds."""

    gpus: tuple[Gpu, ...]
    has_driver: bool
    visible: str | None
    """CUDA_VISIBLE_DEVICES."""
    built_for: str | None
    """The version of CUDA."""
    architectures: tuple[str, ...]
    """`sm_90`, `compute_90`, ..."""
    error: str
    """Why torch sees no GPU."""


def see_devices() -> Devices:
    """Those of this process."""
    gpus, error = [], ""
    try:
        torch.cuda.init()
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            gpus.append(Gpu(facts.name, (facts.major, facts.minor), *torch.cuda.mem_get_info(number)))
    except (RuntimeError, AssertionError) as reason:  # asserts that it was built with CUDA
        error = str(reason).partition("\n")[0]
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Devices(tuple(gpus), has_driver, visible, torch.version.cuda, tuple(torch.cuda.get_arch_list()), error)


def check_gpus(devices: Devices) -> Iterator[Finding]:
    """Whether torch can use every GPU that is there."""
    for number, gpu in enumerate(devices.gpus):
        yield _check_gpu(f"GPU {number}", gpu, devices)
    if len(names := {gpu.name for gpu in devices.gpus}) > 1:
        remedy = "start ranks on equal ones: CUDA_VISIBLE_DEVICES"
        yield Finding(
            "warning", "GPUs", f"of {len(names)} kinds: ranks wait for the slowest, and may drift apart", remedy
        )
    if devices.gpus and devices.error:
        yield Finding("problem", "GPUs", f"one cannot be used: {devices.error}", "see what nvidia-smi says of it")
    if not devices.gpus:
        yield _explain_absence(devices)


def _explain_absence(devices: Devices) -> Finding:
    """Why torch sees no GPU."""
    if not devices.has_driver:
        return Finding("ok", "GPUs", "none, and no driver of NVIDIA's: runs go on the CPU")
    if devices.visible is not None and devices.visible.strip() in ("", "-1"):
        found = f"hidden by CUDA_VISIBLE_DEVICES={devices.visible}: runs go on the CPU"
        return Finding("warning", "GPUs", found, "unset it, if that is not meant")
    if devices.built_for is None:
        found = "there is a driver, but this torch was built for the CPU alone"
        return Finding("problem", "GPUs", found, "install the trio of torch for CUDA: pytorch.org says how")
    found = f"there is a driver, but torch, built for CUDA {devices.built_for}, sees none: {devices.error}"
    remedy = "see what nvidia-smi says; a newer driver, or a torch for an older CUDA; a container needs --gpus all"
    return Finding("problem", "GPUs", found, remedy)


def _check_gpu(subject: str, gpu: Gpu, devices: Devices) -> Finding:
    sizes = f"{gpu.free / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB free"
    if not _is_supported(gpu.capability, devices.architectures):
        built, (major, minor) = ", ".join(devices.architectures), gpu.capability
        found = f"{gpu.name} is sm_{major}{minor}, but torch was built for {built}"
        return Finding("problem", subject, found, "install a torch that was built for it")
    if gpu.free < _FREE_SHARE * gpu.total:
        remedy = "another process has the rest; nvidia-smi names it"
        return Finding("warning", subject, f"{gpu.name}, {sizes}", remedy)
    return Finding("ok", subject, f"{gpu.name}, {sizes}")


def _is_supported(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Code of the same major version and no later minor one runs; PTX of any earlier version is compiled."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        number = "".join(filter(str.isdigit, digits))
        major, minor = int(number[:-1]), int(number[-1])
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return True
    return not architectures  # not CUDA


def check_backends(*, has_gloo: bool, has_nccl: bool, num_gpus: int) -> Finding:
    """Whether torch was built with what ranks exchange tensors by."""
    missing = [name for name, there in (("gloo", has_gloo), ("NCCL", has_nccl or not num_gpus)) if not there]
    if missing:
        remedy = "runs of several processes need it; install torch from pytorch.org"
        return Finding("problem", "exchange", f"this torch has no {' and no '.join(missing)}", remedy)
    return Finding("ok", "exchange", "gloo and NCCL" if num_gpus else "gloo")


def check_compiler(which: Callable[[str], str | None], *, compiler: str, python_header: Path, on_cpu: bool) -> Finding:
    """Whether DeepSpeed could compile its libraries.

    Args:
        compiler: what torch calls: CXX, or c++.
        python_header: `Python.h`.
    """
    missing = [name for name in dict.fromkeys(("g++", compiler, "ninja")) if which(name) is None]
    missing += [] if python_header.is_file() else [str(python_header)]
    if not missing:
        return Finding("ok", "compiler", f"{which(compiler)}, {which('ninja')}")
    stopped = "zero1, zero2, zero3 and zero3_offload cannot start" if on_cpu else "zero3_offload cannot start"
    found = f"no {', no '.join(missing)}: {stopped}; ddp and fsdp2 can"
    remedy = "apt-get install g++ python3-dev; pip install ninja; activate the environment, so that ninja is found"
    return Finding("warning", "compiler", found, remedy)


def examine_devices() -> Iterator[Finding]:
    """Findings about this machine's devices and what torch and DeepSpeed can do with them."""
    devices = see_devices()
    yield from check_gpus(devices)
    num_gpus = len(devices.gpus)
    gloo, nccl = distributed.is_gloo_available(), distributed.is_nccl_available()
    yield check_backends(has_gloo=gloo, has_nccl=nccl, num_gpus=num_gpus)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = os.environ.get("CXX", "c++")
    yield check_compiler(shutil.which, compiler=compiler, python_header=header, on_cpu=not num_gpus)
