"""All checks in turn."""

from collections.abc import Iterator
from importlib import import_module

from mmfuse.errors import LaunchError
from mmfuse.train.doctor.finding import Finding
from mmfuse.train.doctor.libraries import check_imports, examine_modalities, examine_versions


def examine(*, build: bool) -> Iterator[Finding]:
    """What is right and what is wrong with the environment that a run will meet here.

    Args:
        build: DeepSpeed's libraries are compiled now, where they are not yet.
    """
    yield from examine_versions()
    torch = list(check_imports({"torch": lambda: import_module("torch")}))
    yield from torch
    if torch[-1].status == "problem":
        return
    yield from examine_modalities()
    deepspeed = list(check_imports({"deepspeed": lambda: import_module("mmfuse.train.engines.deepspeed")}))
    yield from deepspeed
    # They import torch, which is known to work only now.
    from mmfuse.train.doctor.devices import examine_devices
    from mmfuse.train.doctor.machine import examine_machine
    from mmfuse.train.doctor.network import examine_network

    for examine_part in (examine_devices, examine_machine, examine_network):
        yield from examine_part()
    if build and deepspeed[-1].status == "ok":
        yield from _build()


def _build() -> Iterator[Finding]:
    from mmfuse.train.engines.extension import load_extensions

    try:
        for name, folder, seconds in load_extensions(adam=True):
            yield Finding("ok", "built", f"{name} in {folder} ({seconds:.1f} s)")
    except LaunchError as error:
        yield Finding("problem", "built", str(error))
