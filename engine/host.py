"""Memory and CPUs that this machine leaves to a process, its container's limits included. Linux."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: the kernel's MemAvailable, cut to the container's limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = "".join(_lines(Path("/sys/fs/cgroup/memory.max")))
    used = "".join(_lines(Path("/sys/fs/cgroup/memory.current")))
    if limit.isdigit() and used.isdigit():
        available = min(available, max(int(limit) - int(used), 0))
    return available


def usable_cpus() -> int:
    """CPUs of this process's affinity mask, cut to the CPU limit of its container or service."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cpus, *(max(1, int(limit)) for limit in _cpu_limits())])


def _cpu_limits(root: Path = Path("/")) -> Iterator[float]:
    """CPU time per time that this process's control groups, version 1 and 2, and all their parents allow."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        mount, files = root / "sys/fs/cgroup", ["cpu.max"]
        if "cpu" in controllers.split(","):
            mount, files = mount / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        elif controllers:
            continue
        group = PurePosixPath(path.lstrip("/"))  # a container may see its own group as the mount's root
        for folder in (group, *group.parents):
            numbers = " ".join(line for file in files for line in _lines(mount / folder / file)).split()
            if len(numbers) == 2 and all(map(str.isdigit, numbers)):  # else "max" or -1: no limit
                yield int(numbers[0]) / int(numbers[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
