"""The cores and the memory that this process may use: the machine's, within CPU affinity and control groups.

`os.cpu_count()` counts the machine's cores. In a container, or under `taskset`, more threads than cores would wait for
each other at every product.

    cgroup v2  `cpu.max`: "<quota> <period>" in microseconds, or "max <period>"; `memory.max` in bytes, or "max"
    cgroup v1  `cpu.cfs_quota_us`, -1 without a limit, and `cpu.cfs_period_us`; `memory.limit_in_bytes`

A limit of a parent group binds as well, so all of them are read, up to the root of the mount. Source: the kernel's
documentation, admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/memory.rst and scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def usable_cores() -> int:
    """Cores that this process may keep busy, at least 1. Part of a core, in a quota, is not counted."""
    return cores_within(_allowed(), cpu_quota(_PROC))


def _allowed() -> int:
    """Cores of this process's affinity, or of the machine on systems without one, such as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_within(allowed: int, quota: float | None) -> int:
    """The lesser of the cores of an affinity and those that a quota, in cores, pays for; at least 1."""
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def threads_each(cores: int, processes: int) -> int:
    """Threads for each of several processes that share the cores; at least 1."""
    return max(1, cores // processes)


def usable_memory(proc: Path = _PROC) -> int:
    """Bytes of the machine's memory, or the least limit of this process's control groups, if that is less.

    Args:
        proc: As for `cpu_quota`.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (
        _read(group / name) for group in _groups(proc, "memory") for name in ("memory.max", "memory.limit_in_bytes")
    )
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])


def cpu_quota(proc: Path) -> float | None:
    """The least CPU quota, in cores, of the control groups that a process is in; None without one.

    Args:
        proc: The process's folder in /proc, of which `cgroup` and `mountinfo` are read.
    """
    found = (quota for group in _groups(proc, "cpu") for quota in (_quota_v2(group), _quota_v1(group)))
    return min((quota for quota in found if quota is not None), default=None)


def _groups(proc: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's groups with a controller, and of the groups above, as far as they are mounted."""
    try:
        memberships, mounts = _lines(proc / "cgroup"), _lines(proc / "mountinfo")
    except OSError:  # this is not Linux
        return
    paths = dict(_memberships(memberships))
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields, (kind, _, options) = before.split(" "), after.split(" ", 2)
        mounted = controller in options.split(",")
        path = paths.get("") if kind == "cgroup2" else paths.get(controller) if mounted else None
        if kind not in ("cgroup", "cgroup2") or path is None:
            continue
        top, root = Path(fields[4]), fields[3]
        # In a container the mount's root is the container's own group, and so is the start of the process's path.
        inside = path.removeprefix(root) if root != "/" else path
        group = top / inside.lstrip("/")
        yield top
        while group != top and group.is_relative_to(top):
            yield group
            group = group.parent


def _lines(path: Path) -> list[str]:
    """Lines with names of folders, which are bytes of any kind: a mount may be named in Latin-1."""
    return [line for line in os.fsdecode(path.read_bytes()).split("\n") if line]


def _memberships(lines: list[str]) -> Iterator[tuple[str, str]]:
    """The process's path by controller, of "4:cpu,cpuacct:/path"; "" stands for cgroup v2, "0::/path"."""
    for line in lines:
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            yield name, path


def _quota_v2(group: Path) -> float | None:
    words = _read(group / "cpu.max").split()
    return _cores(*words) if len(words) == 2 else None


def _quota_v1(group: Path) -> float | None:
    return _cores(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _cores(quota: str, period: str) -> float | None:
    """Both in microseconds. "max" and -1 are no quota."""
    if not quota.isdecimal() or not period.isdecimal() or not int(period):
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
