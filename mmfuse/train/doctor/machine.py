"""Memory that processes share, files that may be open, folders that must be writable."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from mmfuse.files import locked
from mmfuse.train.doctor.finding import Finding
from mmfuse.train.engines.build_folder import build_folder

_LEAST_SHARED, _GOOD_SHARED = 2**27, 2**31
"""Docker gives 64 MiB; DeepSpeed on the CPU takes about as much a rank, and loader workers some batches each."""
_LEAST_FILES, _GOOD_FILES = 1024, 512 * 8 + 256
"""The second lets `data.shard_files` keep open all that it may."""
_NETWORKS = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "glusterfs", "fuse.", "9p")


def check_shared_memory(free: int | None) -> Finding:
    """Bytes that are free in /dev/shm; None: there is none."""
    remedy = "docker run --shm-size=8g; on Kubernetes an emptyDir of medium Memory at /dev/shm; or data.num_workers=0"
    if free is None:
        return Finding("warning", "/dev/shm", "is not there: loader workers cannot pass batches through memory", remedy)
    found = f"{free / 2**30:.2f} GiB free"
    if free < _LEAST_SHARED:
        return Finding("problem", "/dev/shm", f"{found}: loader workers will end with a bus error", remedy)
    if free < _GOOD_SHARED:
        return Finding("warning", "/dev/shm", f"{found}: little for loader workers and large batches", remedy)
    return Finding("ok", "/dev/shm", found)


def check_open_files(hard: int) -> Finding:
    """The hard limit, to which mmfuse raises its own."""
    remedy = "ulimit -Hn 65536 before the start, nofile in /etc/security/limits.conf, or LimitNOFILE of the service"
    if hard == resource.RLIM_INFINITY or hard >= _GOOD_FILES:
        return Finding("ok", "open files", "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard:,}")
    if hard < _LEAST_FILES:
        return Finding("problem", "open files", f"up to {hard:,}: loader workers will run out of them", remedy)
    return Finding("warning", "open files", f"up to {hard:,}: shards are opened again and again", remedy)


def check_folder(subject: str, folder: Path, *, remedy: str, needed: bool, file_system: str = "") -> Finding:
    """Whether files can be written and locked there.

    Args:
        needed: a run that uses it stops without.
        file_system: its type; of a folder of compiled libraries, which fit the CPU that they were compiled on.
    """
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryDirectory(dir=there) as probe, locked(Path(probe)) as is_alone:
            (Path(probe) / "file").write_bytes(b"x")
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        return Finding("problem" if needed else "warning", subject, found, remedy)
    if needed and not is_alone:
        found = f"{folder} knows no locks: processes that start together may compile at the same time"
        return Finding("warning", subject, found, remedy)
    if file_system.startswith(_NETWORKS):
        found = f"{folder} is on {file_system}: what one machine compiles there may not run on the CPU of another"
        return Finding("warning", subject, found, remedy)
    return Finding("ok", subject, str(folder))


def find_file_system(path: Path) -> str:
    """The type of the one that a path is, or would be, on; empty where that is not known."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), "")


def examine_machine() -> Iterator[Finding]:
    """Findings about memory, limits and folders here."""
    shared = Path("/dev/shm")
    yield check_shared_memory(shutil.disk_usage(shared).free if shared.is_dir() else None)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    libraries = build_folder().absolute()
    remedy = "set TORCH_EXTENSIONS_DIR to a folder on each machine's own disk"
    kind = find_file_system(libraries.resolve())
    yield check_folder("compiled", libraries, remedy=remedy, needed=True, file_system=kind)
    hub = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    remedy = "set HF_HOME to a folder that can be written, or no pretrained encoder can be downloaded"
    yield check_folder("hub cache", Path(hub), remedy=remedy, needed=False)
