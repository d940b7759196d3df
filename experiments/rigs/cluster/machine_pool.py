"""Machines that Ray's autoscaler adds and ends.

The autoscaler runs on the head, and loads `MachineProvider` there. What it wants is a file for each machine in a folder
of the head's; this process, which has the machines, switches them on and off as `Provisioner` finds the files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from isthmus.cloud.cluster.cluster_spec import RESOURCE
from isthmus.experiments.rigs.cluster.machine_processes import cloud_processes
from isthmus.experiments.rigs.cluster.net_machines import Machine

HEAD_ID, HEAD_TYPE, WORKER_TYPE = "head", "head", "worker"
IDLE_MINUTES: Final = 0.05
"""Without an actor, until a machine is ended."""
LOOK_SECONDS = 0.2
SCALING: Final = {
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
"""Variables of all nodes: the autoscaler looks every second."""


def autoscaling_config(folder: Path, most: int, workers_each: int) -> dict[str, Any]:
    """What `ray start --head --autoscaling-config` takes.

    Args:
        folder: where the provider leaves its files.
        most: machines at most.
        workers_each: how many workers each takes.
    """
    nothing: dict[str, Any] = {"resources": {}, "node_config": {}, "max_workers": 0, "min_workers": 0}
    resources = {RESOURCE: workers_each, "memory": 4_000_000_000, "CPU": 0}
    return {
        "cluster_name": "bench",
        "max_workers": most,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "isthmus.experiments.rigs.cluster.machine_provider.MachineProvider",
            "folder": str(folder),
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "use_internal_ips": True,
        },
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: nothing,
            WORKER_TYPE: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
    }


class Provisioner:
    """Switches machines on and off as the autoscaler wants. A context manager.

    Args:
        folder: where the provider leaves its files.
        spare: machines that may be switched on.
        start: switches one on, and starts its Ray as the node of a name.

    Attributes:
        on: the machines that are on, by the autoscaler's name.
        left: processes of the cloud that were on machines when the autoscaler ended them.
    """

    def __init__(self, folder: Path, spare: list[Machine], start: Callable[[Machine, str], None]) -> None:
        self._folder, self._spare, self._start = folder, spare, start
        self.on: dict[str, Machine] = {}
        self.left = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Provisioner:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            wanted = set(wanted_machines(self._folder))
            for name in sorted(wanted - set(self.on)):
                if self._spare:
                    machine = self.on[name] = self._spare.pop(0)
                    self._start(machine, name)
            for name in sorted(set(self.on) - wanted):
                machine = self.on[name]
                self.left += len(cloud_processes(machine))
                machine.cut_power()
                del self.on[name]
                self._spare.append(machine)


def wanted_machines(folder: Path) -> Iterator[str]:
    """Names of the machines that the autoscaler wants."""
    for path in folder.glob("machine-*.json"):
        yield path.stem
