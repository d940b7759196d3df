"""What this machine has of memory, as far as this process may use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The machine's memory, or the smallest limit of the control groups that this process is in, if that is less.

    Args:
        proc: Where the process file system is.
        cgroups: Where control groups are mounted, version 2 or 1.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_limits(proc, cgroups)])


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = cgroups / controllers
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            group = Path(path.lstrip("/"))
            for folder in (root / group, *(root / parent for parent in group.parents)):  # a parent's limit holds too
                try:
                    value = (folder / name).read_text().strip()
                except OSError:  # inside a container only its own group is mounted, as the root
                    continue
                if value.isdecimal():  # else "max"
                    yield int(value)
