"""Little shared memory, few open files, folders that cannot be written."""

import resource
from pathlib import Path

import pytest

from mmfuse.train.doctor.machine import check_folder, check_open_files, check_shared_memory, find_file_system

MIB = 2**20


@pytest.mark.parametrize(
    ("free", "status"),
    [(64 * MIB, "problem"), (1024 * MIB, "warning"), (8192 * MIB, "ok"), (None, "warning")],
)
def test_what_a_container_leaves_of_shared_memory_is_a_problem(free: int | None, status: str) -> None:
    finding = check_shared_memory(free)
    assert finding.status == status and ("--shm-size" in finding.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("limit", "status"), [(256, "problem"), (1024, "warning"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_few_open_files_are_told_before_a_worker_runs_out_of_them(limit: int, status: str) -> None:
    finding = check_open_files(limit)
    assert finding.status == status and ("ulimit" in finding.remedy) == (status != "ok")


def test_a_folder_that_cannot_be_made_is_a_problem_where_a_run_needs_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file/cache"
    for needed, status in ((True, "problem"), (False, "warning")):
        finding = check_folder("compiled", below, remedy="set another", needed=needed)
        assert (finding.status, finding.remedy) == (status, "set another")
        assert finding.found == f"{below} cannot be written: Not a directory"
    new = tmp_path / "new/cache"
    assert check_folder("compiled", new, remedy="set another", needed=True) == ("ok", "compiled", str(new), "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # looking leaves nothing


@pytest.mark.parametrize(("kind", "status"), [("nfs4", "warning"), ("fuse.gcsfuse", "warning"), ("ext4", "ok")])
def test_compiled_libraries_on_a_network_s_disk_are_a_warning(tmp_path: Path, kind: str, status: str) -> None:
    finding = check_folder("compiled", tmp_path, remedy="set another", needed=True, file_system=kind)
    assert finding.status == status


def test_the_file_system_of_a_path_is_that_of_its_nearest_mount() -> None:
    assert find_file_system(Path("/proc/1/none")) == "proc"
