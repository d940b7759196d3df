"""The memory of a process, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

from isthmus.common.errors import IsthmusError


def own_bytes(name: str) -> int:
    """A figure of this process, in bytes: `VmRSS` now, `VmHWM` at most. (getrusage's begins with the parent's.)"""
    return memory_bytes("self", "status", name)


def proportional_bytes(pid: int) -> int:
    """PSS of a process, in bytes: its own memory, and its part of what it shares with others."""
    return memory_bytes(pid, "smaps_rollup", "Pss")


def forget_peak(pid: int) -> None:
    """Count the peak of a process anew. Raises IsthmusError where this system does not allow it."""
    path = Path(f"/proc/{pid}/clear_refs")
    try:
        path.write_text("5")
    except OSError as error:
        raise IsthmusError(f"cannot write {path} ({error.strerror}), which the figures of memory need") from None


def peak_bytes(pid: int) -> int:
    """The most PSS that a process has had since `forget_peak`.

    The kernel keeps the peak of the resident size, at no cost; reading PSS again and again would slow down what is
    measured. What is shared with others is taken to be the same at the peak as it is now.
    """
    return proportional_bytes(pid) + memory_bytes(pid, "status", "VmHWM") - memory_bytes(pid, "status", "VmRSS")


def memory_bytes(pid: int | str, file: str, name: str) -> int:
    """A size in bytes from a file of the process in /proc.

    Raises IsthmusError where the process has ended, or this system does not say.
    """
    path = Path(f"/proc/{pid}/{file}")
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise IsthmusError(f"cannot read {path} ({error.strerror}), which the figures of memory need") from None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise IsthmusError(f"{path} does not say {name}, which the figures of memory need")
