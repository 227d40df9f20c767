"""GPUs that torch cannot use, and compilers that are not there: why, and what to do."""

from pathlib import Path

import pytest

from mmfuse.train.doctor.devices import Devices, Gpu, check_backends, check_compiler, check_gpus, see_devices

GIB = 2**30
H200 = Gpu("NVIDIA H200", (9, 0), 138 * GIB, 140 * GIB)
NODE = Devices((H200, H200), True, None, "13.0", ("sm_80", "sm_90", "sm_100", "compute_120"), "")
NONE = NODE._replace(gpus=(), error="The NVIDIA driver on your system is too old")


def statuses(devices: Devices) -> list[str]:
    return [finding.status for finding in check_gpus(devices)]


def test_every_gpu_is_named_with_its_free_memory() -> None:
    first, second = check_gpus(NODE)
    assert first == ("ok", "GPU 0", "NVIDIA H200, 138.0 of 140.0 GiB free", "") and second.subject == "GPU 1"


@pytest.mark.parametrize(
    ("capability", "is_good"),
    [
        ((8, 0), True),
        ((8, 9), True),
        ((7, 5), False),
        ((10, 3), True),
        ((11, 0), False),
        ((12, 0), True),
        ((13, 1), True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_a_problem(capability: tuple[int, int], is_good: bool) -> None:
    (finding,) = check_gpus(NODE._replace(gpus=(H200._replace(capability=capability),)))
    assert finding.status == ("ok" if is_good else "problem")
    assert is_good or f"is sm_{capability[0]}{capability[1]}, but torch was built for sm_80" in finding.found


def test_a_gpu_that_others_use_and_unlike_gpus_are_warnings() -> None:
    assert statuses(NODE._replace(gpus=(H200, H200._replace(free=90 * GIB)))) == ["ok", "warning"]
    assert statuses(NODE._replace(gpus=(H200, H200._replace(name="NVIDIA H100")))) == ["ok", "ok", "warning"]


@pytest.mark.parametrize(
    ("devices", "status", "said"),
    [
        (NONE, "problem", "built for CUDA 13.0, sees none: The NVIDIA driver on your system is too old"),
        (NONE._replace(built_for=None), "problem", "built for the CPU alone"),
        (NONE._replace(visible=""), "warning", "hidden by CUDA_VISIBLE_DEVICES="),
        (NONE._replace(visible="-1"), "warning", "hidden by CUDA_VISIBLE_DEVICES=-1"),
        (NONE._replace(has_driver=False), "ok", "runs go on the CPU"),
        (NONE._replace(has_driver=False, visible=""), "ok", "runs go on the CPU"),
    ],
)
def test_why_there_is_no_gpu_is_told(devices: Devices, status: str, said: str) -> None:
    (finding,) = check_gpus(devices)
    assert (finding.status, finding.subject) == (status, "GPUs") and said in finding.found
    assert bool(finding.remedy) == (status != "ok")


def test_a_gpu_that_fails_while_others_work_is_a_problem() -> None:
    assert statuses(NODE._replace(gpus=(H200,), error="CUDA error: device is busy")) == ["ok", "problem"]


def test_without_gloo_or_with_gpus_without_nccl_ranks_cannot_meet() -> None:
    assert check_backends(has_gloo=True, has_nccl=False, num_gpus=0).status == "ok"
    assert "no NCCL" in check_backends(has_gloo=True, has_nccl=False, num_gpus=1).found
    assert "no gloo" in check_backends(has_gloo=False, has_nccl=True, num_gpus=1).found


def test_each_thing_that_compiling_lacks_is_named_with_the_strategies_that_it_stops(tmp_path: Path) -> None:
    tools = {"g++": "/usr/bin/g++", "c++": "/usr/bin/c++", "ninja": "/env/bin/ninja"}
    header = tmp_path / "Python.h"
    header.write_text("")
    good = check_compiler(tools.get, compiler="c++", python_header=header, on_cpu=True)
    assert good == ("ok", "compiler", "/usr/bin/c++, /env/bin/ninja", "")
    for lost in tools:
        have = {name: path for name, path in tools.items() if name != lost}
        on_cpu = check_compiler(have.get, compiler="c++", python_header=header, on_cpu=True)
        assert on_cpu.status == "warning" and on_cpu.found.startswith(f"no {lost}: zero1, zero2")
        on_gpu = check_compiler(have.get, compiler="c++", python_header=header, on_cpu=False)
        assert on_gpu.found.startswith(f"no {lost}: zero3_offload")
    clang = check_compiler(tools.get, compiler="clang++", python_header=tmp_path / "none.h", on_cpu=True)
    assert clang.found.startswith(f"no clang++, no {tmp_path / 'none.h'}: ")


def test_this_machine_can_be_looked_at() -> None:
    assert list(check_gpus(see_devices()))
