"""Processes of a machine: those of the cloud, those of Ray itself, and the ids that processes outside know them by."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import psutil
import ray

from isthmus.common.errors import UnreachableError
from isthmus.experiments.rigs.cluster.net_machines import Machine

_RAYS_FOLDER: Final = f"{Path(ray.__file__).parent}/"
_TITLES: Final = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""That processes of Ray's node give themselves; an actor's process has the name of its class behind `ray::`."""
_STARTING: Final = ("default_worker.py", "setup_worker.py")
"""Scripts of Ray that become an actor, or wait to become one: nobody can tell which before they have a title."""


def processes_of(machine: Machine) -> list[psutil.Process]:
    """All processes of a machine; those that were started there from outside are no children of its first one."""
    own = Path(f"/proc/{machine.first_pid}/ns/pid").readlink()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if Path(f"/proc/{process.pid}/ns/pid").readlink() == own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def cloud_processes(machine: Machine) -> list[psutil.Process]:
    """Processes of a machine that are neither its first one nor Ray's own: actors, and all that somebody started."""
    found = []
    for process in processes_of(machine):
        with contextlib.suppress(psutil.Error):
            if process.pid != machine.first_pid and not is_rays_own(process.cmdline()):
                found.append(process)
    return found


def is_rays_own(command: list[str]) -> bool:
    """Whether a command line is of Ray's node itself: `ray start`, its servers and agents, a worker that is idle.

    A process that is about to be an actor counts as the cloud's.
    """
    if not command or command[0].startswith(_TITLES):
        return True  # a process that is ending has no command line
    if any(word.endswith(_STARTING) for word in command):
        return False
    program = command[:3]  # with its interpreter, and an option of that
    return (
        any(word.startswith(_RAYS_FOLDER) for word in program)
        or (program[1:2] == ["-m"] and program[-1].startswith("ray."))
        or (program[2:] == ["start"] and Path(program[1]).name == "ray")
    )


def outer_pid(machine: Machine, pid: int) -> int:
    """The id that this process knows a machine's process by.

    Raises:
        UnreachableError: the machine has no such process.
    """
    for process in processes_of(machine):
        with contextlib.suppress(psutil.Error, OSError):
            ids = Path(f"/proc/{process.pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()
            if int(ids[-1]) == pid and len(ids) > 1:
                return int(ids[0])
    raise UnreachableError(f"the machine {machine.name} has no process {pid}")


def has_ray(machine: Machine) -> bool:
    """Whether Ray's node runs on a machine."""
    return any(process.name() == "raylet" for process in processes_of(machine))


def end_ray(machine: Machine) -> None:
    """Kill a machine's Ray with all its actors, as `ray stop --force` would, and nothing else."""
    for process in processes_of(machine):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if process.pid != machine.first_pid and (is_rays_own(command) or command[0].startswith("ray::")):
                process.kill()
